"""mmcv's operators that sample maps, in regions or at offsets, compared with their definitions."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmcv.ops")

import mmcv.ops
import mmcv_definitions as definitions
from mmcv.ops import deform_conv2d, modulated_deform_conv2d
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from mmcv_cases import IMAGES, ROIS, compare, rotated, use

from condattn.openmmlab import mmcv_ops as ours


@pytest.fixture(autouse=True)
def use_ours(monkeypatch):
    """Use condattn's operators, also where mmcv is compiled."""
    use(ours, monkeypatch)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "old"])
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("mode", ["avg", "max"])
def test_roi_align(mode, ratio, aligned):
    settings = ((3, 2), 0.5, ratio, mode, aligned)
    rois = ROIS.double()
    compare(
        lambda x: mmcv.ops.roi_align(x, rois, *settings),
        lambda x: definitions.roi_align(x, rois, *settings),
        torch.randn(IMAGES, dtype=torch.float64),
    )


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (7, 7)])
def test_roi_pool(size):
    rois = torch.cat([ROIS, torch.tensor([[0, 9, 9, 2, 2], [1, 40, 40, 60, 60], [1, -60, -60, -40, -40]])]).double()
    compare(
        lambda x: mmcv.ops.roi_pool(x, rois, size, 0.5),
        lambda x: definitions.roi_pool(x, rois, size, 0.5),
        torch.randn(IMAGES, dtype=torch.float64),
    )


def test_roi_pool_of_regions_that_are_not_finite():
    rois = torch.tensor([[0, 0, 0, torch.inf, 5], [0, torch.nan, 0, 4, 5]])
    assert not mmcv.ops.roi_pool(torch.ones(IMAGES), rois, (2, 2), 1.0).any()


@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("shifted", [True, False])
def test_deformable_roi_pooling(ratio, shifted):
    rois = ROIS.double()
    image, offset = torch.randn(IMAGES, dtype=torch.float64), torch.randn(len(ROIS), 2, 3, 2, dtype=torch.float64)
    settings = ((3, 2), 0.5, ratio, 0.3)
    if shifted:
        compare(
            lambda x, o: mmcv.ops.deform_roi_pool(x, rois, o, *settings),
            lambda x, o: definitions.deform_roi_pool(x, rois, o, *settings),
            *(image, offset),
        )
    else:  # RoIAlign
        got = mmcv.ops.deform_roi_pool(image, rois, None, *settings)
        torch.testing.assert_close(got, mmcv.ops.roi_align(image, rois, (3, 2), 0.5, ratio, "avg", True))
    for layer in (mmcv.ops.DeformRoIPoolPack, mmcv.ops.ModulatedDeformRoIPoolPack):
        pooled = layer((3, 2), 3, sampling_ratio=ratio)(image.float(), ROIS)
        assert pooled.shape == (len(ROIS), 3, 3, 2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e9])
def test_offsets_that_are_not_finite(value):
    """A sample at such a position is 0, forward and backward; torchvision would read memory there."""
    image, weight = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    offset, mask = torch.zeros(1, 18, 4, 4), torch.ones(1, 9, 4, 4)
    offset[0, 8] = value  # of the element in the middle of the kernel
    without = weight.clone()
    without[:, :, 1, 1] = 0
    for function in (
        lambda x, o, w: deform_conv2d(x, o, w, 1, 1),
        lambda x, o, w: modulated_deform_conv2d(x, o, mask, w, torch.zeros(3), 1, 1),
    ):
        leaves = [tensor.clone().requires_grad_() for tensor in (image, offset, weight)]
        output = function(*leaves)
        torch.testing.assert_close(output, F.conv2d(image, without, padding=1), rtol=1e-4, atol=1e-5)
        output.sum().backward()
        assert all(leaf.grad.isfinite().all() for leaf in leaves) and not leaves[1].grad[0, 8].any()


def test_images_with_other_channels_than_the_weight():
    image, offset, weight = torch.randn(1, 8, 6, 6), torch.zeros(1, 18, 6, 6), torch.randn(4, 4, 3, 3)
    for function in (
        lambda: deform_conv2d(image, offset, weight, 1, 1),
        lambda: modulated_deform_conv2d(image, offset, torch.ones(1, 9, 6, 6), weight, torch.zeros(4), 1, 1),
    ):
        with pytest.raises(RuntimeError, match="expected 4 input channels, got 8"):
            function()


def test_roi_align_in_an_exported_graph():
    layer, image = mmcv.ops.RoIAlign((2, 2), 0.5, 2), torch.randn(IMAGES)
    program = torch.export.export(layer, (image, ROIS), strict=False)
    torch.testing.assert_close(program.module()(image, ROIS), layer(image, ROIS))


