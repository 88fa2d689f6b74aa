"""Measure time and memory of conditioned networks, with and without fast paths, against those of upstream.

The variants take turns in one process (A B C, A B C, ...), so that a machine that slows down affects all of them
equally. A turn has two steps, of which only the second is timed. Peak memory is measured in a separate process for each
variant on a CPU, and on the device on a GPU. The floors are the times that the matrix products alone, and writing and
reading each layer's output alone, would take at the rates of this machine.
"""

import argparse
import functools
import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from tqdm import tqdm

import condattn
import condattn.registry
from condattn.kernels.switch import plain
from condattn.methods.parsing import split_names
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.runner.launch import choose_device

UPSTREAM = "upstream"
NETWORKS = {
    **{"swin-t": (512, 512), "vit-b": (1024, 1024), "mask-rcnn": (800, 1333), "attention": (512, 512)},
    **{"small-vit": (28, 28), "demo": (96, 96)},
}
"""Network -> default height and width of the images."""
VITS = {
    "vit-b": {},
    "small-vit": dict(patch_size=4, embed_dim=64, depth=4, num_heads=2, mlp_ratio=2),
}
"""Network -> its settings, where they differ from those of timm's ViT-B."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STEP, LARGEST = 256, 1536
"""Step and largest side, in pixels, of the square images of a sweep."""
CONFIGS = Path(__file__).parents[2] / "configs"
DETECTORS = {"mask-rcnn": CONFIGS / "mask_rcnn_swin_pc.py", "demo": CONFIGS / "demo" / "mask_rcnn_swin_pc.py"}
STEPS = 3
"""Number of steps that are enough to reach the peak of memory."""


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        default="upstream,none,pc,sc,sc+pc",
        help="variants to compare, the first is the reference: 'upstream' is the network of mmdet or timm, the others "
        "are conditionings ('sc' has strength 1, as in the configs; 'pc:folded' folds corrections, 'pc:plain' has no "
        "fast paths, 'pc:torchvision' has condattn's operators where mmcv's are compiled)",
    )
    parser.add_argument(
        "--network",
        choices=NETWORKS,
        default="swin-t",
        help="Swin-T as a backbone of mmdet, ViT-B of timm, Mask R-CNN with Swin-T, the attention of Swin-T's first "
        "blocks alone, a ViT of the size of that in the studies, or the demo's Mask R-CNN (default: %(default)s)",
    )
    parser.add_argument("--size", help="height x width of the images, e.g. 512 or 800x1333 (default: by the network)")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help=f"square images of {STEP}, {2 * STEP}, ... up to --size (default: {LARGEST}), and a plot",
    )
    parser.add_argument("--batch", type=int, default=1, help="images a batch (default: %(default)s)")
    parser.add_argument(
        "--mode",
        choices=["train", "infer"],
        default="train",
        help="a training step or a forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="half precision is by autocast (default: %(default)s)"
    )
    parser.add_argument("--compile", action="store_true", help="with torch.compile")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each variant (default: %(default)s)")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: the GPU, if there is one)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file as well, and the plot beside it")
    return parser.parse_args()


def build(name: str, network: str, size: tuple[int, int]) -> nn.Module:
    """Build a variant of a network; all variants have the same initial weights."""
    torch.manual_seed(0)
    name, _, form = name.partition(":")
    methods = name
    fast = form != "plain"
    if network in VITS:
        import timm

        settings = dict(img_size=size, num_classes=0, global_pool="", **VITS[network])
        model = timm.create_model("vit_base_patch16_224", **settings)
        if name != UPSTREAM:
            condattn.condition(model, methods)
    else:
        backbone = dict(type="ConditionedSwinTransformer", conditioning=methods, fast_attention=fast)
        if name == UPSTREAM:
            backbone = dict(type="SwinTransformer")
        with DefaultScope.overwrite_default_scope("mmdet"):
            if network in DETECTORS:
                cfg = Config.fromfile(DETECTORS[network]).model
                for setting in ("init_cfg", "conditioning"):
                    cfg.backbone.pop(setting, None)
                cfg.backbone.update(backbone)
                model = MODELS.build(cfg)
            else:
                model = MODELS.build(backbone)
    if form == "folded":
        model.eval()
        condattn.fold(model)
    return _Attention(model) if network == "attention" else model


class _Attention(nn.Module):
    """The attention of the first two blocks of a Swin backbone; the second has shifted windows."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(block.attn for block in backbone.stages[0].blocks)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Apply both attention layers to the patch embeddings ``x`` (B, C, H, W)."""
        size = x.shape[2:]
        x = x.flatten(2).mT
        return [x := layer(x, size) for layer in self.layers][-1:]


