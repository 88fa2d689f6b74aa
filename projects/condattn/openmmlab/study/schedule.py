"""Scheduler that executes the missing runs of a study, several at once, and shows their progress in a table."""

import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ..errors import FULL
from .plan import FINAL, PILOT, TUNING, RunId, Study, chosen_rates, missing_runs, planned_runs
from .results import FAILED, Results
from .run import progress

POLL = 2.0
"""Seconds between checks of the running processes."""
PAUSE = 30.0
"""Seconds until a run that another process executes is tried again."""
TRIES = 2
"""How often a run is started before its error is reported."""
BUSY = 75
"""Exit status of the command of a run that another process executes (EX_TEMPFAIL)."""
NO_SPACE = tuple(map(os.strerror, FULL))
"""Parts of the error messages of runs for which the disk is full; no further run is started."""


@dataclass
class Job:
    """A run and the process that executes it."""

    run: RunId
    process: subprocess.Popen
    began: float
    slot: int


class Pool:
    """Executes runs in parallel processes until none is missing.

    Args:
        study: The study.
        results: Results of the study.
        command: Command that executes one run; the run's name is appended.
        jobs: Number of runs at a time.
        only: Variants to run; all if empty.
        runs: Runs to execute instead of those that the study needs.
    """

    def __init__(
        self,
        study: Study,
        results: Results,
        command: list[str],
        jobs: int,
        only: Iterable[str] = (),
        runs: Iterable[RunId] | None = None,
    ) -> None:
        self.study, self.results, self.command, self.size = study, results, command, jobs
        self.only, self.runs = list(only), None if runs is None else list(runs)
        self.jobs: list[Job] = []
        self.errors: dict[RunId, str] = {}
        self.tries: Counter[RunId] = Counter()
        self.busy: dict[RunId, float] = {}
        self.seconds: list[float] = []
        self.console = Console()

    def missing(self) -> list[RunId]:
        """Runs that have no result, are not running, and have not ended with an error too often in this pool."""
        scores = self.results.scores()
        if self.runs is None:
            wanted = missing_runs(self.study, scores, self.only)
        else:
            wanted = [run for run in self.runs if run not in scores]
        running = {job.run for job in self.jobs}
        return [run for run in wanted if run not in running and self.tries[run] < TRIES]

    def work(self) -> dict[RunId, str]:
        """Execute all missing runs; wait for those that another process executes.

        Returns:
            Run -> error message, of the runs that could not be finished; a new pool tries them again.
        """
        live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        try:
            if live:
                live.start()
            while True:
                self._collect()
                missing = [] if self._is_disk_full() else self.missing()
                ready = [run for run in missing if self.busy.get(run, 0.0) <= time.monotonic()]
                while ready and len(self.jobs) < self.size:
                    self._start(ready.pop(0))
                if live:
                    live.update(self.table(), refresh=True)
                if not self.jobs and not missing:
                    done = self.results.records()  # another pool may have finished a run that failed here
                    return {run: reason for run, reason in self.errors.items() if run not in done}
                time.sleep(POLL)
        finally:
            if live:
                live.stop()
            for job in self.jobs:
                job.process.terminate()
            for job in self.jobs:
                job.process.wait()

    def _start(self, run: RunId) -> None:
        slot = min(set(range(self.size)) - {job.slot for job in self.jobs})
        env = dict(os.environ)
        if number := torch.cuda.device_count():
            devices = env.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(number)))).split(",")
            env["CUDA_VISIBLE_DEVICES"] = devices[slot % number]
        process = subprocess.Popen(
            [*self.command, str(run)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.jobs.append(Job(run, process, time.monotonic(), slot))

    def _collect(self) -> None:
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            errors = [line for line in job.process.stderr.read().splitlines() if line.strip()]
            took = time.monotonic() - job.began
            if job.process.returncode == BUSY:
                self.busy[job.run] = time.monotonic() + PAUSE
                continue
            if job.process.returncode:
                self.tries[job.run] += 1
                self.errors[job.run] = errors[-1].removeprefix("error: ") if errors else "it was stopped"
                self.console.print(f"{job.run}: {self.errors[job.run]}", style="red", highlight=False, soft_wrap=True)
                continue
            self.errors.pop(job.run, None)
            record = self.results.records()[job.run]
            if not record.origin:
                self.seconds.append(took)
            score = record.score * self.study.factor
            note = f"failed: {record.error}" if record.status == FAILED else f"{score:.2f}"
            self.console.print(f"{job.run}: {note} ({took / 60:.1f} min)", highlight=False, soft_wrap=True)

    def _is_disk_full(self) -> bool:
        return any(part in reason for reason in self.errors.values() for part in NO_SPACE)

    def to_go(self) -> int:
        """Number of runs that are not finished, with the final ones, which are not known before the tuning ends."""
        known = len(self.missing()) + len(self.jobs)
        if self.runs is not None or chosen_rates(self.study, self.results.scores()):
            return known
        return known + len(set(self.only) or self.study.variants) * len(self.study.seeds)

    def table(self) -> Table:
        """Table of the progress of each variant, with the estimated time that is left."""
        records = self.results.records()
        planned = self.runs if self.runs is not None else planned_runs(self.study, self.results.scores())
        table = Table(title=f"{self.study.name}: {self.study.title}", caption=self._time_left())
        stages = (PILOT,) if self.results.pilot else (TUNING, FINAL)
        for name in ("variant", *stages, "failed", "running"):
            table.add_column(name, justify="left" if name in ("variant", "running") else "right")
        for variant in self.study.variants:
            cells = []
            for stage in stages:
                runs = [run for run in planned if (run.variant, run.stage) == (variant, stage)]
                total = len(runs) or (len(self.study.seeds) if stage == FINAL else 0)
                cells.append(f"{sum(run in records for run in runs)}/{total}")
            failed = sum(r.status == FAILED for run, r in records.items() if run.variant == variant)
            running = [
                f"{job.run.stage} {job.run.seed} {progress(self.results.work / 'runs', job.run):.0%}"
                for job in self.jobs
                if job.run.variant == variant
            ]
            table.add_row(variant, *cells, str(failed or ""), ", ".join(running))
        return table

    def _time_left(self) -> str:
        runs = self.to_go()
        if not self.seconds:
            return f"{runs} runs to go"
        minutes = (runs - len(self.jobs) / 2) * statistics.mean(self.seconds) / self.size / 60
        return f"{runs} runs to go, about {int(minutes // 60)} h {int(minutes % 60)} min"


def run_command(study: Study, size: str | None, tool: Path) -> list[str]:
    """Command that executes one run of a study, with the data of the environment; the run's name is to be appended."""
    data = os.environ[study.data["variable"]] if study.data else None
    options = [*(["--size", size] if size else []), *(["--data", data] if data else [])]
    return [sys.executable, str(tool), str(study.path), *options, "--run"]
