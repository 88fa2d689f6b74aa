"""A small Nystromformer on a small ListOps: training expressions train, validation expressions tune, test expressions
are reported.
"""

_base_ = "../../../projects/long_range_arena/configs/listops_small.py"
