"""Small models of torchvision with attention."""

import functools

import torch
from torchvision.models.maxvit import MaxVit
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2
from torchvision.models.vision_transformer import VisionTransformer

SWIN = dict(patch_size=[4, 4], embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=[4, 4])

# Name -> model, and height and width of its images; for Swin, a size at which windows are padded.
MODELS = {
    "Swin": (lambda: SwinTransformer(**SWIN), 44),
    "Swin v2": (lambda: SwinTransformer(**SWIN, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 44),
    "MaxViT": (lambda: MaxVit((64, 64), 8, 4, [16, 32], [1, 1], 8, 0.0), 64),
    "ViT": (lambda: VisionTransformer(32, 16, 2, 3, 24, 48), 32),
}


def build(name: str):
    """Build a model, and a function that runs it."""
    make, side = MODELS[name]
    return make(), functools.partial(run, image=torch.randn(2, 3, side, side, dtype=torch.float64))


def run(model, image):
    return model(image)
