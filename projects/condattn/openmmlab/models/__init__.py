"""Conditioned backbones and models that are registered with OpenMMLab."""
