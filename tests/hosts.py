"""Table of all supported attention classes for tests, with float64 reference formulas of what they compute.

A new attention class needs one more entry in ``HOSTS``.
"""

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EMBED, HEADS, TOKENS = 24, 3, 12


@dataclass
class Attention:
    """Inputs, weights and score bias of one call of an attention module; weights have the layout of ``nn.Linear``."""

    x: tuple[Tensor, Tensor, Tensor]
    w: tuple[Tensor, Tensor, Tensor]
    b: tuple[Any, Any, Any]
    out: nn.Linear
    bias: Any = 0.0
    scores: Callable[[Tensor, Tensor, int], Tensor] = lambda q, k, h: q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5

    def compute(
        self,
        heads: int,
        precondition: Callable[[Tensor], Tensor] = lambda rows: rows,
        corrections: tuple[Any, Any, Any] = (0.0, 0.0, 0.0),
    ) -> Tensor:
        """Compute softmax(scores + bias) V for each head, precondition its rows, concatenate and project."""
        q, k, v = (
            x @ (w + c).T + (0.0 if b is None else b)
            for x, w, b, c in zip(self.x, self.w, self.b, corrections, strict=True)
        )
        d = q.shape[-1] // heads
        outputs = []
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            bias = self.bias[..., h, :, :] if isinstance(self.bias, Tensor) else self.bias
            scores = self.scores(q[..., part], k[..., part], h) + bias
            weights = (scores - scores.amax(-1, keepdim=True)).exp()
            outputs.append(precondition(weights / weights.sum(-1, keepdim=True) @ v[..., part]))
        return torch.cat(outputs, -1) @ self.out.weight.T + (0.0 if self.out.bias is None else self.out.bias)


