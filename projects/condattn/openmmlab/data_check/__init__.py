"""Read the data of a configuration before anything is trained or evaluated with it: what is used, lost, or wrong."""

from .check import check_data

__all__ = ["check_data"]
