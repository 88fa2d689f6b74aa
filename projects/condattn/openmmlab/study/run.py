"""Execution of one run of a study: train and evaluate in a clean copy of the code, and record the results."""

import fcntl
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from mmengine.config import Config

from ...weights.atomic import write_atomically
from ...weights.files import BadFileError, read_file
from ..errors import UserError
from .plan import FINAL, RunId, Study, short_hash
from .results import FAILED, FINISHED, Record, Results, versions

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
DIVERGED = "is not finite in iteration"
"""Part of the error messages of :mod:`..hooks.finite_loss`."""

EMPTY = {"data_time", "time", "step"}
"""What mmengine logs of an evaluation that reports nothing."""


class RunError(Exception):
    """Raised if a run could not be finished and has to be started again."""


class BusyError(RunError):
    """Raised if another process executes the run."""


def git(root: Path, *arguments: str) -> str:
    """Run git in the repository ``root`` and return its output.

    Raises:
        UserError: If git fails.
    """
    result = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if result.returncode:
        reason = " ".join(result.stderr.split()) or f"status {result.returncode}"
        raise UserError(f"git {' '.join(arguments)} failed in {root}: {reason}")
    return result.stdout.strip()


def worktree(root: Path, commit: str) -> Path:
    """Folder with a clean copy of the code at ``commit``, which is made on the first call.

    Raises:
        UserError: If the repository does not have the commit, or files of the copy were changed.
    """
    folder = root / "work_dirs" / "studies" / "code" / commit
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        if not (folder / ".git").exists():
            git(root, "worktree", "prune")
            git(root, "worktree", "add", "--force", "--detach", str(folder), commit)
        elif changed := git(folder, "status", "--porcelain"):
            raise UserError(f"{folder} is changed ({changed.splitlines()[0].strip()}); remove it, and it is made anew")
    return folder


def training_config(study: Study, run: RunId, code: Path, root: Path) -> Config:
    """Make the configuration of a run: apply the options of study and variant, the seed, the rate and the evaluations.

    Args:
        study: The study.
        run: The run.
        code: Folder with the copy of the code whose configuration file is read.
        root: Folder of the repository that contains the study's file.

    Raises:
        UserError: As :func:`code_file`, or if an option does not exist, or the length of the training is not given in
            iterations.
    """
    path = code_file(study, code, root)
    cfg = Config.fromfile(path, import_custom_modules=False)
    options = {**study.options, **study.variants[run.variant], study.rate: run.rate}
    for key, value in options.items():
        _set(cfg, key, _with_start(value, study, run.seed, root), study.path)
    iterations = cfg.train_cfg.get("max_iters")
    if type(iterations) is not int or not iterations or iterations % study.evaluations:
        raise UserError(
            f"{path}: expected train_cfg.max_iters, a multiple of {study.evaluations} evaluations, found {iterations}"
        )
    interval = iterations // study.evaluations
    cfg.train_cfg.val_interval = interval
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=interval, max_keep_ckpts=1)
    cfg.default_hooks.logger.log_metric_by_epoch = False
    for hook in cfg.get("custom_hooks") or ():
        if hook["type"] == "SpectraHook":
            hook["interval"] = interval
    for loader in LOADERS:
        cfg[loader].update(num_workers=0, persistent_workers=False)
    cfg.randomness = {**(cfg.get("randomness") or {}), "seed": run.seed}
    return cfg


def code_file(study: Study, code: Path, root: Path) -> Path:
    """The configuration file of a study in ``code``, a copy of the repository ``root``.

    Raises:
        UserError: If it is missing there, or lies outside the repository.
    """
    if not study.config.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{study.path}: expected a configuration in {root}, whose commits a study runs")
    path = code / study.config.resolve().relative_to(root.resolve())
    if not path.is_file():
        raise UserError(f"{study.path}: no configuration {path}; correct the name, or commit the file")
    return path


def start_of(study: Study, seed: int, root: Path) -> Path:
    """The checkpoint that the training of a seed starts from."""
    return root / study.start["checkpoint"].format(seed=seed)


def hash_of_weights(path: Path) -> str:
    """Hash of the weights in a checkpoint; what else it holds, such as the time of the training, does not count.

    Raises:
        UserError: If the file cannot be read, or holds no weights.
    """
    try:
        content = read_file(path)
    except BadFileError as error:
        raise UserError(error) from error
    weights = content.get("state_dict", content) if isinstance(content, Mapping) else {}
    tensors = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no weights to start from; expected a checkpoint with a state_dict")
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _with_start(value: Any, study: Study, seed: int, root: Path) -> Any:
    """An option's value with the checkpoint of the seed in the place of ``{start}``."""
    if isinstance(value, dict):
        return {key: _with_start(child, study, seed, root) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_start(child, study, seed, root) for child in value)
    return str(start_of(study, seed, root)) if study.start and value == "{start}" else value


def _set(cfg: Config, key: str, value: Any, where: Path) -> None:
    """Set an option, which must exist; only the last part of an option of a module of the model may be new."""
    *parents, last = key.split(".")
    place: Any = cfg
    for name in parents:
        place = place[_index(place, name, key, where)]
    if parents[:1] == ["model"] and isinstance(place, dict) and "type" in place:
        place[last] = value
    else:
        place[_index(place, last, key, where)] = value


