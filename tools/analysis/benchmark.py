"""What conditioning costs: a Swin-T backbone, conditioned in different ways, against mmdet's own.

The variants take turns in one process (A B C, A B C, ...), so that a machine that slows down slows all of them alike.
Peak memory is that of a process of its own per variant on a CPU, and of the device on a GPU.
"""

import argparse
import json
import multiprocessing
import re
import resource
import statistics
import time
from pathlib import Path

import torch
from mmengine.registry import MODELS, DefaultScope
from tqdm import tqdm

import condattn.registry  # noqa: F401
from condattn.engine.errors import UserError, run_tool

UPSTREAM = "upstream"
STRENGTHS = {"sc": dict(type="SpectralCorrection", strength=1.0)}


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        default="upstream,none,pc,sc,sc+pc",
        help="variants to compare, the first is the reference: 'upstream' is mmdet's SwinTransformer, the others are "
        "conditionings of ConditionedSwinTransformer ('sc' has strength 1, as in the configs)",
    )
    parser.add_argument("--size", type=int, default=512, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=1, help="images a batch")
    parser.add_argument("--mode", choices=["train", "infer"], default="train", help="a training step or a forward pass")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each variant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file as well")
    return parser.parse_args()


class Variant:
    """One backbone and the step that is timed."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        backbone = dict(type="SwinTransformer")
        if name != UPSTREAM:
            methods = [STRENGTHS.get(part, part) for part in name.split("+")]
            backbone = dict(type="ConditionedSwinTransformer", conditioning=methods)
        with DefaultScope.overwrite_default_scope("mmdet"):
            self.model = MODELS.build(backbone).to(args.device)
        self.images = torch.randn(args.batch, 3, args.size, args.size, device=args.device)
        self.training = args.mode == "train"
        self.model.train(self.training)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, weight_decay=0.05)

    def step(self) -> None:
        """One training step (forward, backward, optimizer), or one forward pass."""
        with torch.set_grad_enabled(self.training):
            maps = self.model(self.images)
        if self.training:
            self.optimizer.zero_grad()
            sum(m.square().mean() for m in maps).backward()
            self.optimizer.step()
        if self.images.is_cuda:
            torch.cuda.synchronize()

    def time(self) -> float:
        """Seconds that one step takes."""
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """Peak memory of three steps, in MiB; while no other variant is in memory."""
    if args.device.startswith("cuda"):
        variant = Variant(name, args)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            variant.step()
        return torch.cuda.max_memory_allocated() / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_resident, (name, args))


def _peak_resident(name: str, args: argparse.Namespace) -> float:
    variant = Variant(name, args)
    for _ in range(3):
        variant.step()
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # in bytes, on a Mac


def main() -> None:
    """Measure and print."""
    args = parse_args()
    if args.repeats < 2:
        raise UserError(f"--repeats: expected 2 or more, found {args.repeats}")
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    names = args.models.split(",")
    try:
        memory = {name: peak_memory(name, args) for name in tqdm(names, desc="memory", disable=None)}
        variants = {name: Variant(name, args) for name in names}
    except ValueError as error:
        raise UserError(error) from error
    for _ in range(2):
        for variant in variants.values():
            variant.step()
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in tqdm(range(args.repeats), desc="rounds", disable=None):
        for name, variant in variants.items():
            times[name].append(variant.time())

    threads = f", {torch.get_num_threads()} threads" if args.device == "cpu" else ""
    print(
        f"Swin-T, {args.mode}, {args.batch} x {args.size} x {args.size}, {args.device}{threads}, "
        f"torch {torch.__version__}, {args.repeats} interleaved rounds"
    )
    print(f"{'model':10} {'median ms':>10} {'quartiles':>15} {'ratio':>6} {'peak MiB':>9}")
    figures = []
    for name in names:
        low, median, high = (1000 * q for q in statistics.quantiles(times[name], n=4))
        # Ratios are taken within a round, where both variants saw the same machine.
        ratio = statistics.median(t / r for t, r in zip(times[name], times[names[0]], strict=True))
        figures.append(dict(model=name, median_ms=median, quartiles_ms=[low, high], ratio=ratio, peak_mib=memory[name]))
        print(f"{name:10} {median:10.1f} {f'{low:.1f}-{high:.1f}':>15} {ratio:6.3f} {memory[name]:9.0f}")
    if args.out:
        args.out.write_text(json.dumps(dict(settings={**vars(args), "out": str(args.out)}, figures=figures), indent=2))


if __name__ == "__main__":
    run_tool(main)
