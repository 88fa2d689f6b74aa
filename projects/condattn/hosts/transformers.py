"""Hugging Face transformers: whichever attention implementation (eager, sdpa, flash) the model runs.

Many of its models have q, k and v in one module and the output projection in another; the site is the module that holds
both.
"""

from typing import Any

from torch import nn

from ..sites import into, register_exception, register_rule, split, thirds, whole


def _described(inner: nn.Module, output: nn.Module, num_heads: int, names: tuple[str, str, str]) -> dict[str, Any]:
    q, k, v = (whole(getattr(inner, name)) for name in names)
    return dict(num_heads=num_heads, q=q, k=k, v=v, out=into(output))


def _vit(module: nn.Module) -> dict[str, Any]:
    inner = module.attention
    return _described(inner, module.output.dense, inner.num_attention_heads, ("query", "key", "value"))


for name in (
    "vit.modeling_vit.ViTAttention",
    "deit.modeling_deit.DeiTAttention",
    "dinov2.modeling_dinov2.Dinov2Attention",
):
    register_rule(f"transformers.models.{name}", _vit)


def _bert(module: nn.Module) -> dict[str, Any]:
    inner = module.self
    return _described(inner, module.output.dense, inner.num_attention_heads, ("query", "key", "value"))


for name in ("bert.modeling_bert.BertAttention", "segformer.modeling_segformer.SegformerAttention"):
    register_rule(f"transformers.models.{name}", _bert)
register_rule("transformers.models.swin.modeling_swin.SwinAttention", _bert)


def _grouped(module: nn.Module) -> dict[str, Any]:
    groups = module.config.num_key_value_heads
    k, v = (whole(layer, num_heads=groups) for layer in (module.k_proj, module.v_proj))
    heads = module.config.num_attention_heads
    return dict(num_heads=heads, q=whole(module.q_proj), k=k, v=v, out=into(module.o_proj))


register_rule("transformers.models.llama.modeling_llama.LlamaAttention", _grouped)
register_rule(
    "transformers.models.dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention",
    lambda m: _described(m, m.o_proj, m.num_heads, ("q_proj", "k_proj", "v_proj")),
)
register_rule(
    "transformers.models.detr.modeling_detr.DetrAttention",
    lambda m: _described(m, m.out_proj, m.num_heads, ("q_proj", "k_proj", "v_proj")),
)


def _gpt2(module: nn.Module) -> dict[str, Any]:
    if module.is_cross_attention:
        half = module.c_attn.nf // 2
        projections = dict(q=whole(module.q_attn), **split(module.c_attn, k=half, v=half))
    else:
        projections = thirds(module.c_attn)
    return dict(num_heads=module.num_heads, out=into(module.c_proj), **projections)


register_rule("transformers.models.gpt2.modeling_gpt2.GPT2Attention", _gpt2)
register_exception(
    "transformers.models.detr.modeling_detr.DetrMHAttentionMap", "it makes a map of attention, without values"
)
