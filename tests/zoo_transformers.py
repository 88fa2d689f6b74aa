"""Hugging Face models, small, and their inputs."""

import functools

import torch
import transformers

WIDTHS = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
IMAGE, LARGER = (
    dict(pixel_values=torch.linspace(-9, 9, 2 * 3 * n * n, dtype=torch.float64).sin().reshape(2, 3, n, n))
    for n in (32, 96)
)
TEXT = dict(input_ids=torch.arange(14).reshape(2, 7), attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))
STAGES = dict(depths=[2, 2], num_heads=[2, 3], embed_dim=12, window_size=4)

# Name -> class of the configuration, settings, class of the model, inputs.
MODELS = {
    "ViT": ("ViTConfig", dict(WIDTHS, image_size=32, patch_size=8), "ViTModel", IMAGE),
    "DeiT": ("DeiTConfig", dict(WIDTHS, image_size=32, patch_size=8), "DeiTModel", IMAGE),
    "DINOv2": ("Dinov2Config", dict(WIDTHS, image_size=32, patch_size=8), "Dinov2Model", IMAGE),
    "DINOv3": ("DINOv3ViTConfig", dict(WIDTHS, image_size=32, patch_size=8), "DINOv3ViTModel", IMAGE),
    "Swin": ("SwinConfig", dict(STAGES, image_size=32, patch_size=2), "SwinModel", IMAGE),
    "SegFormer": (
        "SegformerConfig",
        dict(depths=[1] * 4, hidden_sizes=[12, 24, 24, 24], num_attention_heads=[1, 2, 3, 3]),
        "SegformerModel",
        LARGER,
    ),
    "DETR": (
        "DetrConfig",
        dict(
            d_model=24,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=3,
            decoder_attention_heads=3,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_queries=5,
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=dict(model_type="resnet", depths=[1] * 4, hidden_sizes=[8] * 4, out_features=["stage4"]),
        ),
        "DetrModel",
        LARGER,
    ),
    "BERT": ("BertConfig", dict(WIDTHS, vocab_size=20), "BertModel", TEXT),
    "GPT-2": ("GPT2Config", dict(n_embd=24, n_layer=2, n_head=3, vocab_size=20), "GPT2Model", TEXT),
    "GPT-2 with cross attention": (
        "GPT2Config",
        dict(n_embd=24, n_layer=2, n_head=3, vocab_size=20, add_cross_attention=True),
        "GPT2Model",
        dict(TEXT, encoder_hidden_states=torch.linspace(-1, 1, 2 * 4 * 24, dtype=torch.float64).reshape(2, 4, 24)),
    ),
    "Llama": (
        "LlamaConfig",
        dict(WIDTHS, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=20),
        "LlamaModel",
        TEXT,
    ),
}


def build(name: str, implementation: str = "eager"):
    """A model and how to run it."""
    config, settings, model, inputs = MODELS[name]
    config = getattr(transformers, config)(**settings, attn_implementation=implementation)
    return getattr(transformers, model)(config), functools.partial(run, inputs=inputs)


def run(model, inputs):
    return model(**inputs).last_hidden_state
