"""Where embedded tokens enter the first block of the libraries' models: after positions, class token and dropout."""

from typing import Any

from ..tokens import register_token_rule

CAUSAL = "each token sees only those before it, and the correction mixes all of them"


def _first_of_stages(module: Any) -> dict[str, Any]:
    return dict(module=module.stages[0].blocks[0])


for name in (
    *("mmdet.models.backbones.swin.SwinTransformer", "mmseg.models.backbones.swin.SwinTransformer"),
    *(
        "mmpretrain.models.backbones.swin_transformer.SwinTransformer",
        "mmpretrain.models.backbones.swin_transformer_v2.SwinTransformerV2",
    ),
    "mmpretrain.models.backbones.davit.DaViT",
):
    register_token_rule(name, _first_of_stages)

for name in (
    *("mmseg.models.backbones.vit.VisionTransformer", "mmseg.models.backbones.beit.BEiT"),
    *(
        "mmpretrain.models.backbones.vision_transformer.VisionTransformer",
        "mmpretrain.models.backbones.beit.BEiTViT",
    ),
):
    register_token_rule(name, lambda m: dict(module=m.layers[0]))
register_token_rule("mmpretrain.models.backbones.xcit.XCiT", lambda m: dict(module=m.xca_layers[0]))

for name in ("xcit.Xcit", "beit.Beit"):
    register_token_rule(f"timm.models.{name}", lambda m: dict(module=m.blocks[0]))
for name in ("vision_transformer.VisionTransformer", "deit.VisionTransformerDistilled", "eva.Eva"):
    register_token_rule(f"timm.models.{name}", lambda m: dict(module=m.blocks[0], mask="attn_mask"))
for name in ("swin_transformer.SwinTransformer", "swin_transformer_v2.SwinTransformerV2"):
    register_token_rule(f"timm.models.{name}", lambda m: dict(module=m.layers[0].blocks[0], layout="channels_last"))
register_token_rule("timm.models.davit.DaVit", lambda m: _first_of_stages(m) | dict(layout="channels_first"))


def _encoder(module: Any) -> dict[str, Any]:
    """BERT and its relatives, which are causal as decoders.

    In Nystromformer padding takes part in the means that are its landmarks, whatever is done here; it takes no part in
    the correction.
    """
    obstacle = CAUSAL if getattr(module.config, "is_decoder", False) else ""
    return dict(module=module.encoder.layer[0], mask="attention_mask", obstacle=obstacle)


for name in (
    *("bert.modeling_bert.BertModel", "roberta.modeling_roberta.RobertaModel"),
    "nystromformer.modeling_nystromformer.NystromformerModel",
):
    register_token_rule(f"transformers.models.{name}", _encoder)


def _vit(module: Any) -> dict[str, Any]:
    """ViT and its relatives, whose layers are in an encoder up to version 4."""
    return dict(module=module.encoder.layer[0] if hasattr(module, "encoder") else module.layers[0])


for name in ("vit.modeling_vit.ViTModel", "deit.modeling_deit.DeiTModel"):
    register_token_rule(f"transformers.models.{name}", _vit)
register_token_rule("transformers.models.gpt2.modeling_gpt2.GPT2Model", lambda m: dict(module=m.h[0], obstacle=CAUSAL))
for name in (
    "llama.modeling_llama.LlamaModel",
    "mistral.modeling_mistral.MistralModel",
    "qwen2.modeling_qwen2.Qwen2Model",
):
    register_token_rule(f"transformers.models.{name}", lambda m: dict(module=m.layers[0], obstacle=CAUSAL))
