"""Run a study, the same training under several conditionings, equally tuned and with several seeds; then report it."""

import os
import shlex
import shutil
import signal
import sys
from argparse import ArgumentParser, Namespace
from contextlib import redirect_stdout
from pathlib import Path

from mmengine.logging import MMLogger

from condattn.openmmlab.errors import UserError, run_tool
from condattn.openmmlab.study.check import check_checkpoints, check_study, data_hash
from condattn.openmmlab.study.plan import FINAL, PILOT, RunId, Study, load_study, missing_runs, pilot_runs
from condattn.openmmlab.study.report import report_pilot, write_documents, write_report
from condattn.openmmlab.study.results import FINISHED, Results, same_data, same_versions, versions
from condattn.openmmlab.study.run import BusyError, RunError, execute, git, under_way, worktree
from condattn.openmmlab.study.schedule import BUSY, Pool, run_command
from condattn.wording import some

ROOT = Path(__file__).resolve().parents[1]


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("study", help="a file of configs/studies")
    parser.add_argument("--size", help="one of the sizes of the study, such as gpu (default: its first, for a CPU)")
    parser.add_argument("--data", help="folder of the data (default: the study's environment variable, or its default)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, one thread or GPU each (default: 1)")
    parser.add_argument("--only", nargs="+", default=[], metavar="VARIANT", help="run these variants alone")
    parser.add_argument(
        "--commit",
        help="at the first start, the commit whose code runs (default: HEAD), such as that of another study, whose "
        "equal runs are then taken over",
    )
    parser.add_argument(
        "--data-checked",
        action="store_true",
        help="with --run: the data were checked when the study was started, as its own runs are; do not check again",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print one command for each run that is missing, and stop")
    what.add_argument("--pilot", action="store_true", help="run the baseline on the pilot seeds, and report its length")
    what.add_argument("--report-only", action="store_true", help="report what there is, and run nothing")
    what.add_argument(
        "--rerun",
        metavar="RUN",
        help="repeat a finished run, such as pc/0 (VARIANT/SEED), with the code and packages of today; if the result "
        "is the same bit for bit, they are used for what is missing",
    )
    what.add_argument("--run", metavar="RUN", help="run this one alone, as --list names it")
    return parser.parse_args()


def main() -> int:
    """Run, list or report the study, as the command line asks."""
    args = parse_args()
    signal.signal(signal.SIGTERM, end)
    study = load_study(args.study, args.size)
    results = Results(study, ROOT, pilot=args.pilot or (args.run or "").startswith(PILOT))
    if unknown := [name for name in args.only if name not in study.variants]:
        raise UserError(f"--only: no variant {', '.join(unknown)} in {study.path}; it has {', '.join(study.variants)}")
    if args.only and (args.pilot or args.report_only or args.rerun or args.run):
        raise UserError("--only chooses among the runs of a study, not with --pilot, --report-only, --rerun or --run")
    if args.data_checked and not args.run:
        raise UserError("--data-checked goes with --run; a study's start always checks the data")
    if args.jobs < 1:
        raise UserError(f"--jobs: expected at least 1, got {args.jobs}")
    if args.commit and (args.run or args.rerun or args.report_only):
        raise UserError("--commit chooses the code at the start of a study, not with --run, --rerun or --report-only")
    if args.report_only:
        results.header()
        return report(study, results)
    set_data(study, args.data)
    MMLogger.get_current_instance().setLevel("ERROR")
    if args.run:
        return run_one(study, results, args.run, args.data_checked)
    if args.rerun:
        return rerun(study, results, args.rerun)
    with redirect_stdout(sys.stderr):  # what libraries print while they read the data is not in the list of --list
        begin(study, results, args.commit)
    runs = pilot_runs(study) if args.pilot else None
    command = run_command(study, args.size, Path(__file__))
    if args.list:
        for run in missing_runs(study, results.scores(), args.only):
            print(shlex.join([*command, str(run)]))
        return 0
    command.insert(-1, "--data-checked")
    errors = Pool(study, results, command, args.jobs, args.only, runs).work()
    for run, reason in errors.items():
        print(f"error: {run} is not finished: {reason}", file=sys.stderr)
    if args.pilot:
        print(report_pilot(study, results))
    else:
        report(study, results)
    return 1 if errors else 0


def end(number: int, frame: object) -> None:
    """Exit, which ends the processes of runs as well; a further signal does not disturb that."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def set_data(study: Study, folder: str | None) -> None:
    """Set the environment variable by which the configuration finds the data."""
    if folder and not study.data:
        raise UserError(f"--data: {study.path} brings its own data")
    if study.data:
        os.environ[study.data["variable"]] = str(
            Path(folder or os.environ.get(study.data["variable"]) or study.data["default"]).absolute()
        )


def begin(study: Study, results: Results, commit: str | None = None) -> None:
    """Check a study, and record its code, packages and data at the first start; later, check that they are the same.

    Raises:
        UserError: If the code has uncommitted changes at the first start, packages or data have changed since then, or
            ``commit`` is unknown or another than that with which the study began.
    """
    check_checkpoints(study, study.pilot_seeds if results.pilot else [*study.tuning_seeds, *study.seeds], ROOT)
    chosen = git(ROOT, "rev-parse", "--verify", f"{commit}^{{commit}}") if commit else None
    replaced = results.pilot and results.started and not results.same_study()
    if results.started and not replaced:
        results.header()
    if not results.started or replaced or (chosen and not results.records()):
        if running := under_way(results):
            raise UserError(f"--commit: runs of {study.name} are under way ({some(running)}); end them first")
        check_committed()
        chosen = chosen or git(ROOT, "rev-parse", "HEAD")
        code = worktree(ROOT, chosen)
        data = check_study(study, code, ROOT)
        if replaced:
            print(f"{results.folder} is of another definition of the study; this pilot replaces it")
            shutil.rmtree(results.folder)
        results.write_header(commit=chosen, versions=versions(), data=data)
        return
    if chosen and chosen != (found := results.header()["commit"]):
        raise UserError(
            f"--commit: {study.name} began with {found[:12]}, not {chosen[:12]}; leave the option out, or, with the "
            "other code checked out, show that results are the same: --rerun VARIANT/SEED"
        )
    check_packages(study, results)
    check_data(study, results)


def check_committed() -> None:
    """Check that the code has no changes which are not committed.

    Raises:
        UserError: If it has.
    """
    if changed := git(ROOT, "status", "--porcelain", "--", "projects", "tools", "configs"):
        raise UserError(f"a study runs the code of a commit; commit what is not: {changed.splitlines()[0].strip()}")


def check_data(study: Study, results: Results) -> None:
    """Check that the data are those with which the study began.

    Raises:
        UserError: If they are not.
    """
    header = results.header()
    found = data_hash(study, worktree(ROOT, header["commit"]), ROOT)
    if not same_data(header.get("data", found), found):
        folder = f" in {os.environ[study.data['variable']]}" if study.data else ""
        raise UserError(
            f"{study.name} began with other data than those{folder}: names, sizes, labels or the split of the "
            "images differ; give the same data, or start a new study under another name"
        )


def check_packages(study: Study, results: Results) -> None:
    """Check that the packages are those with which the study began.

    Raises:
        UserError: If they are not.
    """
    recorded, present = results.header()["versions"], versions()
    if not same_versions(recorded):
        known = recorded.keys() | {"gpu"}
        names = ", ".join(sorted(name for name in known if recorded.get(name) != present.get(name)))
        raise UserError(
            f"{study.name} began with other packages, or on another kind of machine ({names}); use those of "
            f"{results.folder / 'study.json'}, or "
            "show that results are the same: --rerun VARIANT/SEED"
        )


def run_one(study: Study, results: Results, name: str, data_checked: bool) -> int:
    """Execute one run in this process; ``data_checked`` says that another process has just checked the data."""
    stage, variant, seed, rate = (name.split("/") + [""] * 4)[:4]
    try:
        run = RunId(stage, variant, int(seed), float(rate))
    except ValueError as error:
        raise UserError(f"--run: expected STAGE/VARIANT/SEED/RATE, got {name}") from error
    check_packages(study, results)
    if run in results.records():
        return 0
    if run not in [*missing_runs(study, results.scores()), *pilot_runs(study)]:
        raise UserError(f"--run: {name} is no run that {study.name} needs now; --list prints those")
    if not data_checked:
        check_data(study, results)
    try:
        execute(study, results, run, ROOT, results.header()["commit"])
    except BusyError as error:
        print(f"error: {error}", file=sys.stderr)
        return BUSY
    except RunError as error:
        raise UserError(error) from error
    return 0


def rerun(study: Study, results: Results, name: str) -> int:
    """Repeat a final run with the current code and packages; use them for the missing runs if the results are equal."""
    results.header()
    check_committed()
    check_data(study, results)
    records = [record for record in results.records().values() if record.status == FINISHED]
    finished = {f"{one.run.variant}/{one.run.seed}": one for one in records if one.run.stage == FINAL}
    if name not in finished:
        raise UserError(f"--rerun: expected a finished run such as {next(iter(finished), 'none yet')}, got {name}")
    commit = git(ROOT, "rev-parse", "HEAD")
    try:
        record = execute(study, results, finished[name].run, ROOT, commit, keep=False)
    except RunError as error:
        raise UserError(error) from error
    if not record.same_results(finished[name]):
        raise UserError(
            f"{name} gives {record.score!r} and {record.reported} with the code of {commit[:12]} and the packages of "
            f"today, {finished[name].score!r} and {finished[name].reported} before; they are not used for this study"
        )
    verified = [*results.header().get("verified", []), f"{name} at {commit}"]
    results.write_header(commit=commit, versions=versions(), verified=verified)
    print(f"{name} is the same bit for bit; what is missing is run with {commit[:12]}")
    return 0


def report(study: Study, results: Results) -> int:
    """Write the report, and update the tables in the documentation."""
    for path in (*write_report(study, results), *write_documents(ROOT)):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    run_tool(main)
