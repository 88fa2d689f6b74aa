"""Mask R-CNN, Swin-B, preconditioned attention, with parameters, gradients and optimizer state sharded over the GPUs.

The training of mask_rcnn_swin-b_pc_3x.py, but in bfloat16, which needs no scaling of the loss.
"""

_base_ = "./mask_rcnn_swin-b_pc_3x.py"
runner_type = "FlexibleRunner"
strategy = dict(type="FSDP2Strategy")
optim_wrapper = dict(dtype="bfloat16", loss_scale=dict(enabled=False))