class Variant:
    """A variant of the network, and the step that is timed."""

    def __init__(self, name: str, args: argparse.Namespace, size: tuple[int, int]) -> None:
        self.name, self.args, self.device = name, args, torch.device(args.device)
        self.model = build(name, args.network, size).to(self.device)
        self.training = args.mode == "train"
        self.model.train(self.training)
        self.call, self.inputs = self._inputs(size)
        if args.compile:
            self.call = torch.compile(self.call)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05)
        self.form = name.partition(":")[2]
        self.gradients: list[torch.Tensor] | None = None
        self.steps = 0

    def _inputs(self, size: tuple[int, int]) -> tuple[Callable, tuple]:
        args, model = self.args, self.model
        if args.network not in DETECTORS:
            shape = (96, size[0] // 4, size[1] // 4) if args.network == "attention" else (3, *size)
            return model, (torch.randn(args.batch, *shape, device=self.device),)
        from mmdet.testing import demo_mm_inputs

        batch = demo_mm_inputs(args.batch, [(3, *size)] * args.batch, num_items=[10] * args.batch, with_mask=True)
        data = model.data_preprocessor(batch, self.training)
        mode = "loss" if self.training else "predict"
        return (lambda inputs, samples: model(inputs, samples, mode=mode)), (data["inputs"], data["data_samples"])

    def step(self) -> None:
        """Run a training step (forward, backward, optimizer) or a forward pass, with the same seed for all variants."""
        self.steps += 1
        torch.manual_seed(self.steps)
        dtype = DTYPES[self.args.dtype]
        half = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        with torch.set_grad_enabled(self.training), half:
            outputs = self.call(*self.inputs)
        if self.training:
            self._backward(outputs)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _backward(self, outputs: Any) -> None:
        """Backpropagate a detector's losses, or random gradients of a backbone's feature maps, equal in all steps."""
        if isinstance(outputs, dict):
            self.model.parse_losses(outputs)[0].backward()
            return
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
        if self.gradients is None:
            self.gradients = [torch.randn_like(one) for one in outputs]
        torch.autograd.backward(outputs, self.gradients)

    def time(self) -> float:
        """Measure the seconds that one step takes."""
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start

    def run(self) -> None:
        """Run a step, in the context of the variant's suffix (``:plain`` or ``:torchvision``).

        Raises:
            UserError: If ``--compile`` was given, and torch.compile cannot compile the network.
        """
        try:
            with CONTEXTS.get(self.form, nullcontext)():
                self.step()
        except TorchDynamoException as error:
            lines = str(error).splitlines()
            reason = next((line for line in lines if " error: " in line), lines[0])
            raise UserError(f"--compile: torch.compile failed on '{self.name}' ({reason}); leave it out") from None


@contextmanager
def torchvision_operators() -> Iterator[None]:
    """Let ``mmcv.ops`` use condattn's operators on torchvision, also where compiled ones are installed."""
    from condattn.openmmlab import mmcv_ops

    with ExitStack() as stack:
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("mmcv.ops.") and hasattr(module, "ext_module"):
                stack.enter_context(mock.patch.object(module, "ext_module", mmcv_ops))
        yield


CONTEXTS = {"plain": plain, "torchvision": torchvision_operators}
"""Suffix of a variant, after the colon -> context in which its steps run."""


def peak_memory(name: str, args: argparse.Namespace, size: tuple[int, int]) -> tuple[float, float]:
    """Peak memory of a few steps in MiB, with no other variant in memory: in total, and without that of the imports."""
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
        variant = Variant(name, args, size)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(STEPS):
            variant.run()
        peak = torch.cuda.max_memory_allocated() / 2**20
        return peak, peak
    # glibc returns freed memory to the system at once, so that fragmentation does not raise the peak.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(_peak_resident, (name, args, size))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]


def _peak_resident(name: str, args: argparse.Namespace, size: tuple[int, int]) -> tuple[float, float]:
    MMLogger.get_current_instance().setLevel("ERROR")
    build("none", args.network, size)  # imports all modules before the memory is measured
    before = _resident("VmRSS")
    variant = Variant(name, args, size)
    for _ in range(STEPS):
        variant.run()
    return _resident("VmHWM"), _resident("VmHWM") - before


def _resident(entry: str) -> float:
    """Resident memory of this process in MiB: current (VmRSS) or peak (VmHWM)."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(rf"{entry}:\s*(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS reports bytes


@functools.cache
def rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Rates of this machine: floating-point operations per second in matrix products, bytes per second in copies."""
    size = 4096 if device.startswith("cuda") else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**26, device=device)
    target = torch.empty_like(source)
    multiply, copy = (min(_seconds(f, device) for _ in range(5)) for f in (lambda: a @ b, lambda: target.copy_(source)))
    return 2 * size**3 / multiply, 2 * source.nbytes / copy


