"""Make a checkpoint for a conditioned model of one that was trained without conditioning.

Preconditioned attention: the mean row norm of each head on real images goes into that head's columns of the output
projection. Spectral correction: W - C takes the place of W, so that the effective weight W + C stays what it was.
"""

from argparse import ArgumentParser, Namespace

from condattn.condition import conditioning_of
from condattn.layers.correction import subtract_corrections
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.hooks.conditioning_guard import ENTRY
from condattn.openmmlab.runner.inference import Predictor
from condattn.openmmlab.runner.launch import choose_device
from condattn.openmmlab.runner.rewriting import add_rewriting_arguments, load_inputs, write_checkpoint
from condattn.weights.calibrate import calibrate


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add_rewriting_arguments(parser, images=16)
    return parser.parse_args()


def main() -> None:
    """Calibrate, and print what it did to each site."""
    args = parse_args()
    cfg, checkpoint, images = load_inputs(args)
    if any(checkpoint.get("meta", {}).get(ENTRY, {}).values()):
        raise UserError(f"{args.checkpoint} is of a conditioned model already; expected weights trained without")
    predictor = Predictor(cfg, args.checkpoint, choose_device(args.device), other_conditioning=True, unsafe=args.unsafe)
    model = predictor.model
    methods = {method["type"] for methods in conditioning_of(model).values() for method in methods}
    if not methods:
        raise UserError(f"the model of {args.config} is not conditioned; there is nothing to calibrate")
    if "SpectralCorrection" in methods:
        subtract_corrections(model)
        print("spectral correction: W - C in place of W; W + C, and so the function, is that of the checkpoint")
    if "RowPreconditioner" in methods:
        try:
            for site in calibrate(model, lambda: [predictor.predict([path]) for path in images]):
                print(site)
        except ValueError as error:
            raise UserError(error) from error
    write_checkpoint(args.out, model, {**checkpoint.get("meta", {}), "cfg": cfg.pretty_text})
    print(f"{args.out}: calibrated on {len(images)} images of {args.images}")


if __name__ == "__main__":
    run_tool(main)
