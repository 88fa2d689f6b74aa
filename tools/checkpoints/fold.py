"""Convert a spectrally conditioned checkpoint into a plain one with the same function, by replacing W by W + C."""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

import condattn
from condattn.kernels.switch import plain
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.runner.folding import fold_config, own_classes, rebuild
from condattn.openmmlab.runner.inference import Predictor
from condattn.openmmlab.runner.launch import choose_device
from condattn.openmmlab.runner.rewriting import add_rewriting_arguments, load_inputs, refuse_existing, write_checkpoint
from condattn.weights.atomic import write_atomically
from condattn.wording import listed

TOLERANCE = 1e-5


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    add_rewriting_arguments(parser, images=4, use="on which the model is compared before and after folding")
    parser.add_argument("--config-out", type=Path, help="write the configuration of the folded model too")
    return parser.parse_args()


def main() -> None:
    """Fold the corrections, check that attention computes the same as before, and write the checkpoint."""
    args = parse_args()
    cfg, checkpoint, images = load_inputs(args)
    if args.config_out:
        refuse_existing(args.config_out)
    predictor = Predictor(cfg, args.checkpoint, choose_device(args.device), unsafe=args.unsafe)
    with plain():  # in which upstream's classes and those of this project compute the same
        before = outputs(predictor, images)
        if not condattn.fold(predictor.model):
            raise UserError(f"the model of {args.config} has no spectral correction; there is nothing to fold")
        difference = compare(before, outputs(predictor, images), "the folded model")
        folded = fold_config(cfg)
        predictor.model = rebuild(folded, predictor.model)
        difference = max(difference, compare(before, outputs(predictor, images), "the model of the new configuration"))
    print(f"attention before and after folding agrees to {difference:.1e} of its size on {len(images)} images")
    write_checkpoint(args.out, predictor.model, {**checkpoint.get("meta", {}), "cfg": folded.pretty_text})
    print(f"{args.out}: {len(predictor.model.state_dict())} weights")
    if args.config_out:
        write_atomically(args.config_out, lambda part: part.write_text(folded.pretty_text))
        used = own_classes(folded)
        print(f"{args.config_out}: needs {f'condattn, for {listed(used)}' if used else 'no condattn'}")


def outputs(predictor: Predictor, images: list[Path]) -> list[Tensor]:
    """Outputs of all attention modules for each image."""
    with recorded(predictor.model) as seen:
        for path in images:
            predictor.predict([path])
    if not seen:
        raise UserError("no image reached an attention module of the model")
    return seen


@contextmanager
def recorded(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of the attention modules of ``model`` while the context is active."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple, output: Tensor | tuple) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).detach().cpu())

    hooks = [site.module.register_forward_hook(record) for site in condattn.find_sites(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def compare(before: list[Tensor], after: list[Tensor], what: str) -> float:
    """Return the largest relative difference between outputs of the original model and of ``what``.

    Raises:
        UserError: If it is not small.
    """
    differences = [relative(a, b) for a, b in zip(before, after, strict=True)]
    difference = torch.tensor(differences).max().item()  # NaN if one is, which Python's max may leave out
    if not difference <= TOLERANCE:
        raise UserError(f"the attention of {what} differs by {difference:.1e} of its size; nothing was written")
    return difference


def relative(one: Tensor, other: Tensor) -> float:
    """Largest absolute difference, relative to the largest absolute value of ``one``."""
    return ((one - other).abs().max() / one.abs().max().clamp_min(1e-12)).item()


if __name__ == "__main__":
    run_tool(main)