def _seconds(function: Callable, device: str) -> float:
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def complexity(name: str, args: argparse.Namespace, size: tuple[int, int]) -> dict[str, float | None]:
    """Numbers of parameters, floating-point operations and activations of a forward pass, by mmengine's counter."""
    model = build(name, args.network, size)
    model.eval()  # not chained: eval() of upstream's class does not return the model
    found = dict(parameters=sum(p.numel() for p in model.parameters()), flops=None, activations=None)
    if args.network in ("swin-t", *VITS):
        images = torch.randn(args.batch, 3, *size)
        result = get_model_complexity_info(model, inputs=(images,), show_table=False, show_arch=False)
        found |= dict(flops=2 * result["flops"], activations=result["activations"])  # mmengine counts multiply-adds
    return found


def measure(args: argparse.Namespace, size: tuple[int, int]) -> list[dict]:
    """Measure every variant at one image size; the first one is the reference."""
    names = split_names(args.models)
    try:
        memory = {name: peak_memory(name, args, size) for name in tqdm(names, desc="memory", disable=None)}
        counts = {name: complexity(name, args, size) for name in names}
        variants = {name: Variant(name, args, size) for name in names}
    except ValueError as error:
        raise UserError(error) from error
    for variant in variants.values():
        variant.run()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(args.repeats), desc="rounds", disable=None):
        for name, variant in variants.items():
            variant.run()  # warm-up: brings memory and caches into the state of this variant
            times[name].append(variant.time())
    operations, bandwidth = rates(args.device, DTYPES[args.dtype])
    passes = 3 if args.mode == "train" else 1  # a backward pass costs as much as two forward passes
    width = 4 if args.dtype == "float32" else 2
    figures = []
    for name in names:
        low, median, high = (1000 * q for q in statistics.quantiles(times[name], n=4))
        # Ratios are taken within a round, so that both times come from the same state of the machine.
        ratio = statistics.median(t / r for t, r in zip(times[name], times[names[0]], strict=True))
        count, (peak, beyond) = counts[name], memory[name]
        floors = None, None
        if count["flops"]:
            floors = (
                1000 * passes * count["flops"] / operations,
                1000 * passes * 2 * width * count["activations"] / bandwidth,  # each activation is written and read
            )
        figures.append(
            dict(model=name, size=list(size), median_ms=median, quartiles_ms=[low, high], ratio=ratio)
            | dict(images_per_second=1000 * args.batch / median, peak_mib=peak, beyond_imports_mib=beyond)
            | dict(memory_ratio=beyond / memory[names[0]][1], **count)
            | dict(matmul_floor_ms=floors[0], traffic_floor_ms=floors[1])
        )
    return figures


