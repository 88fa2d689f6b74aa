"""A small transformer of PyTorch with six attention sites, and its output on fixed inputs."""

import torch
from torch import nn


def transformer():
    torch.manual_seed(0)
    return nn.Transformer(16, 4, 2, 2, 32, dropout=0.0, batch_first=True).eval()


def output(model, dtype=torch.float32):
    torch.manual_seed(1)
    return model(torch.randn(2, 5, 16, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype))


SITES = [
    "encoder.layers.0.self_attn",
    "encoder.layers.1.self_attn",
    "decoder.layers.0.self_attn",
    "decoder.layers.0.multihead_attn",
    "decoder.layers.1.self_attn",
    "decoder.layers.1.multihead_attn",
]
