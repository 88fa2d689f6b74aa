"""Small Hugging Face models and their inputs."""

import functools

import torch
import transformers

WIDTHS = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48)
IMAGE, LARGER = (
    dict(pixel_values=torch.linspace(-9, 9, 2 * 3 * n * n, dtype=torch.float64).sin().reshape(2, 3, n, n))
    for n in (32, 96)
)
TEXT = dict(input_ids=torch.arange(14).reshape(2, 7), attention_mask=torch.tensor([[1] * 7, [1] * 5 + [0] * 2]))
WORDS = dict(input_ids=torch.arange(16).reshape(2, 8), attention_mask=torch.tensor([[1] * 8, [1] * 5 + [0] * 3]))
if transformers.__version__ >= "5":  # its Nystromformer adds a mask of tokens x tokens to scores of landmarks x tokens
    del WORDS["attention_mask"]
PATCHES = dict(WIDTHS, image_size=32, patch_size=8)
STAGES = dict(depths=[2, 2], num_heads=[2, 3], embed_dim=12, window_size=4, image_size=32, patch_size=2)
GROUPED = dict(WIDTHS, num_attention_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=20)

# Name -> class of the configuration, settings, class of the model, inputs.
MODELS = {
    "ViT": ("ViTConfig", PATCHES, "ViTModel", IMAGE),
    "ViTMAE": ("ViTMAEConfig", dict(PATCHES, mask_ratio=0.0), "ViTMAEModel", dict(IMAGE, noise=torch.rand(2, 16))),
    "ViTPose": (
        "VitPoseBackboneConfig",
        dict(WIDTHS, image_size=[32, 32], patch_size=[8, 8], out_indices=[1, 2]),
        "VitPoseBackbone",
        IMAGE,
    ),
    "ViTDet": (
        "VitDetConfig",
        dict(WIDTHS, image_size=32, patch_size=8, use_relative_position_embeddings=True, window_block_indices=[0]),
        "VitDetModel",
        IMAGE,
    ),
    "YOLOS": ("YolosConfig", dict(PATCHES, image_size=[32, 32], num_detection_tokens=3), "YolosModel", IMAGE),
    "DeiT": ("DeiTConfig", PATCHES, "DeiTModel", IMAGE),
    "BEiT": ("BeitConfig", dict(PATCHES, use_relative_position_bias=True), "BeitModel", IMAGE),
    "DINOv2": ("Dinov2Config", PATCHES, "Dinov2Model", IMAGE),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", PATCHES, "Dinov2WithRegistersModel", IMAGE),
    "DINOv3": ("DINOv3ViTConfig", PATCHES, "DINOv3ViTModel", IMAGE),
    "CLIP": ("CLIPVisionConfig", PATCHES, "CLIPVisionModel", IMAGE),
    "SigLIP": ("SiglipVisionConfig", dict(PATCHES, vision_use_head=False), "SiglipVisionModel", IMAGE),
    "Swin": ("SwinConfig", STAGES, "SwinModel", IMAGE),
    "Swin v2": ("Swinv2Config", STAGES, "Swinv2Model", IMAGE),
    "MaskFormer Swin": ("MaskFormerSwinConfig", STAGES, "MaskFormerSwinModel", IMAGE),
    "Hiera": (
        "HieraConfig",
        dict(embed_dim=12, image_size=[96, 96], depths=[1, 1, 1], num_heads=[1, 2, 3], num_query_pool=2),
        "HieraModel",
        LARGER,
    ),
    "PVT v2": (
        "PvtV2Config",
        dict(hidden_sizes=[12, 24, 36, 48], depths=[1] * 4, num_attention_heads=[1, 2, 3, 4], image_size=64),
        "PvtV2Model",
        LARGER,
    ),
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
    "RoBERTa": ("RobertaConfig", dict(WIDTHS, vocab_size=20), "RobertaModel", TEXT),
    "Nystromformer": (
        "NystromformerConfig",
        dict(WIDTHS, vocab_size=20, segment_means_seq_len=8, num_landmarks=4, conv_kernel_size=3),
        "NystromformerModel",
        WORDS,
    ),
    "GPT-2": ("GPT2Config", dict(n_embd=24, n_layer=2, n_head=3, vocab_size=20), "GPT2Model", TEXT),
    "GPT-2 with cross attention": (
        "GPT2Config",
        dict(n_embd=24, n_layer=2, n_head=3, vocab_size=20, add_cross_attention=True),
        "GPT2Model",
        dict(TEXT, encoder_hidden_states=torch.linspace(-1, 1, 2 * 4 * 24, dtype=torch.float64).reshape(2, 4, 24)),
    ),
    "Llama": ("LlamaConfig", GROUPED, "LlamaModel", TEXT),
    "Mistral": ("MistralConfig", GROUPED, "MistralModel", TEXT),
    "Qwen2": ("Qwen2Config", GROUPED, "Qwen2Model", TEXT),
}

LEFT_OUT = [name for name, entry in MODELS.items() if not hasattr(transformers, entry[2])]
"""Models that older versions do not have."""
MODELS = {name: entry for name, entry in MODELS.items() if name not in LEFT_OUT}


def build(name: str, implementation: str = "eager"):
    """Build a model, and a function that runs it."""
    config, settings, model, inputs = MODELS[name]
    config = getattr(transformers, config)(**settings, attn_implementation=implementation)
    return getattr(transformers, model)(config), functools.partial(run, inputs=inputs)


def run(model, inputs):
    inputs = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
    outputs = model(**inputs)
    return outputs.feature_maps[-1] if "feature_maps" in outputs else outputs.last_hidden_state
