"""Evaluate a checkpoint on the test data of its configuration."""

import copy
import os
import sys
from argparse import ArgumentParser, Namespace
from collections import Counter
from contextlib import redirect_stdout
from inspect import signature
from io import StringIO
from pathlib import Path

from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS

from condattn.openmmlab.data_check import check_data
from condattn.openmmlab.data_check.settings import class_of
from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.models.loading import check_conditioning
from condattn.openmmlab.models.settings import class_name
from condattn.openmmlab.processes import leave_processes, local_rank
from condattn.openmmlab.runner.checkpoints import add_checkpoint_arguments, check_fit, drop_pretrained, read_checkpoint
from condattn.openmmlab.runner.launch import (
    DRAWN,
    add_config_arguments,
    add_runner_arguments,
    build_model,
    build_runner,
    load_runner_config,
)
from condattn.openmmlab.runner.settings import check_loop
from condattn.openmmlab.runner.sharding import is_sharded
from condattn.openmmlab.runner.tta import add_tta
from condattn.wording import some


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument("checkpoint", help="file or URL of the weights")
    add_runner_arguments(parser)
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--out",
        help="save the predictions: detection into this pickle file (.pkl), segmentation as label maps (PNG) "
        "into this folder, with the values of the annotations: one higher than those of predict.py if the data set "
        "has reduce_zero_label, as ADE20K",
    )
    parser.add_argument("--show", action="store_true", help="show each prediction in a window")
    parser.add_argument(
        "--show-dir",
        help="draw each prediction beside the ground truth into this folder (segmentation: below it in "
        "vis_data/vis_image)",
    )
    parser.add_argument(
        "--wait-time",
        type=float,
        default=2,
        help="seconds that --show shows each image (default: %(default)s)",
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="test-time augmentation: the configuration's tta_model and tta_pipeline, else horizontal flips",
    )
    return parser.parse_args()


def main() -> None:
    """Check configuration, data and checkpoint, then evaluate."""
    args = parse_args()
    cfg = load_runner_config(args)
    check_loop(cfg, "test")
    detection = cfg.default_scope == "mmdet"
    if cfg.default_scope not in DRAWN and (args.out or args.show or args.show_dir or args.tta):
        raise UserError(
            f"{args.config} is neither of a detector nor of a segmenter, as --out, --show, --show-dir and --tta expect"
        )
    if args.out and detection:
        check_pickle(Path(args.out))
        if isinstance(cfg.test_evaluator, dict) and class_name(cfg.test_evaluator) == "MultiDatasetsEvaluator":
            raise UserError("--out expects metrics of one data set, found MultiDatasetsEvaluator; test one at a time")
    if args.show and args.show_dir and cfg.default_scope == "mmseg":
        raise UserError("mmseg either shows predictions or saves them; use --show or --show-dir, not both")
    if args.show or args.show_dir:
        draw_predictions(cfg, args)
    if args.out and not detection:
        save_label_maps(cfg, args.out)
    if args.tta and is_sharded(cfg):
        raise UserError("--tta expects a model that is not sharded; evaluate the checkpoint in one process")
    cfg.load_from, cfg.resume = args.checkpoint, False
    given = copy.deepcopy(cfg)
    check_data(cfg, "test")
    if args.show_dir if detection else args.out:
        check_names(cfg)
    checkpoint = read_checkpoint(args.checkpoint, args.unsafe)
    model = build_model(cfg)
    first = local_rank(cfg.launcher) == 0
    loaded = set(check_fit(checkpoint, args.checkpoint, model, warn=first))
    if not args.other_conditioning:
        check_conditioning(checkpoint, args.checkpoint, model)
    if first and cfg.launcher != "none" and (args.show or args.show_dir):
        print("warning: the first process alone draws, its share of the images; run test.py for all", file=sys.stderr)
    if args.tta:
        add_tta(cfg, model)
        add_tta(given, model)
    del checkpoint, model
    test(cfg, args, loaded, given)
    leave_processes()


def test(cfg: Config, args: Namespace, replaced: set[str], given: Config) -> None:
    """Evaluate the model with mmengine's runner.

    Args:
        cfg: The configuration.
        args: The command line.
        replaced: Keys of the weights that the checkpoint provides.
        given: The configuration before it was adapted to the data.
    """
    name = str(Path(cfg.filename).with_suffix("")) + "_test.py"
    for each in (cfg, given):  # the runner saves the configuration under this name, beside that of the training
        object.__setattr__(each, "_filename", name)
    runner = build_runner(cfg, args.other_conditioning, given)
    drop_pretrained(runner.model, replaced)
    if args.out and cfg.default_scope == "mmdet":
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    runner.test()


def check_pickle(path: Path) -> None:
    """Raise a UserError if the predictions of a detector cannot be written to ``path``."""
    if path.suffix not in (".pkl", ".pickle") or path.is_dir():
        found = f"the folder {path}" if path.is_dir() else path
        raise UserError(f"--out: expected a pickle file (.pkl, .pickle) for a detection configuration, got {found}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--out: {path} may not be written; name another file")


def check_names(cfg: Config) -> None:
    """Raise a UserError if files that are named after the images of the test data would replace one another.

    mmdet's pictures have the whole names of the images, and mmseg's label maps the names without suffix; mmseg's
    pictures are numbered.
    """
    with redirect_stdout(StringIO()):  # pycocotools prints its progress
        dataset = DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset))
    samples = (dataset.get_data_info(i) for i in range(len(dataset)))
    paths = {Path(sample["img_path"]) for sample in samples if "img_path" in sample}
    option, part, what = (
        ("--show-dir", "name", "names") if cfg.default_scope == "mmdet" else ("--out", "stem", "names without suffix")
    )
    names = Counter(getattr(path, part) for path in paths)
    if twice := [name for name, number in names.items() if number > 1]:
        raise UserError(
            f"{option} expects images with different {what}, after which the files are named, found several with the "
            f"same ({some(twice)}); rename them, or use tools/predict.py, which keeps folders and suffixes"
        )


def draw_predictions(cfg: Config, args: Namespace) -> None:
    """Let the configuration's visualization hook draw every prediction."""
    hook = (cfg.get("default_hooks") or {}).get("visualization")
    known = signature(class_of(hook, HOOKS)).parameters if hook else {}
    if not {"draw", "interval", "show"} <= set(known) or not cfg.get("visualizer"):
        raise UserError(
            f"--show and --show-dir expect a visualizer and default_hooks.visualization, such as "
            f"DetVisualizationHook or SegVisualizationHook, in {cfg.filename}"
        )
    hook.update(draw=True, interval=1)
    if args.show:
        hook.update(show=True, wait_time=args.wait_time)
    if args.show_dir:
        # mmdet and mmseg would take a relative path as relative to the run's folder in the work directory.
        folder = str(Path(args.show_dir).absolute())
        if cfg.default_scope == "mmdet":
            hook.update(test_out_dir=folder)
        else:
            cfg.visualizer.update(save_dir=folder)


def save_label_maps(cfg: Config, folder: str) -> None:
    """Let the evaluators of a segmentation configuration save the predicted label maps."""
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    for evaluator in evaluators:
        evaluator.update(output_dir=folder, keep_results=True)


if __name__ == "__main__":
    run_tool(main)
