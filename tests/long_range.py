"""Settings that the tests of projects/long_range_arena share: small expressions, and a small model."""

from long_range_arena.grammar import Limits
from runs import ROOT

PROJECT = ROOT / "projects" / "long_range_arena"
CONFIGS = sorted((PROJECT / "configs").glob("*.py"))
SPLITS = ("train", "val", "test")
SMALL = Limits(max_depth=4, max_args=5, min_length=3, max_length=40)
NYSTROMFORMER = dict(
    type="Nystromformer",
    length=12,
    num_landmarks=4,
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    conv_kernel_size=3,
)
