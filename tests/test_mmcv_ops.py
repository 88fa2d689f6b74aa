"""mmcv's operators on PyTorch and torchvision, compared with their definitions; layouts, precisions and bad input."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmcv.ops")

import mmcv.ops
import mmcv_definitions as definitions
from mmcv.ops import deform_conv2d
from mmcv_cases import IMAGES, ROIS, boxes_and_scores, compare, rotated, use
from mmengine.registry import MODELS

from condattn.openmmlab import mmcv_ops as ours


@pytest.fixture(autouse=True)
def use_ours(monkeypatch):
    """Use condattn's operators, also where mmcv is compiled."""
    use(ours, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_synchronised_batch_norm(process, dtype):
    """In a single process it is ordinary batch normalisation."""
    theirs, plain = mmcv.ops.SyncBatchNorm(4), torch.nn.BatchNorm2d(4)
    plain.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 5, 2)
    leaves = [x.to(dtype).requires_grad_(), x.to(dtype).float().requires_grad_()]
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-2, atol=1e-2)
    results = [theirs(leaves[0]), plain(leaves[1])]
    torch.testing.assert_close(results[0].float(), results[1], **tolerance)
    direction = torch.randn_like(x)
    for result in results:
        result.backward(direction.to(result.dtype))
    torch.testing.assert_close(leaves[0].grad.float(), leaves[1].grad, **tolerance)
    for got, want in zip(theirs.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, **tolerance)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(theirs, name), getattr(plain, name), **tolerance)


