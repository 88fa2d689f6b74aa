"""Make a checkpoint for a conditioned model of one that was trained without conditioning.

Preconditioned attention: the mean row norm of each head on real images goes into that head's columns of the output
projection. Spectral correction: W - C takes the place of W, so that the effective weight W + C stays what it was.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch
from mmengine.config import Config

from condattn.checkpoints.calibrate import calibrate
from condattn.checkpoints.files import write_whole
from condattn.condition import conditioning_of
from condattn.engine.checkpoints import read_checkpoint
from condattn.engine.errors import UserError, run_tool
from condattn.engine.guard import ENTRY, record_of
from condattn.engine.inference import Predictor, find_images
from condattn.engine.launch import add_config_arguments, choose_device, load_config
from condattn.methods.correction import subtract_corrections


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="file or URL of weights that were trained without conditioning")
    parser.add_argument("--images", type=Path, required=True, help="folder of images like those of the training")
    parser.add_argument("--out", type=Path, required=True, help="file to write; it must not exist")
    parser.add_argument("--num", type=int, default=16, help="how many images are used (default: %(default)s)")
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: the GPU, if there is one)")
    parser.add_argument("--unsafe", action="store_true", help="execute the code in a checkpoint of more than weights")
    return parser.parse_args()


def main() -> None:
    """Calibrate, and print what it did to each site."""
    args = parse_args()
    if args.num < 1:
        raise UserError(f"--num: expected at least 1, got {args.num}")
    if args.out.exists():
        raise UserError(f"{args.out} exists already; choose another name, or remove it first")
    cfg = load_config(args.config, args.cfg_options)
    images = [path for path, _ in find_images(args.images, args.out.parent)]
    images = [images[i * len(images) // min(args.num, len(images))] for i in range(min(args.num, len(images)))]
    checkpoint = read_checkpoint(args.checkpoint, args.unsafe)
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
    write(args.out, checkpoint, model, cfg)
    print(f"{args.out}: calibrated on {len(images)} images of {args.images}")


def write(path: Path, checkpoint: dict, model: torch.nn.Module, cfg: Config) -> None:
    """Write the weights of ``model`` with the metadata of the checkpoint that they were made of."""
    meta = {**checkpoint.get("meta", {}), ENTRY: record_of(model), "cfg": cfg.pretty_text}
    weights = {name: value.cpu() for name, value in model.state_dict().items()}
    write_whole(path, lambda part: torch.save({"meta": meta, "state_dict": weights}, part))


if __name__ == "__main__":
    run_tool(main)