def _index(place: Any, name: str, key: str, where: Path) -> str | int:
    """Return ``name`` as the key of ``place``: an integer if ``place`` is a list."""
    if isinstance(place, list) and name.isdecimal() and int(name) < len(place):
        return int(name)
    if isinstance(place, dict | Config) and name in place:
        return name
    raise UserError(f"{where}: option {key}: the configuration has no {name!r} there")


def execute(study: Study, results: Results, run: RunId, root: Path, commit: str, keep: bool = True) -> Record:
    """Train and evaluate a run, and record it; an interrupted run is resumed.

    The record of the same training in another study, with equal code and packages, is taken over.

    Args:
        study: The study.
        results: Results of the study.
        run: The run.
        root: Folder of the repository.
        commit: Commit of the code to run.
        keep: Add the record to the results; otherwise the run's files are deleted.

    Raises:
        UserError: If the configuration of the training, or the checkpoint that it starts from, is another than that of
            the study's earlier runs.
        RunError: If the run could not be finished; it can be started again.
        BusyError: If another process executes it.
    """
    folder = results.work / "runs" / (str(run).replace("/", "_") + ("" if keep else f"_{commit[:12]}"))
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder, run) as lock:
        if keep and (record := results.records().get(run)):
            return record
        code = worktree(root, commit)
        check_trainings(study, results, run.variant, code, root, commit)
        start = hash_of_weights(start_of(study, run.seed, root)) if study.start else ""
        check_same_start(results, run, start)
        config, work, packages = folder / "config.py", folder / "train", versions()
        cfg = training_config(study, run, code, root)
        origin = [f"code: {commit}", f"packages: {json.dumps(packages)}", *([f"start: {start}"] if start else [])]
        text = "".join(f"# {line}\n" for line in origin) + cfg.pretty_text
        if not config.is_file() or config.read_text() != text:
            _clean(folder)
            write_atomically(config, lambda part: part.write_text(text), overwrite=True)
        trainings = training_hashes(study, cfg, root)
        if keep and not study.start and (record := results.find_elsewhere(run, trainings, commit)):
            results.add(record)
            return record
        error = _call(code, root, lock, folder / "train.log", "train.py", config, "--work-dir", work, "--resume")
        curve, spectra = read_curves(work, study.metric)
        if error and DIVERGED not in error:
            raise RunError(f"{run}: {error}; the log is {folder / 'train.log'}")
        reported: dict[str, float] = {}
        if not error:
            if lost := _lost(cfg, curve):
                if not curve and (names := _metrics(work)):
                    raise RunError(f"{run}: no {study.metric} in the evaluations, which report {', '.join(names)}")
                _clean(folder)
                raise RunError(f"{run}: no {study.metric} of iteration {', '.join(map(str, lost))}; it begins anew")
            if run.stage == FINAL:
                reported = _evaluate(code, root, lock, folder, study.metric)
        record = Record(
            run=run,
            status=FAILED if error else FINISHED,
            score=curve[-1][1] if curve else 0.0,
            reported=reported,
            curve=curve,
            spectra=spectra,
            error=error,
            commit=commit,
            versions=packages,
            training=trainings[0],
            start=start,
        )
        if keep:
            results.add(record)
            _clean(folder)
        else:
            shutil.rmtree(folder)
    return record


def _clean(folder: Path) -> None:
    """Delete what training and evaluation wrote below the folder of a run, so that the next one begins anew."""
    for name in ("train", "test"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _lost(cfg: Config, curve: list[list[float]]) -> list[int]:
    """Iterations after which the training should have been evaluated, but has no score."""
    interval, iterations = cfg.train_cfg.val_interval, cfg.train_cfg.max_iters
    return sorted(set(range(interval, iterations + 1, interval)) - {step for step, _ in curve})


def _metrics(folder: Path) -> list[str]:
    """Names of the metrics that the evaluations in a training reported."""
    lines = [line for line in _scalars(folder) if "loss" not in line]
    names = {name for line in lines for name in line if not name.startswith("spectra/")}
    return sorted(names - EMPTY)


def training_hashes(study: Study, cfg: Config, root: Path) -> tuple[str, str]:
    """Hashes of a training and its score, wherever the data and the repository are.

    Returns:
        The hash, and that of early records, which depended on line breaks, and so on the length of paths.
    """
    text = f"{study.metric}\n{cfg.pretty_text}"
    if study.data and (folder := os.environ.get(study.data["variable"])):
        text = text.replace(folder, f"${study.data['variable']}")
    unbroken = "".join(text.split())
    if study.start:
        unbroken = unbroken.replace("".join(str(root).split()), "$REPOSITORY")
    return short_hash(unbroken.encode()), short_hash(text.encode())


def check_trainings(study: Study, results: Results, variant: str, code: Path, root: Path, commit: str) -> None:
    """Check that a finished run of a variant would be configured as it was.

    The configuration of a training comes from the study's commit, but the rest of the study's settings is applied to
    it by the present code.

    Raises:
        UserError: If it would be configured otherwise.
    """
    records = (record for record in results.records().values() if record.run.variant == variant)
    record = next((one for one in records if one.training and one.commit == commit), None)
    if record and record.training not in training_hashes(study, training_config(study, record.run, code, root), root):
        raise UserError(
            f"{study.name}: {record.run} is configured otherwise now than when it ran, by the code in "
            f"{Path(__file__).parent} or by a changed environment; check out the code with which the study began"
        )


def check_same_start(results: Results, run: RunId, start: str) -> None:
    """Check that finished runs of a seed started from the weights with the hash ``start``.

    Raises:
        UserError: If one started from another.
    """
    for record in results.records().values():
        if record.run.seed == run.seed and record.start not in ("", start):
            raise UserError(
                f"{record.run} started from other weights ({record.start}) than there are now for seed {run.seed} "
                f"({start}); restore those, or start a new study under another name"
            )


def under_way(results: Results) -> list[str]:
    """Names of the runs of a study that processes execute now."""
    found = []
    for folder in sorted((results.work / "runs").glob("*/")):
        with (folder / "lock").open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(folder.name)
    return found


@contextmanager
def _alone(folder: Path, run: RunId) -> Iterator[IO[str]]:
    """Hold the lock of a run's folder; yields the open file, with which a child process holds the lock as well."""
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"{run} is being run by another process") from error
        yield file


