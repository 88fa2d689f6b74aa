"""mmcv's operators on PyTorch and torchvision, for an mmcv that was installed without compiled operators.

``mmcv.ops`` calls functions of the compiled extension ``mmcv._ext``. The functions below have the same names and
arguments, and write their results into the buffers that the caller passes. The distribution in ``projects/mmcv_ext``
installs a module ``mmcv._ext`` that re-exports this package. Where a compiled extension is installed, Python imports
that instead.

The operators run on CPUs and on CUDA devices, and compute in single precision where the inputs are in half precision.
"""

from collections.abc import Callable

import torch
import torchvision

from .attention import ms_deform_attn_backward, ms_deform_attn_forward
from .batch_norm import (
    sync_bn_backward_data,
    sync_bn_backward_param,
    sync_bn_forward_mean,
    sync_bn_forward_output,
    sync_bn_forward_var,
)
from .convolutions import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    masked_col2im_forward,
    masked_im2col_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from .deformable_roi import deform_roi_pool_backward, deform_roi_pool_forward
from .focal_losses import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from .reassembly import (
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
    psamask_backward,
    psamask_forward,
)
from .roi import roi_align_backward, roi_align_forward, roi_pool_backward, roi_pool_forward
from .suppression import bbox_overlaps, box_iou_rotated, line_nms_forward, nms, nms_match, nms_rotated, softnms

__all__ = [
    "bbox_overlaps",
    "box_iou_rotated",
    "carafe_backward",
    "carafe_forward",
    "carafe_naive_backward",
    "carafe_naive_forward",
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "deform_roi_pool_backward",
    "deform_roi_pool_forward",
    "get_compiler_version",
    "get_compiling_cuda_version",
    "line_nms_forward",
    "masked_col2im_forward",
    "masked_im2col_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "nms",
    "nms_match",
    "nms_rotated",
    "psamask_backward",
    "psamask_forward",
    "roi_align_backward",
    "roi_align_forward",
    "roi_pool_backward",
    "roi_pool_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
    "softmax_focal_loss_backward",
    "softmax_focal_loss_forward",
    "softnms",
    "sync_bn_backward_data",
    "sync_bn_backward_param",
    "sync_bn_forward_mean",
    "sync_bn_forward_output",
    "sync_bn_forward_var",
]


def get_compiler_version() -> str:
    """Return the text that environment reports print as mmcv's compiler."""
    return f"not compiled: condattn's operators on torchvision {torchvision.__version__}"


def get_compiling_cuda_version() -> str:
    """Return the text that environment reports print as the CUDA version of mmcv's operators."""
    return f"not compiled: torch's ({torch.version.cuda or 'built without CUDA'})"


def __getattr__(name: str) -> Callable:
    """Return a placeholder for the operator ``name``, which this package lacks; it raises an error when it is called.

    An error at the lookup would be too early: ``mmcv.ops`` looks up the operators of all its modules on import.
    """
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def missing(*args, **kwargs):
        raise RuntimeError(
            f"mmcv's operator {name} needs mmcv's compiled operators, and this environment has condattn's in their "
            "place, which lack it; compile mmcv with requirements/operators.sh in condattn's repository"
        )

    missing.__name__ = missing.__qualname__ = name
    return missing
