"""A conditioned subclass of ``nn.MultiheadAttention``, needed because that calls its projections functionally."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..attention.adapters import is_at_work
from ..kernels.private import forward_pre_hooks
from .class_swap import ConditionedLayer, restore_class, swap_class
from .correction import CorrectedModule
from .head_transform import HeadTransform
from .hooks import PickledHook, remove_hooks

SEPARATE_WEIGHTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class ConditionedMultiheadAttention(ConditionedLayer, CorrectedModule, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with conditioned weights, head outputs, or both; same arguments, keys and shapes."""

    host = nn.MultiheadAttention
    head_transform: HeadTransform | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from ``query`` to ``key`` and ``value``; arguments and results as ``nn.MultiheadAttention``.

        Raises:
            RuntimeError: If ``is_causal`` is set without ``attn_mask``, or an adapter around the output projection
                has no effect.
            ValueError: If a mask has a wrong shape or dtype, or nested sequences are given for anything but plain
                self-attention.
        """
        if is_at_work(self.out_proj):
            raise RuntimeError(
                "an adapter is around out_proj of nn.MultiheadAttention, which uses its weight without calling it, so "
                "that the adapter has no effect; put one around the whole nn.MultiheadAttention, or merge it"
            )
        if query.is_nested:
            plain = query is key and key is value and attn_mask is None and key_padding_mask is None
            if not plain or is_causal or not self.batch_first:
                raise ValueError("expected nested sequences in batch-first self-attention without masks; pad them")
            return self._forward_nested(query), None
        if self.head_transform is None:
            return self._forward_corrected(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask; give attn_mask as well")
        batched = query.dim() == 3
        shared = query is key and key is value
        query, key, value = (self._batch_first(x, batched) for x in (query, key, value))
        q, k, v = self._project(query, None if shared else key, value)
        k, v = self._extend(k, self.bias_k), self._extend(v, self.bias_v)
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))

        dropout = self.dropout if self.training else 0.0
        causal = is_causal and key_padding_mask is None and not need_weights and k.shape[2] == key.shape[1]
        mask = None if causal else self._additive_mask(attn_mask, key_padding_mask, q, k)
        if need_weights:
            scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            weights = None
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)

        output = self.head_transform.project(
            heads.transpose(1, 2).flatten(-2), self.out_proj.weight, self.out_proj.bias
        )
        if not batched:
            return output.squeeze(0), weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _forward_corrected(
        self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
    ) -> tuple[Tensor, Tensor | None]:
        """Call PyTorch's own attention function with W + C.

        Folding then does not change a single bit of the output, except where PyTorch uses its inference kernel.
        """
        transposed = self.batch_first and query.dim() == 3
        if transposed:
            # PyTorch projects query, key and value together if they are the same object.
            same_key, same_value = key is query, value is key
            query = query.transpose(0, 1)
            key = query if same_key else key.transpose(0, 1)
            value = key if same_value else value.transpose(0, 1)
        packed = self.in_proj_weight is not None
        output, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.effective_weight("in_proj_weight") if packed else None,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            self.training,
            key_padding_mask,
            need_weights,
            attn_mask,
            use_separate_proj_weight=not packed,
            **({} if packed else {name: self.effective_weight(name) for name in SEPARATE_WEIGHTS}),
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (output.transpose(0, 1) if transposed else output), weights

    def release(self) -> None:
        """Restore the original class unless a method still conditions the module."""
        if self.head_transform is None and not self.corrections:
            remove_hooks(self, lambda hook: isinstance(hook, KeepFastPathAway))
            restore_class(self)

    def _batch_first(self, x: Tensor, batched: bool) -> Tensor:
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _project(self, query: Tensor, key: Tensor | None, value: Tensor) -> tuple[Tensor, ...]:
        """Compute q, k and v, (batch, tokens, embed_dim); if ``key`` is None, all three from ``query``."""
        if self.in_proj_weight is not None:
            weight = self.effective_weight("in_proj_weight")
            if key is None:
                return F.linear(query, weight, self.in_proj_bias).chunk(3, dim=-1)
            weights = weight.chunk(3)
        else:
            weights = [self.effective_weight(name) for name in SEPARATE_WEIGHTS]
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, query if key is None else key, value)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _extend(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Append the learned token of ``add_bias_kv`` and the zero token of ``add_zero_attn``."""
        if bias is not None:
            x = torch.cat([x, bias.to(x.dtype).expand(x.shape[0], 1, -1)], dim=1)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x

    def _additive_mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, k: Tensor
    ) -> Tensor | None:
        """Combine both masks into one float mask that broadcasts to (batch, heads, query tokens, key tokens)."""
        batch, heads, targets, _ = q.shape
        extra = int(self.bias_k is not None) + int(self.add_zero_attn)
        sources = k.shape[2] - extra
        total = None
        if attn_mask is not None:
            own = (targets, sources), (batch * heads, targets, sources)
            total = _float_mask("attn_mask", attn_mask, q.dtype, *own)
            total = total.unflatten(0, (batch, heads)) if total.dim() == 3 else total
        if key_padding_mask is not None:
            shapes = [(batch, sources)] if batch > 1 else [(batch, sources), (sources,)]
            padding = _float_mask("key_padding_mask", key_padding_mask, q.dtype, *shapes)
            padding = padding.reshape(batch, 1, 1, sources)
            total = padding if total is None else total + padding
        return None if total is None else F.pad(total, (0, extra))

    def _forward_nested(self, x: Tensor) -> Tensor:
        """Attend within sequences of different lengths, which nn.TransformerEncoder passes in eval mode."""
        lengths = torch.tensor([len(sequence) for sequence in x.unbind()], device=x.device)
        padded = x.to_padded_tensor(0.0)
        padding = torch.arange(padded.shape[1], device=x.device) >= lengths[:, None]
        output, _ = self(padded, padded, padded, padding, need_weights=False)
        return torch.nested.as_nested_tensor([row[:n] for row, n in zip(output, lengths, strict=True)])


def swap_to_conditioned(module: nn.MultiheadAttention) -> ConditionedMultiheadAttention:
    """Turn ``module`` in place into a :class:`ConditionedMultiheadAttention`, and return it."""
    if not any(isinstance(hook, KeepFastPathAway) for hook in forward_pre_hooks(module).values()):
        hook = KeepFastPathAway()
        hook.keep(module.register_forward_pre_hook(hook))
    return swap_class(module, ConditionedMultiheadAttention)


class KeepFastPathAway(PickledHook):
    """A forward pre-hook whose presence disables PyTorch's inference fast path.

    The fast path of ``nn.TransformerEncoderLayer`` reads ``in_proj_weight`` itself and would skip the conditioning.
    PyTorch does not take it if a module has a hook.
    """

    def __call__(self, module: nn.Module, args: tuple) -> None:
        """Do nothing."""


def _float_mask(name: str, mask: Tensor, dtype: torch.dtype, *shapes: tuple[int, ...]) -> Tensor:
    """Return ``mask`` as a float mask to be added to the scores, with -inf where a boolean mask is True."""
    if tuple(mask.shape) not in shapes or not (mask.dtype == torch.bool or mask.is_floating_point()):
        expected = " or ".join(map(str, shapes))
        found = f"{mask.dtype} of the shape {tuple(mask.shape)}"
        raise ValueError(f"{name}: expected booleans or floats of the shape {expected}, found {found}")
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
    return mask.to(dtype)
