"""Hooks of mmengine, one file a hook."""
