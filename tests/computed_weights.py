"""Ways to make the weight of a layer a function of other parameters."""

import functools

from torch import nn
from torch.nn.utils import prune

COMPUTED = {
    "pruned": functools.partial(prune.l1_unstructured, name="weight", amount=0.5),
    "spectral norm": nn.utils.spectral_norm,
    "weight norm": nn.utils.weight_norm,
    "parametrized": nn.utils.parametrizations.spectral_norm,
}