@pytest.fixture
def process(tmp_path):
    """A process group of one process."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("weighted", [False, True], ids=["equal", "weighted"])
def test_focal_losses(weighted):
    logits = torch.randn(6, 4).double() * 3
    weight = torch.rand(4).double() if weighted else None
    target = torch.tensor([0, 3, 1, 2, 2, 0] if weighted else [0, 3, 1, 4, -1, 0])  # 4 and -1 are no class indices
    for reduce in ("none", "sum", "mean"):

        def reduced(loss, reduce=reduce):
            return loss if reduce == "none" else loss.sum() / (len(logits) if reduce == "mean" else 1)

        compare(
            lambda x, r=reduce: mmcv.ops.sigmoid_focal_loss(x, target, 1.5, 0.3, weight, r),
            lambda x, f=reduced: f(definitions.sigmoid_focal_loss(x, target, 1.5, 0.3, weight)),
            logits,
        )
    target = target.clamp(max=3)
    for reduce in ("sum", "mean"):
        number = len(logits) if reduce == "mean" else 1
        compare(
            lambda x, r=reduce: mmcv.ops.softmax_focal_loss(x, target, 1.5, 0.3, weight, r),
            lambda x, n=number: definitions.softmax_focal_loss(x, target, 1.5, 0.3, weight).sum() / n,
            logits,
        )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_the_sigmoid_focal_loss_of_certain_predictions_is_finite(gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    value = mmcv.ops.sigmoid_focal_loss(logits, torch.tensor([0, 0]), gamma, 0.25, None, "sum")
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.isfinite() and gradient.isfinite().all()


def test_focal_losses_of_certain_predictions_are_finite():
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    for loss in (mmcv.ops.sigmoid_focal_loss, mmcv.ops.softmax_focal_loss):
        value = loss(logits, torch.tensor([0, 0]), 2.0, 0.25, None, "sum")
        (gradient,) = torch.autograd.grad(value, logits)
        assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("groups, scale", [(1, 2), (2, 2), (2, 3)])
def test_carafe(groups, scale):
    features, masks = torch.randn(2, 4, 3, 4).double(), torch.randn(2, groups * 9, 3 * scale, 4 * scale).double()
    compare(
        lambda x, m: mmcv.ops.carafe(x, m, 3, groups, scale),
        lambda x, m: definitions.carafe(x, m, 3, groups, scale),
        *(features, masks),
    )
    naive = mmcv.ops.carafe_naive(features, masks, 3, groups, scale)
    torch.testing.assert_close(naive, mmcv.ops.carafe(features, masks, 3, groups, scale))


@pytest.mark.parametrize("kind", ["collect", "distribute"])
@pytest.mark.parametrize("size", [(5, 7), (3, 3), (9, 9)])
def test_psa_mask(kind, size):
    masks = torch.randn(2, size[0] * size[1], 4, 5).double()
    compare(mmcv.ops.PSAMask(kind, size), lambda x: definitions.psa_mask(x, kind, size), masks)


@pytest.mark.parametrize("mask", [torch.rand(1, 6, 7) > 0.5, torch.zeros(1, 6, 7), torch.ones(1, 6, 7)])
def test_masked_convolution(mask):
    layer = mmcv.ops.MaskedConv2d(3, 4, (3, 5), padding=(1, 2)).double()
    image = torch.randn(1, 3, 6, 7).double()
    with torch.no_grad():
        torch.testing.assert_close(layer(image, mask), layer(image) * (mask > 0))


@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("number", [0, 1, 60])
def test_nms(number, offset, ties):
    boxes, scores = boxes_and_scores(number, ties)
    detections, kept = mmcv.ops.nms(boxes, scores, 0.4, offset)
    double, rank = boxes.double().tolist(), scores.tolist()
    groups = definitions.suppress(rank, lambda i, j: definitions.box_iou(double[i], double[j], offset) > 0.4)
    assert kept.tolist() == [group[0] for group in groups]
    torch.testing.assert_close(detections, torch.cat([boxes, scores[:, None]], dim=1)[kept])


def test_nms_at_the_threshold():
    """An IoU of 0.6 in single precision is not above a threshold of 0.6, as in compiled mmcv."""
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 6.0]])
    assert len(mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8]), 0.6)[1]) == 2


def test_batched_nms_treats_classes_apart():
    boxes, scores = boxes_and_scores(60)
    labels = torch.randint(3, (60,))
    _, kept = mmcv.ops.batched_nms(boxes, scores, labels, dict(type="nms", iou_threshold=0.4))
    double, rank = boxes.double().tolist(), scores.tolist()

    def close(i, j):
        return labels[i] == labels[j] and definitions.box_iou(double[i], double[j]) > 0.4

    assert kept.tolist() == [group[0] for group in definitions.suppress(rank, close)]


@pytest.mark.parametrize("method", ["naive", "linear", "gaussian"])
@pytest.mark.parametrize("number", [0, 1, 40])
def test_soft_nms(number, method):
    boxes, scores = (x.double() for x in boxes_and_scores(number))
    settings = (0.3, 0.5, 0.2, method, 1)
    detections, kept = mmcv.ops.soft_nms(boxes, scores, *settings)
    want = definitions.soft_nms(boxes.tolist(), scores.tolist(), *settings)
    assert kept.tolist() == [index for index, _ in want]
    torch.testing.assert_close(detections[:, 4], boxes.new_tensor([score for _, score in want]))
    assert torch.equal(detections[:, :4], boxes[kept])


def test_nms_match():
    boxes, scores = boxes_and_scores(40)
    groups = mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], dim=1), 0.4)
    double = boxes.double().tolist()
    want = definitions.suppress(scores.tolist(), lambda i, j: definitions.box_iou(double[i], double[j]) >= 0.4)
    assert [group.tolist() for group in groups] == want


def test_overlaps_of_rotated_boxes():
    a, b = rotated(12), rotated(9)
    want = torch.tensor([[definitions.rotated_iou(x, y) for y in b.double().tolist()] for x in a.double().tolist()])
    torch.testing.assert_close(mmcv.ops.box_iou_rotated(a, b), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mmcv.ops.box_iou_rotated(a[:9], b, aligned=True), want[:9].diagonal(), atol=1e-5, rtol=0)
    same = mmcv.ops.box_iou_rotated(a, a)
    torch.testing.assert_close(same.diagonal(), torch.ones(12))
    flat = torch.tensor([[0.0, 0, 0, 5, 0]])
    assert mmcv.ops.box_iou_rotated(flat, a).tolist() == [[0] * 12]
    over_first = mmcv.ops.box_iou_rotated(torch.tensor([[0.0, 0, 2, 2, 0]]), torch.tensor([[0.0, 0, 4, 4, 0.3]]), "iof")
    torch.testing.assert_close(over_first, torch.ones(1, 1))


def test_nms_of_rotated_boxes():
    boxes, scores = rotated(40), torch.rand(40)
    _, kept = mmcv.ops.nms_rotated(boxes, scores, 0.3)
    double = boxes.double().tolist()
    want = definitions.suppress(scores.tolist(), lambda i, j: definitions.rotated_iou(double[i], double[j]) >= 0.3)
    assert kept.tolist() == [group[0] for group in want]


@pytest.mark.parametrize("mode", ["iou", "iof"])
def test_overlaps_of_boxes(mode):
    a, b = boxes_and_scores(7)[0], boxes_and_scores(7)[0]
    ious = torch.zeros(7, 7)
    ours.bbox_overlaps(a, b, ious, mode == "iof", False, 1)

    def overlap(x, y):
        iou = definitions.box_iou(x, y, 1)
        areas = [(c[2] - c[0] + 1) * (c[3] - c[1] + 1) for c in (x, y)]
        return iou if mode == "iou" else iou * sum(areas) / (1 + iou) / areas[0]

    want = torch.tensor([[overlap(x, y) for y in b.tolist()] for x in a.tolist()])
    torch.testing.assert_close(ious, want)


@pytest.mark.parametrize("top_k", [3, 50])
def test_nms_of_lines(top_k):
    starts, lengths = torch.rand(30, 1) * 0.4, torch.randint(1, 60, (30, 1))
    lines = torch.cat([torch.rand(30, 2), starts, torch.rand(30, 1), lengths, torch.rand(30, 72) * 20], dim=1)
    scores = torch.rand(30)
    keep, number, parent = ours.line_nms_forward(lines, scores, 6.0, top_k)
    double = lines.double().tolist()
    want = definitions.suppress(scores.tolist(), lambda i, j: definitions.lines_are_close(double[i], double[j], 6.0))
    assert 3 < len(want) < 30  # some lines suppress each other
    want = want[:top_k]
    assert keep[:number].tolist() == [group[0] for group in want]
    assert {i: p for i, p in enumerate(parent.tolist()) if p} == {i: n + 1 for n, g in enumerate(want) for i in g}


def test_layouts():
    """Channels-last and strided inputs and gradients give the same results as contiguous ones."""
    x = torch.randn(2, 4, 8, 8)
    strided = torch.randn(2, 4, 8, 16)[..., ::2].copy_(x)
    for other in (x.to(memory_format=torch.channels_last), strided):
        for operator in (
            lambda t: mmcv.ops.roi_align(t, ROIS, (3, 3), 0.5, 0, "avg", True),
            lambda t: mmcv.ops.roi_align(t, ROIS, (3, 3), 0.5, 0, "max", True),
            lambda t: mmcv.ops.roi_pool(t, ROIS, (3, 3), 0.5),
            lambda t: mmcv.ops.carafe(t, torch.ones(2, 9, 16, 16), 3, 1, 2),
            mmcv.ops.PSAMask("collect", (2, 2)),
        ):
            a, b = x.clone().requires_grad_(), other.detach().requires_grad_()
            out_a, out_b = operator(a), operator(b)
            torch.testing.assert_close(out_a, out_b)
            direction = torch.randn_like(out_a).transpose(2, 3).contiguous().transpose(2, 3)
            out_a.backward(direction), out_b.backward(direction)
            torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype):
    """Half-precision inputs give accurate outputs and gradients in half precision, with and without autocast."""
    inputs = torch.randn(IMAGES), torch.rand(2, 9, 16, 18), torch.randn(2, 3, 3, 3), torch.randn(2, 18, 8, 9)
    operators = {
        "roi_align": lambda x, *_: mmcv.ops.roi_align(x, ROIS.to(x), (3, 3), 0.5, 2, "avg", True),
        "max": lambda x, *_: mmcv.ops.roi_align(x, ROIS.to(x), (3, 3), 0.5, 2, "max", True),
        "roi_pool": lambda x, *_: mmcv.ops.roi_pool(x, ROIS.to(x), (3, 3), 0.5),
        "carafe": lambda x, masks, *_: mmcv.ops.carafe(x, masks, 3, 1, 2),
        "deform_conv": lambda x, _, weight, offset: deform_conv2d(x, offset, weight, 1, 1),
    }
    for name, operator in operators.items():
        halves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        floats = [tensor.detach().float().requires_grad_() for tensor in halves]
        want = operator(*floats)
        want.sum().backward()
        for autocast in (False, True):
            halves[0].grad = None
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = operator(*halves)
            assert got.dtype == halves[0].dtype, name
            torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=5e-2, msg=name)
            got.sum().backward()
            assert halves[0].grad.dtype == dtype
            if name == "max":  # positions of the largest samples are also in half precision
                torch.testing.assert_close(halves[0].grad.float().sum(), floats[0].grad.sum(), rtol=1e-2, atol=0.1)
            else:
                torch.testing.assert_close(halves[0].grad.float(), floats[0].grad, rtol=3e-2, atol=5e-2, msg=name)


def test_autocast_leaves_single_precision_alone():
    x = torch.randn(IMAGES)
    want = mmcv.ops.roi_align(x, ROIS, (3, 3), 0.5, 2, "avg", True)
    masks = torch.rand(2, 9, 16, 18)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mmcv.ops.roi_align(x, ROIS, (3, 3), 0.5, 2, "avg", True), want)
        got = mmcv.ops.carafe(x, masks, 3, 1, 2)
    assert torch.equal(got, mmcv.ops.carafe(x, masks, 3, 1, 2))


def test_bad_input_is_refused():
    x = torch.randn(IMAGES)
    with pytest.raises(RuntimeError, match="expected images 0 to 1 in the first column, got 0 to 2"):
        mmcv.ops.roi_align(x, torch.tensor([[0.0, 0, 0, 4, 4], [2, 0, 0, 4, 4]]), (2, 2))
    with pytest.raises(RuntimeError, match="expected 36 channels of offsets.*deform_groups=2, got 18"):
        deform_conv2d(torch.randn(1, 4, 5, 5), torch.zeros(1, 18, 5, 5), torch.randn(4, 4, 3, 3), 1, 1, 1, 1, 2)
    with pytest.raises(RuntimeError, match="expected targets of 0 to 2 for 3 classes, got 0 to 3"):
        mmcv.ops.sigmoid_focal_loss(torch.randn(2, 3), torch.tensor([0, 3]), 2.0, 0.25, torch.ones(3))
    with pytest.raises(RuntimeError, match="expected lines with 77 numbers, got 5"):
        ours.line_nms_forward(torch.zeros(2, 5), torch.zeros(2), 1.0, 1)
    with pytest.raises(RuntimeError, match="not implemented for 'Long'|same type"):
        mmcv.ops.nms(torch.zeros(2, 4, dtype=torch.long), torch.zeros(2, dtype=torch.long), 0.5)


def test_other_operators_say_what_they_need():
    with pytest.raises(RuntimeError, match="operator ball_query_forward needs mmcv's compiled operators.*operators.sh"):
        mmcv.ops.ball_query(0.0, 1.0, 4, torch.zeros(1, 4, 3), torch.zeros(1, 2, 3))
    with pytest.raises(AttributeError):
        ours.__wrapped__  # noqa: B018
    assert mmcv.ops.get_compiler_version().startswith("not compiled: condattn's operators on torchvision")
    assert mmcv.ops.get_compiling_cuda_version().startswith("not compiled: torch's")


def test_every_operator_of_the_toolboxes_is_there():
    """All functions of the extension are there that modules and configs of mmdet, mmseg and mmpretrain need."""
    imported = set()
    registered = {name: cls.__name__ for name, cls in MODELS.module_dict.items() if cls.__module__[:9] == "mmcv.ops."}
    for toolbox in ("mmdet", "mmseg", "mmpretrain"):
        for path in Path(pytest.importorskip(toolbox).__file__).parent.rglob("*.py"):
            for _, names in re.findall(r"from mmcv\.ops(\.\w+)? import ([\w, ]+)", path.read_text()):
                imported |= {name.split(" as ")[0].strip() for name in names.split(",")}
            named = re.findall(r"""type=['"](\w+)['"]""", path.read_text()) if ".mim" in path.parts else []
            imported |= {registered.get(name, name) for name in named if name in registered or hasattr(mmcv.ops, name)}
    assert {"batched_nms", "DeformConv2d", "PSAMask", "DeformRoIPoolPack", "SyncBatchNorm"} <= imported
    modules = {getattr(mmcv.ops, name).__module__ for name in imported if hasattr(mmcv.ops, name)}
    called = set()
    for module in modules - {"torch.autograd.function"}:
        source = Path(importlib.util.find_spec(module).origin).read_text()
        called |= set(re.findall(r"ext_module\.(\w+)\(", source))
    # nms_quadri is found only because it is in the same module as nms; no toolbox imports it.
    assert called and called - {"nms_quadri"} <= set(ours.__all__)


