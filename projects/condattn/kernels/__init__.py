"""Numerical kernels: a plain reference of each, and fast paths beside it."""
