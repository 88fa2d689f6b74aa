"""UPerNet, Swin-T, spectral correction, ADE20K 160k, 512 x 512.

Reference: that of upernet_swin_pc.py, with the same settings otherwise.
"""

_base_ = "./upernet_swin_pc.py"
model = dict(backbone=dict(conditioning="sc"))
