"""UPerNet, Swin-T, spectral correction, ADE20K 160k, 512 x 512.

Reference: that of upernet_swin_pc.py, which it follows in all else.
"""

_base_ = "./upernet_swin_pc.py"
model = dict(backbone=dict(conditioning="sc"))