@dataclass
class Host:
    """How to build a module, how to call it, and how to describe the same call for the reference formula."""

    build: Callable[[], nn.Module]
    call: Callable[[nn.Module, tuple, Any], Tensor]
    describe: Callable[[nn.Module, tuple, Any], Attention]
    cross: bool = False
    key_dim: int = EMBED
    value_dim: int = EMBED
    needs: str = "torch"
    tokens: int = TOKENS

    def inputs(self, batch: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value of a call, (batch, tokens, channels); the same tensor three times for self-attention."""
        x = torch.randn(batch, self.tokens, EMBED)
        if not self.cross:
            return x, x, x
        sources = self.tokens + 3
        return x, torch.randn(batch, sources, self.key_dim), torch.randn(batch, sources, self.value_dim)

    def mask(self, batch: int) -> Tensor:
        """A boolean mask (query tokens, key tokens), True where attention is forbidden; no row is fully masked."""
        mask = torch.rand(self.tokens, self.tokens + 3 if self.cross else self.tokens) < 0.4
        mask[:, 0] = False
        return mask


def _forbid(mask: Tensor | None) -> Any:
    return (
        0.0
        if mask is None
        else torch.zeros(mask.shape).masked_fill(mask, -torch.inf)[None, None].expand(1, HEADS, *mask.shape)
    )


def _multihead(batch_first=True, **kwargs) -> Host:
    def order(x: Tensor) -> Tensor:
        return x if batch_first else x.transpose(0, 1)

    def call(module, x, mask):
        q, k, v = (order(t) for t in x) if x[1] is not x[0] else [order(x[0])] * 3
        return order(module(q, k, v, attn_mask=mask)[0])

    def describe(module, x, mask):
        if module.in_proj_weight is not None:
            w = module.in_proj_weight.split(EMBED)
        else:
            w = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        b = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.split(EMBED)
        return Attention(x, w, b, module.out_proj, _forbid(mask))

    return Host(
        lambda: nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, **kwargs),
        call,
        describe,
        cross="kdim" in kwargs,
        key_dim=kwargs.get("kdim", EMBED),
        value_dim=kwargs.get("vdim", EMBED),
    )


def _mmcv_multihead() -> Host:
    def build():
        from mmcv.cnn.bricks.transformer import MultiheadAttention

        # mmcv writes the rate of a model with the argument ``dropout`` into the default of all models.
        return MultiheadAttention(EMBED, HEADS, batch_first=True, dropout_layer=dict(type="Dropout", drop_prob=0.0))

    def describe(module, x, mask):
        inner = module.attn
        return Attention(
            x, inner.in_proj_weight.split(EMBED), inner.in_proj_bias.split(EMBED), inner.out_proj, _forbid(mask)
        )

    # mmcv adds the query to the output.
    return Host(build, lambda m, x, mask: m(*x, attn_mask=mask) - x[0], describe, needs="mmcv")


def _timm(fused: bool, **kwargs) -> Host:
    def build():
        from timm.models.vision_transformer import Attention as TimmAttention

        module = TimmAttention(EMBED, HEADS, **kwargs)
        module.fused_attn = fused
        return module

    def call(module, x, mask):
        return module(x[0], attn_mask=None if mask is None else ~mask)

    def describe(module, x, mask):
        b = (None,) * 3 if module.qkv.bias is None else module.qkv.bias.split(EMBED)
        return Attention(x, module.qkv.weight.split(EMBED), b, module.proj, _forbid(mask))

    return Host(build, call, describe, needs="timm")


def relative_position_bias(table: Tensor, size: tuple[int, int]) -> Tensor:
    """Bias of each pair of tokens of a window, looked up by the difference of their coordinates, (heads, N, N)."""
    height, width = size
    coordinates = [(r, c) for r in range(height) for c in range(width)]
    index = [
        [(r1 - r2 + height - 1) * (2 * width - 1) + c1 - c2 + width - 1 for r2, c2 in coordinates]
        for r1, c1 in coordinates
    ]
    return table[torch.tensor(index)].permute(2, 0, 1)


def _window(toolbox: str) -> Host:
    size = (3, 4)

    def build():
        module = __import__(f"{toolbox}.models.backbones.swin", fromlist=["WindowMSA"]).WindowMSA(EMBED, HEADS, size)
        nn.init.normal_(module.relative_position_bias_table)
        return module

    def call(module, x, mask):
        # The module expects one mask per window; all windows of an image have the same mask here.
        return module(x[0], mask=None if mask is None else _forbid(mask)[0, :1])

    def describe(module, x, mask):
        bias = relative_position_bias(module.relative_position_bias_table, size) + _forbid(mask)
        return Attention(x, module.qkv.weight.split(EMBED), module.qkv.bias.split(EMBED), module.proj, bias)

    return Host(build, call, describe, needs=toolbox)


def _with_bias(module: nn.Module, name: str, mask: Tensor | None, run: Callable[[], Tensor]) -> Tensor:
    """Call ``run()`` with a mask added to the bias that the method ``name`` returns, for a module without masks."""
    method = getattr(module, name)
    setattr(module, name, lambda: method() + _forbid(mask))
    try:
        return run()
    finally:
        delattr(module, name)


def _torchvision_window(cls: str) -> Host:
    size = [3, 4]

    def build():
        module = getattr(importlib.import_module("torchvision.models.swin_transformer"), cls)
        return module(EMBED, size, [0, 0], HEADS).to(torch.get_default_dtype())

    def call(module, x, mask):
        def run():
            return module(x[0].unflatten(1, size)).flatten(1, 2)

        return _with_bias(module, "get_relative_position_bias", mask, run)

    def describe(module, x, mask):
        q, k, v = module.qkv.bias.split(EMBED)
        w = module.qkv.weight.split(EMBED)
        if cls == "ShiftedWindowAttention":
            bias = relative_position_bias(module.relative_position_bias_table, size)
            return Attention(x, w, (q, k, v), module.proj, bias + _forbid(mask))

        def cosine(q, k, h):
            norms = q.square().sum(-1, keepdim=True).sqrt() * k.square().sum(-1).sqrt()[..., None, :]
            return q @ k.transpose(-2, -1) / norms * module.logit_scale[h].clamp(max=math.log(100.0)).exp()

        table = module.cpb_mlp(module.relative_coords_table).flatten(0, -2)
        bias = 16 * relative_position_bias(table, size).sigmoid()
        return Attention(x, w, (q, 0 * k, v), module.proj, bias + _forbid(mask), cosine)

    return Host(build, call, describe, needs="torchvision")


def _torchvision_maxvit() -> Host:
    def build():
        from torchvision.models.maxvit import RelativePositionalMultiHeadAttention

        return RelativePositionalMultiHeadAttention(EMBED, EMBED // HEADS, 9)

    def call(module, x, mask):
        return _with_bias(module, "get_relative_positional_bias", mask, lambda: module(x[0][:, None])[:, 0])

    def describe(module, x, mask):
        bias = relative_position_bias(module.relative_position_bias_table, (3, 3)) + _forbid(mask)
        w, b = module.to_qkv.weight.split(EMBED), module.to_qkv.bias.split(EMBED)
        return Attention(x, w, b, module.merge, bias, lambda q, k, h: q @ k.transpose(-2, -1) / EMBED**0.5)

    return Host(build, call, describe, needs="torchvision", tokens=9)


HOSTS = {
    "torch": _multihead(),
    "torch-sequence-first": _multihead(batch_first=False),
    "torch-cross": _multihead(kdim=20, vdim=28),
    "torch-no-bias": _multihead(bias=False),
    "mmcv": _mmcv_multihead(),
    "mmdet-window": _window("mmdet"),
    "mmseg-window": _window("mmseg"),
    "timm-fused": _timm(fused=True, qkv_bias=True),
    "timm-eager": _timm(fused=False),
    "torchvision-window": _torchvision_window("ShiftedWindowAttention"),
    "torchvision-window-v2": _torchvision_window("ShiftedWindowAttentionV2"),
    "torchvision-maxvit": _torchvision_maxvit(),
}