def test_plain_operators_still_work():
    assert mmcv.ops.CornerPool("top")(torch.randn(1, 2, 4, 4)).shape == (1, 2, 4, 4)
    assert mmcv.ops.CrissCrossAttention(16)(torch.randn(1, 16, 4, 4)).shape == (1, 16, 4, 4)
    assert mmcv.ops.point_sample(torch.randn(1, 2, 4, 4), torch.rand(1, 5, 2)).shape == (1, 2, 5)
    assert mmcv.ops.SAConv2d(4, 4, 3, padding=1)(torch.randn(1, 4, 6, 6)).shape == (1, 4, 6, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    """Values and gradients on a GPU equal those on the CPU."""
    inputs = torch.randn(IMAGES), torch.rand(2, 9, 16, 18), torch.randn(2, 3, 3, 3), torch.randn(2, 18, 8, 9)
    target = torch.randint(9, (16,))
    operators = (
        lambda x, *_: mmcv.ops.roi_align(x, ROIS.to(x), (3, 3), 0.5, 0, "avg", True),
        lambda x, *_: mmcv.ops.roi_align(x, ROIS.to(x), (3, 3), 0.5, 0, "max", True),
        lambda x, *_: mmcv.ops.roi_pool(x, ROIS.to(x), (3, 3), 0.5),
        lambda x, masks, *_: mmcv.ops.carafe(x, masks, 3, 1, 2),
        lambda x, _, weight, offset: deform_conv2d(x, offset, weight, 1, 1),
        lambda x, *_: mmcv.ops.PSAMask("collect", (1, 3))(x),
        lambda x, *_: mmcv.ops.sigmoid_focal_loss(
            x.flatten(2).flatten(0, 1)[:, :9].repeat(3, 1)[:16], target.to(x.device)
        ),
        lambda x, *_: mmcv.ops.softmax_focal_loss(
            x.flatten(2).flatten(0, 1)[:, :9].repeat(3, 1)[:16], target.to(x.device)
        ),
    )
    for operator in operators:
        results = []
        for device in ("cpu", "cuda"):
            leaves = [tensor.to(device).requires_grad_() for tensor in inputs]
            output = operator(*leaves)
            results.append((output.cpu(), torch.autograd.grad(output.sum(), leaves[0])[0].cpu()))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
    boxes, scores = boxes_and_scores(50)
    assert torch.equal(mmcv.ops.nms(boxes.cuda(), scores.cuda(), 0.4)[1].cpu(), mmcv.ops.nms(boxes, scores, 0.4)[1])
    turned = rotated(20)
    kept = [mmcv.ops.nms_rotated(turned.to(d), scores[:20].to(d), 0.3)[1].cpu() for d in ("cpu", "cuda")]
    assert torch.equal(*kept)