@pytest.mark.parametrize(
    "groups, deform_groups, stride, padding, dilation", [(1, 1, 1, 1, 1), (2, 1, 2, 1, 1), (1, 2, 1, 2, 2)]
)
@pytest.mark.parametrize("zero", [False, True], ids=["offsets", "none"])
def test_deformable_convolutions(groups, deform_groups, stride, padding, dilation, zero):
    image, weight = torch.randn(2, 4, 5, 6).double(), torch.randn(4, 4 // groups, 3, 2).double()
    shape = F.conv2d(image, weight, None, stride, padding, dilation, groups).shape[2:]
    offset = torch.randn(2, 2 * deform_groups * 6, *shape).double() * 2
    mask, bias = torch.rand(2, deform_groups * 6, *shape).double(), torch.randn(4).double()
    settings = dict(stride=stride, padding=padding, dilation=dilation, groups=groups, deform_groups=deform_groups)
    positional = tuple(settings.values())
    if (
        zero
    ):  # the ordinary convolution; gradients at zero offsets are a convention, which another test compares with mmcv
        offset = torch.zeros_like(offset)
        want = F.conv2d(image, weight, bias, stride, padding, dilation, groups)
        torch.testing.assert_close(deform_conv2d(image, offset, weight, *positional) + bias[:, None, None], want)
        ones = torch.ones_like(mask)
        torch.testing.assert_close(modulated_deform_conv2d(image, offset, ones, weight, bias, *positional), want)
        return
    compare(
        lambda x, o, w: deform_conv2d(x, o, w, *positional),
        lambda x, o, w: definitions.deformable_convolution(x, o, w, **settings),
        *(image, offset, weight),
    )
    compare(
        lambda x, o, m, w, b: modulated_deform_conv2d(x, o, m, w, b, *positional),
        lambda x, o, m, w, b: definitions.deformable_convolution(x, o, w, b, m, **settings),
        *(image, offset, mask, weight, bias),
    )


def test_offsets_of_a_larger_map():
    """mmcv's operator reads as many values of each image as the output has positions; mmdet's DyHead relies on it."""
    image, weight = torch.randn(2, 4, 3, 2).double(), torch.randn(4, 4, 3, 3).double()
    offset, mask, bias = torch.randn(2, 18, 6, 4).double(), torch.rand(2, 9, 6, 4).double(), torch.randn(4).double()

    def expected(x, o, m, w, b):
        o, m = (part.reshape(2, -1)[:, : part.shape[1] * 6].reshape(2, -1, 3, 2) for part in (o, m))
        return definitions.deformable_convolution(x, o, w, b, m, 1, 1, 1, 1, 1)

    compare(
        lambda x, o, m, w, b: modulated_deform_conv2d(x, o, m, w, b, 1, 1),
        expected,
        *(image, offset, mask, weight, bias),
    )
    with pytest.raises(RuntimeError, match="offset"):
        modulated_deform_conv2d(image, offset[..., :2, :2], mask[..., :2, :2], weight, bias, 1, 1)


def test_offsets_have_no_gradient_where_samples_leave_the_image():
    """One pixel outside the image, where modules with zero offsets start, the gradient is zero, as in mmcv."""
    image, weight = torch.ones(1, 1, 3, 3).double(), torch.ones(1, 1, 3, 3).double()
    offset = torch.zeros(1, 18, 3, 3, dtype=torch.float64, requires_grad=True)
    deform_conv2d(image, offset, weight, 1, 1).sum().backward()
    upper_row = offset.grad.view(3, 3, 2, 3, 3)[0, :, :, 0]  # samples of the first output row, at y = -1
    assert (upper_row == 0).all()


def test_deformable_attention():
    sizes = torch.tensor([[4, 5], [2, 3]])
    value, weights = torch.randn(2, 26, 2, 3).double(), torch.rand(2, 4, 2, 2, 3).double()
    locations = torch.rand(2, 4, 2, 2, 3, 2).double() * 1.4 - 0.2
    start = torch.tensor([0, 20])
    compare(
        lambda v, x, w: MultiScaleDeformableAttnFunction.apply(v, sizes, start, x, w, 64),
        lambda v, x, w: definitions.deformable_attention(v, sizes.tolist(), x, w),
        *(value, locations, weights),
    )
    python = mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch(value, sizes, locations, weights)
    got = MultiScaleDeformableAttnFunction.apply(value, sizes, start, locations, weights, 64)
    torch.testing.assert_close(got, python)


def test_no_regions():
    x, none = torch.randn(IMAGES, requires_grad=True), torch.zeros(0, 5)
    for mode in ("avg", "max"):
        output = mmcv.ops.roi_align(x, none, (3, 3), 1.0, 0, mode, True)
        assert output.shape == (0, 3, 3, 3)
        output.sum().backward()
    output = mmcv.ops.roi_pool(x, none, (3, 3), 1.0)
    assert output.shape == (0, 3, 3, 3)
    output.sum().backward()
    assert (x.grad == 0).all()
    assert mmcv.ops.nms_match(torch.zeros(0, 5), 0.5) == []
    assert mmcv.ops.box_iou_rotated(torch.zeros(0, 5), rotated(3)).shape == (0, 3)
