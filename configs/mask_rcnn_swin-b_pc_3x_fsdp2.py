"""Mask R-CNN, Swin-B, preconditioned attention, with parameters, gradients and optimizer state sharded over the GPUs.

The training is that of mask_rcnn_swin-b_pc_3x.py, in less memory.
"""

_base_ = "./mask_rcnn_swin-b_pc_3x.py"
runner_type = "FlexibleRunner"
strategy = dict(type="FSDP2Strategy")
