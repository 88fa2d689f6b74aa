"""Numerical kernels: each has a plain reference implementation, and fast paths beside it."""