def print_figures(figures: list[dict]) -> None:
    """Print one line for each variant."""
    print(
        f"{'model':12} {'median ms':>10} {'quartiles':>15} {'ratio':>6} {'images/s':>9} {'peak MiB':>9} {'beyond':>7} "
        f"{'ratio':>6} {'params M':>9} {'GFLOP':>7} {'floor ms: products':>18} {'traffic':>8}"
    )
    for one in figures:
        low, high = one["quartiles_ms"]
        floors = [f"{one[name]:.1f}" if one[name] else "-" for name in ("matmul_floor_ms", "traffic_floor_ms")]
        flops = f"{one['flops'] / 1e9:.1f}" if one["flops"] else "-"
        print(
            f"{one['model']:12} {one['median_ms']:10.1f} {f'{low:.1f}-{high:.1f}':>15} {one['ratio']:6.3f} "
            f"{one['images_per_second']:9.2f} {one['peak_mib']:9.0f} {one['beyond_imports_mib']:7.0f} "
            f"{one['memory_ratio']:6.3f} {one['parameters'] / 1e6:9.2f} {flops:>7} {floors[0]:>18} {floors[1]:>8}"
        )


def plot(figures: list[dict], path: Path) -> None:
    """Plot time and memory against the size of the images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = {"median_ms": "milliseconds a step", "beyond_imports_mib": "peak memory, MiB"}
    for axis, (quantity, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        for name in dict.fromkeys(one["model"] for one in figures):
            points = [(one["size"][0], one[quantity]) for one in figures if one["model"] == name]
            axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set(xlabel="height and width, pixels", ylabel=label, xscale="log", yscale="log")
        sizes = sorted({one["size"][0] for one in figures})
        axis.set_xticks(sizes, map(str, sizes), rotation=45)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axis.legend()
    figure.savefig(path, dpi=110)
    print(path)


def image_size(args: argparse.Namespace) -> tuple[int, int]:
    """Height and width of the images, from the command line or the default of the network."""
    if args.size is None:
        return NETWORKS[args.network]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", args.size):
        raise UserError(f"--size: expected a number or HEIGHTxWIDTH, found {args.size}")
    height, _, width = args.size.partition("x")
    return int(height), int(width or height)


def check_file(path: Path) -> None:
    """Raise a UserError if ``path`` cannot be written, before anything is measured."""
    is_new = not path.exists()
    try:
        path.open("a").close()
    except OSError as error:
        raise UserError(f"--out: {path} cannot be written ({error.strerror}); choose another file") from error
    if is_new:
        path.unlink()


def main() -> None:
    """Check the options, measure all sizes, and print and save the figures."""
    args = parse_args()
    for name, least in (("repeats", 2), ("batch", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name}: expected {least} or more, found {getattr(args, name)}")
    for name in split_names(args.models):
        if name.partition(":")[2] not in ("", "folded", *CONTEXTS):
            raise UserError(
                "--models: expected a conditioning, with ':plain', ':folded' or ':torchvision' or without, "
                f"found {name}"
            )
    if args.out:
        check_file(args.out)
    args.device = str(choose_device(args.device))
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    MMLogger.get_current_instance().setLevel("ERROR")  # no warning for each operator that is not counted
    sizes = [image_size(args)]
    if args.sweep:
        largest = max(sizes[0]) if args.size else LARGEST
        sizes = [(side, side) for side in range(STEP, largest + 1, STEP)]
        if not sizes:
            raise UserError(f"--sweep --size: expected {STEP} or more, found {args.size}")
    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    device = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(
        f"{args.network}, {args.mode}, batch {args.batch}, {args.dtype}{', compiled' if args.compile else ''}, "
        f"{device}{threads}, torch {torch.__version__}, {args.repeats} interleaved rounds"
    )
    figures = []
    for size in sizes:
        print(f"{size[0]} x {size[1]}")
        found = measure(args, size)
        print_figures(found)
        figures += found
    if args.out:
        settings = {**vars(args), "out": str(args.out), "torch": torch.__version__, "device_name": device}
        args.out.write_text(json.dumps(dict(settings=settings, figures=figures), indent=2))
        print(args.out)
    if args.sweep:
        plot(figures, args.out.with_suffix(".png") if args.out else Path("sweep.png"))


if __name__ == "__main__":
    run_tool(main)
