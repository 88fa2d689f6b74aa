"""Observe attention maps and head outputs in any model, without rules for its classes.

Tensors are followed from the softmax to the product with the values. The output of a softmax is a map, and so is every
tensor computed from a map, up to a matrix product with a tensor that is no map. The result of this product is the head
outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__, torch.bmm, Tensor.bmm}
SOFTMAX = {torch.softmax, Tensor.softmax, functional.softmax}


class HeadTap(TorchFunctionMode):
    """Call ``change(map, heads, dim)`` with each map and its head outputs, and replace ``heads`` by what it returns.

    ``dim`` is the axis of ``heads`` along which the channels of a head lie if the map is between tokens.
    """

    def __init__(self, change: Callable[[Tensor, Tensor, int], Tensor], inside: list[nn.Module]):
        super().__init__()
        self.change, self.maps, self.depth = change, {}, 0
        self.handles = [m.register_forward_pre_hook(lambda *_: self._step(1)) for m in inside]
        self.handles += [m.register_forward_hook(lambda *_: self._step(-1)) for m in inside]

    def _step(self, by: int) -> None:
        self.depth += by

    def __enter__(self):
        # Otherwise multi_head_attention_forward would be dispatched as one function, and nothing inside it observed.
        self.dispatch, functional.has_torch_function = functional.has_torch_function, lambda *_: False
        return super().__enter__()

    def __exit__(self, *args):
        functional.has_torch_function = self.dispatch
        for handle in self.handles:
            handle.remove()
        return super().__exit__(*args)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is functional.scaled_dot_product_attention and self.depth:
            return self._attend(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        if self.depth == 0 or not isinstance(result, Tensor):
            return result
        maps = [i for i, arg in enumerate(args) if isinstance(arg, Tensor) and id(arg) in self.maps]
        if func in PRODUCTS and len(maps) == 1:
            return self.change(args[maps[0]], result, -1 if maps[0] == 0 else -2)
        if func is torch.einsum and len(maps) == 1:
            return self.change(args[maps[0]], result, -1)
        if func in SOFTMAX or maps:
            self.maps[id(result)] = result  # kept alive, so that no other tensor gets its id
        return result

    def _attend(self, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        """Compute scaled dot-product attention step by step; without dropout and grouped-query attention."""
        assert dropout_p == 0.0 and not enable_gqa
        scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        weights = scores.softmax(-1)
        return self.change(weights, weights @ v, -1)
