"""Token numbers: 0 to 255 are the bytes of a text, and two special tokens follow."""

BYTES = 256
"""How many values a byte has."""
BEGIN = 256
"""Stands in front of a sequence that a decoder reads, so that it predicts the first byte as well."""
MASK = 257
"""Stands in place of a byte that an encoder is to recover."""
VOCABULARY = 258
"""How many tokens there are."""
UNSCORED = -100
"""Target of a position that is not predicted; PyTorch's cross entropy ignores this value by default."""
