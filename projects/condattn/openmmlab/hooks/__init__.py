"""Hooks for mmengine's runner, one per file."""
