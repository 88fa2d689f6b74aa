"""Check the data of a configuration before training or evaluation: what is used, what is left out, what is wrong."""

from .check import check_data

__all__ = ["check_data"]
