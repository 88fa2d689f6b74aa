"""Rules for Hugging Face transformers, for every attention implementation (eager, sdpa, flash).

Its classes follow two conventions, see :func:`_conventional`. Version 5 moves some classes from the first convention
to the second under the same name.
"""

from typing import Any

from ..builders import halves, into, thirds, whole
from ..rules import register_exception, register_rule
from .common import fused


def _conventional(module: Any) -> dict[str, Any]:
    """Describe attention that follows one of two conventions.

    First convention: ``query``, ``key`` and ``value`` are in an inner module, and ``output.dense`` is beside it. Second
    convention: one module has four layers called ``*_proj``. The number of heads of each projection follows from the
    head size, because there may be fewer heads of keys and values than of queries (grouped-query attention).
    """
    if hasattr(module, "q_proj"):
        layers, size = (module.q_proj, module.k_proj, module.v_proj), module.head_dim
        output = module.o_proj if hasattr(module, "o_proj") else module.out_proj
    else:
        inner = module.attention if hasattr(module, "attention") else module.self
        layers, size = (inner.query, inner.key, inner.value), inner.attention_head_size
        output = module.output.dense
    q, k, v = (whole(layer, num_heads=layer.out_features // size) for layer in layers)
    return dict(num_heads=layers[0].out_features // size, q=q, k=k, v=v, out=into(output))


for name in (
    *("beit.modeling_beit.BeitAttention", "deit.modeling_deit.DeiTAttention", "vit.modeling_vit.ViTAttention"),
    *("dinov2.modeling_dinov2.Dinov2Attention", "dinov3_vit.modeling_dinov3_vit.DINOv3ViTAttention"),
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersAttention",
    "vitpose_backbone.modeling_vitpose_backbone.VitPoseBackboneAttention",
    *("vit_mae.modeling_vit_mae.ViTMAEAttention", "yolos.modeling_yolos.YolosAttention"),
    "segformer.modeling_segformer.SegformerAttention",
    *("swin.modeling_swin.SwinAttention", "swinv2.modeling_swinv2.Swinv2Attention"),
    "maskformer.modeling_maskformer_swin.MaskFormerSwinAttention",
    *("clip.modeling_clip.CLIPAttention", "siglip.modeling_siglip.SiglipAttention"),
    *(f"detr.modeling_detr.Detr{kind}Attention" for kind in ("", "Self", "Cross")),
    *("bert.modeling_bert.BertAttention", "roberta.modeling_roberta.RobertaAttention"),
    *("llama.modeling_llama.LlamaAttention", "mistral.modeling_mistral.MistralAttention"),
    "qwen2.modeling_qwen2.Qwen2Attention",
    # Its head outputs are the attention by landmarks and, added to it, a depthwise convolution of the values. The sum
    # is what reaches the output projection, and what preconditioned attention normalises.
    "nystromformer.modeling_nystromformer.NystromformerAttention",
):
    register_rule(f"transformers.models.{name}", _conventional)

for name in ("hiera.modeling_hiera.HieraMaskUnitAttention", "vitdet.modeling_vitdet.VitDetAttention"):
    register_rule(f"transformers.models.{name}", fused)


def _pvt(module: Any) -> dict[str, Any]:
    q, k, v = (whole(layer) for layer in (module.query, module.key, module.value))
    return dict(num_heads=module.num_attention_heads, q=q, k=k, v=v, out=into(module.proj))


register_rule("transformers.models.pvt_v2.modeling_pvt_v2.PvtV2SelfAttention", _pvt)


def _gpt2(module: Any) -> dict[str, Any]:
    if module.is_cross_attention:
        projections = dict(q=whole(module.q_attn), **halves(module.c_attn, "k", "v"))
    else:
        projections = thirds(module.c_attn)
    return dict(num_heads=module.num_heads, out=into(module.c_proj), **projections)


register_rule("transformers.models.gpt2.modeling_gpt2.GPT2Attention", _gpt2)
register_exception(
    "transformers.models.detr.modeling_detr.DetrMHAttentionMap", "it makes a map of attention, without values"
)
