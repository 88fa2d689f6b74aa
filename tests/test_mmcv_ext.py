"""Where mmcv finds its operators, and whether ours equal the compiled ones, if those are installed."""

import importlib
import multiprocessing
import sys
from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

import pytest
import torch
from runs import DEMO, run

pytest.importorskip("mmcv.ops")

import mmcv.ops
from mmcv.ops import deform_conv2d, modulated_deform_conv2d
from mmcv_cases import boxes_and_scores, rotated, use

from condattn.openmmlab import mmcv_ops as ours
from condattn.stack import describe_operators

compiled = importlib.import_module("mmcv._ext")
COMPILED = compiled.__file__.endswith(tuple(EXTENSION_SUFFIXES))
needs_compiled = pytest.mark.skipif(not COMPILED, reason="needs mmcv's compiled operators")


def test_the_operators_are_named():
    assert describe_operators().startswith("compiled" if COMPILED else "condattn's, on torchvision ")


def test_a_compiled_extension_wins(tmp_path):
    (tmp_path / "_ext.py").touch()
    assert PathFinder.find_spec("package._ext", [str(tmp_path)]).origin.endswith("_ext.py")
    (tmp_path / f"_ext{EXTENSION_SUFFIXES[0]}").touch()
    assert PathFinder.find_spec("package._ext", [str(tmp_path)]).origin.endswith(EXTENSION_SUFFIXES[0])


SUPPRESS = """
import mmcv.ops, torch
boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4.1], [8, 8, 9, 9]])
assert mmcv.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)[1].tolist() == [1, 2]
print("suppressed")
"""


def test_a_process_that_knows_nothing_of_this_package(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SUPPRESS)
    assert "suppressed" in run(script, cwd=tmp_path).stdout
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script)
    assert run(*command, cwd=tmp_path).stdout.count("suppressed") == 2


class Boxes(torch.utils.data.Dataset):
    """A data set whose items call ``nms`` in the worker process."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 4.1], [8, 8, 9, 9]])
        return mmcv.ops.nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5)[1]


def test_a_spawned_worker_of_a_data_loader():
    context = multiprocessing.get_context("spawn")
    loader = torch.utils.data.DataLoader(Boxes(), num_workers=1, multiprocessing_context=context)
    assert [batch.tolist() for batch in loader] == [[[1, 2]], [[1, 2]]]


@pytest.mark.slow
def test_the_tool_of_mmdet(detection_options, tmp_path):
    """One of our configurations runs in mmdet's train.py, which imports mmcv's operators before our modules."""
    mmdet = pytest.importorskip("mmdet")
    tool = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    config = DEMO / "mask_rcnn_swin_pc.py"
    result = run(tool, config, "--work-dir", tmp_path / "run", "--cfg-options", *detection_options, cwd=tmp_path)
    assert "coco/segm_mAP" in result.stdout + result.stderr
    assert (tmp_path / "run" / "epoch_1.pth").exists()


# Comparison with compiled operators, if they are installed.


@needs_compiled
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "old"])
@pytest.mark.parametrize("ratio", [0, 2])
def test_roi_align_equals_the_compiled_one(ratio, aligned, monkeypatch):
    x, results = torch.randn(2, 16, 40, 50), []
    rois = torch.cat([torch.randint(2, (30, 1)), boxes_and_scores(30)[0] * 8], dim=1)
    for extension in (compiled, ours):
        use(extension, monkeypatch)
        for mode in ("avg", "max"):
            leaf = x.clone().requires_grad_()
            output = mmcv.ops.roi_align(leaf, rois, (7, 7), 0.125, ratio, mode, aligned)
            results += [output, *torch.autograd.grad(output, leaf, torch.ones_like(output))]
    average, average_grad, largest, largest_grad = zip(results[:4], results[4:], strict=True)
    assert torch.equal(*average) and torch.equal(*average_grad)
    torch.testing.assert_close(*largest, rtol=1e-4, atol=1e-4)
    # Where two samples are equal up to rounding, either may be the largest.
    close = torch.isclose(*largest_grad, atol=1e-4)
    assert close.double().mean() > 0.999
    torch.testing.assert_close(largest_grad[0].sum(), largest_grad[1].sum())


@needs_compiled
def test_suppression_equals_the_compiled_one(monkeypatch):
    results = []
    cases = [boxes_and_scores(n, ties) for n in (1, 200) for ties in (False, True)]
    turned = rotated(60)
    for extension in (compiled, ours):
        use(extension, monkeypatch)
        found = []
        for boxes, scores in cases:
            found += [mmcv.ops.soft_nms(boxes, scores, 0.3, method=m) for m in ("naive", "linear", "gaussian")]
            found += [mmcv.ops.nms(boxes, scores, t, offset) for t in (0.3, 0.6) for offset in (0, 1)]
            found.append(mmcv.ops.nms_match(torch.cat([boxes, scores[:, None]], dim=1), 0.4))
        found.append(mmcv.ops.nms_rotated(turned, turned[:, 0] % 1, 0.3))
        found.append([mmcv.ops.box_iou_rotated(turned, turned.flip(0))])
        results.append(found)
    for want, got in zip(*results, strict=True):
        assert len(want) == len(got)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-4)


@needs_compiled
@pytest.mark.parametrize("kind", ["collect", "distribute"])
def test_psa_masks_equal_the_compiled_ones(kind, monkeypatch):
    masks, results = torch.randn(2, 35, 4, 5), []
    for extension in (compiled, ours):
        use(extension, monkeypatch)
        leaf = masks.clone().requires_grad_()
        output = mmcv.ops.PSAMask(kind, (5, 7))(leaf)
        results.append((output, *torch.autograd.grad(output, leaf, torch.arange(output.numel()).view_as(output) * 1.0)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_compiled
@pytest.mark.parametrize("spread", [0.0, 2.0], ids=["no offset", "offsets"])
def test_deformable_convolutions_equal_the_compiled_ones(spread, monkeypatch):
    image, weight, bias = torch.randn(2, 4, 9, 10), torch.randn(6, 2, 3, 3), torch.randn(6)
    offset, mask = torch.randn(2, 36, 9, 10) * spread, torch.rand(2, 18, 9, 10)
    results = []
    for extension in (compiled, ours):
        use(extension, monkeypatch)
        found = []
        for operator, inputs in (
            (deform_conv2d, (image, offset, weight)),
            (modulated_deform_conv2d, (image, offset, mask, weight, bias)),
        ):
            leaves = [x.clone().requires_grad_() for x in inputs]
            output = operator(*leaves, 1, 1, 1, 2, 2)
            found += [output, *torch.autograd.grad(output, leaves, torch.ones_like(output))]
        results.append(found)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4)