def _call(code: Path, root: Path, lock: IO[str], log: Path, tool: str, *arguments: str | Path) -> str:
    """Run a tool of ``code`` with one thread; return its error message, or an empty string.

    The tool holds ``lock`` as well: if this process is killed, no other one runs in the same folder before the tool
    ends.
    """
    paths = [str(code / "projects"), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    env = {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(paths), "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    command = [sys.executable, str(code / "tools" / tool), *map(str, arguments)]
    with log.open("a") as file:
        before = file.tell()
        process = subprocess.Popen(
            command, cwd=root, env=env, stdout=file, stderr=file, stdin=subprocess.DEVNULL, pass_fds=[lock.fileno()]
        )
        try:
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if not status:
        return ""
    written = log.read_bytes()[before:].decode(errors="replace")
    lines = [line for line in written.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"{tool} ended with status {status}"])[-1].removeprefix("error: ")


def _evaluate(code: Path, root: Path, lock: IO[str], folder: Path, metric: str) -> dict[str, float]:
    """Run the final evaluation of the model in the folder of a run; return its scores by name, 0 if there are none."""
    checkpoint = Path((folder / "train" / "last_checkpoint").read_text().strip())
    log, work = folder / "test.log", folder / "test"
    shutil.rmtree(work, ignore_errors=True)
    if error := _call(code, root, lock, log, "test.py", folder / "config.py", checkpoint, "--work-dir", work):
        raise RunError(f"{error}; the log is {log}")
    for path in work.glob("*/*.json"):
        values = json.loads(path.read_text())
        scores = {name: value for name, value in values.items() if name not in ("time", "data_time")}
        if not scores:
            return {metric: 0.0}
        if metric in scores:
            return {name: value for name, value in scores.items() if isinstance(value, int | float)}
    raise RunError(f"no {metric} in what {log} reports")


def _scalars(folder: Path) -> list[dict[str, Any]]:
    """Logged values of a run in chronological order; lines that an interruption left incomplete are skipped."""
    found = []
    for path in sorted(folder.glob("*/vis_data/scalars.json")):
        for line in path.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def read_curves(folder: Path, metric: str) -> tuple[list[list[float]], dict[str, list[list[float]]]]:
    """Read the evaluations and spectra of a run from its logs; of repeated iterations after a resume, the later count.

    An evaluation that reports nothing has the score 0: mmdet's evaluator reports nothing if there is no prediction.

    Returns:
        List of (iteration, score); quantity -> list of (iteration, median over the attention sites).
    """
    scores: dict[int, float] = {}
    sites: dict[str, dict[int, list[float]]] = {}
    for line in _scalars(folder):
        step = line.get("step")
        if metric in line or line.keys() == EMPTY:
            scores[step] = line.get(metric, 0.0)
        spectra = {name: value for name, value in line.items() if name.startswith("spectra/")}
        for quantity in {name.rpartition("/")[2] for name in spectra}:
            values = [value for name, value in spectra.items() if name.rpartition("/")[2] == quantity]
            sites.setdefault(quantity, {})[step] = values
    medians = {
        quantity: [[step, float(f"{statistics.median(values):.6g}")] for step, values in sorted(steps.items())]
        for quantity, steps in sorted(sites.items())
    }
    return [[step, score] for step, score in sorted(scores.items())], medians


def progress(folder: Path, run: RunId) -> float:
    """Fraction of a run that is done, from 0 to 1, according to its logs."""
    path = folder / (str(run).replace("/", "_"))
    try:
        iterations = Config.fromfile(path / "config.py", import_custom_modules=False).train_cfg.max_iters
        return max((line.get("step", 0) for line in _scalars(path / "train")), default=0) / iterations
    except (OSError, SyntaxError, KeyError, AttributeError):
        return 0.0
