"""Convert a checkpoint that was trained without conditioning into one for a conditioned model.

Where head outputs are conditioned (preconditioned attention), the columns of each head in the output projection are
multiplied by a factor that is measured on real images; for the row preconditioner, it is the mean row norm. Where
weights are corrected (spectral conditioning), W is replaced by W - C, so that the effective weight W + C is unchanged.
"""

from argparse import ArgumentParser, Namespace

from condattn.attention.rules import find_sites
from condattn.layers.correction import subtract_corrections
from condattn.layers.head_transform import head_transform_of
from condattn.methods import HeadOutputMethod, WeightMethod
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.models.loading import inconvertible, methods_in, record_of, recorded
from condattn.openmmlab.runner.inference import Predictor
from condattn.openmmlab.runner.launch import choose_device
from condattn.openmmlab.runner.rewriting import add_rewriting_arguments, load_inputs, write_checkpoint
from condattn.weights.calibrate import calibrate


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    add_rewriting_arguments(parser, images=16, use="on which the size of the head outputs is measured")
    return parser.parse_args()


def main() -> None:
    """Calibrate the model, print the result for each site, and write the checkpoint."""
    args = parse_args()
    cfg, checkpoint, images = load_inputs(args)
    if any(recorded(checkpoint).values()):
        raise UserError(f"{args.checkpoint} is of a conditioned model already; expected weights trained without")
    predictor = Predictor(cfg, args.checkpoint, choose_device(args.device), other_conditioning=True, unsafe=args.unsafe)
    model = predictor.model
    record = record_of(model)
    if names := inconvertible(record):
        raise UserError(
            f"{args.config}: weights that were trained without {', '.join(names)} cannot be converted for it; train "
            f"with it from the start, or from {args.checkpoint} as it is, by load_from and --other-conditioning"
        )
    if not any(methods_in(record, kind) for kind in (HeadOutputMethod, WeightMethod)):
        raise UserError(f"the model of {args.config} has no PC and no SC; there is nothing to calibrate")
    if number := subtract_corrections(model, predictor.loaded):
        print(f"{number} weights: W - C in place of W; W + C, and so the function, is that of the checkpoint")
    if any(head_transform_of(site) for site in find_sites(model)):
        try:
            for site in calibrate(model, lambda: [predictor.predict([path]) for path in images]):
                print(site)
        except ValueError as error:
            raise UserError(error) from error
    write_checkpoint(args.out, model, {**checkpoint.get("meta", {}), "cfg": cfg.pretty_text})
    print(f"{args.out}: calibrated on {len(images)} images of {args.images}")


if __name__ == "__main__":
    run_tool(main)
