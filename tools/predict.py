"""Predict images: draw boxes, masks or label maps, and save them as plain data."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.runner.checkpoints import add_checkpoint_arguments
from condattn.openmmlab.runner.inference import IMAGE_SUFFIXES, Predictor, find_images, in_short, save_prediction
from condattn.openmmlab.runner.launch import DRAWN, add_config_arguments, choose_device, load_config


def positive(text: str) -> int:
    """Parse a positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"expected a whole number above 0, got {text}")
    return int(text)


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(
        description=__doc__,
        epilog="The picture of FOLDER/a/b.jpg goes to DIR/vis/a/b.jpg, its prediction to "
        "DIR/preds/a/b.jpg.json (instances: labels, scores, boxes, masks as COCO run lengths) or "
        "DIR/preds/a/b.jpg.png (label map).",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="image_or_folder",
        help=f"an image, or a folder that is searched with its subfolders for {' '.join(IMAGE_SUFFIXES)}",
    )
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="file or URL of the weights")
    add_checkpoint_arguments(parser)
    parser.add_argument("--out-dir", required=True, type=Path, metavar="DIR", help="folder for the results")
    parser.add_argument(
        "--score-thr",
        type=float,
        default=0.3,
        help="draw instances from this score up (default: %(default)s)",
    )
    parser.add_argument("--device", help="e.g. cpu or cuda:1 (default: the GPU, if there is one)")
    parser.add_argument("--batch-size", type=positive, default=1, help="images at a time (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    """Predict every image; return the exit status, 1 if an image could not be read, predicted or drawn."""
    args = parse_args()
    device = choose_device(args.device)
    images = find_images(args.source, args.out_dir)
    cfg = load_config(args.config, args.cfg_options)
    if cfg.default_scope not in DRAWN:
        raise UserError(f"{args.config} is neither of a detector nor of a segmenter, which predict.py is for")
    predictor = Predictor(cfg, args.checkpoint, device, args.other_conditioning, args.unsafe)
    done = 0
    with tqdm(total=len(images), desc="predict", unit="image", dynamic_ncols=True, disable=None) as bar:
        for start in range(0, len(images), args.batch_size):
            batch = images[start : start + args.batch_size]
            for problem in predict(predictor, batch, args.out_dir, args.score_thr):
                if problem:
                    bar.write(f"error: {problem}", file=sys.stderr)
                else:
                    done += 1
                bar.update()
    print(f"{done} of {len(images)} images predicted; see {args.out_dir}/vis and preds")
    return 0 if done == len(images) else 1


def predict(
    predictor: Predictor, images: list[tuple[Path, Path]], out_dir: Path, score_thr: float
) -> Iterator[str | None]:
    """Predict a batch of images, given as (path, name), save and draw the results; yield an error or None for each."""
    for (path, name), sample in zip(images, predictor.predict_each([path for path, _ in images]), strict=True):
        if isinstance(sample, Exception):
            yield f"the prediction of {path} fails ({in_short(sample)}); left out"
            continue
        save_prediction(sample, out_dir / "preds" / name)
        try:
            predictor.draw(sample, out_dir / "vis" / name, score_thr)
        except OSError:
            raise
        except Exception as error:  # drawing code of the toolboxes raises many kinds of errors
            yield f"the prediction of {path} is saved, but cannot be drawn ({in_short(error)})"
        else:
            yield None


if __name__ == "__main__":
    run_tool(main)
