"""Scheduler that executes the missing runs of a study, several at once, and shows their progress in a table."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .plan import FINAL, TUNING, RunId, Study, missing_runs, planned_runs
from .results import FAILED, Results
from .run import progress

POLL = 2.0
"""Seconds between checks of the running processes."""


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
        self.seconds: list[float] = []
        self.console = Console()

    def missing(self) -> list[RunId]:
        """Runs that have no result, are not running, and have not ended with an error in this pool."""
        scores = self.results.scores()
        if self.runs is None:
            wanted = missing_runs(self.study, scores, self.only)
        else:
            wanted = [run for run in self.runs if run not in scores]
        running = {job.run for job in self.jobs}
        return [run for run in wanted if run not in running and run not in self.errors]

    def work(self) -> dict[RunId, str]:
        """Execute all missing runs.

        Returns:
            Run -> error message, of the runs that could not be finished; a new pool tries them again.
        """
        live = Live(console=self.console, auto_refresh=False) if self.console.is_terminal else None
        try:
            if live:
                live.start()
            while True:
                self._collect()
                missing = self.missing()
                while missing and len(self.jobs) < self.size:
                    self._start(missing.pop(0))
                if live:
                    live.update(self.table(), refresh=True)
                if not self.jobs:
                    return self.errors
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
        if torch.cuda.device_count() and "CUDA_VISIBLE_DEVICES" not in env:
            env["CUDA_VISIBLE_DEVICES"] = str(slot % torch.cuda.device_count())
        process = subprocess.Popen(
            [*self.command, str(run)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.jobs.append(Job(run, process, time.monotonic(), slot))

    def _collect(self) -> None:
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            errors = [line for line in job.process.stderr.read().splitlines() if line.strip()]
            took = time.monotonic() - job.began
            if job.process.returncode:
                self.errors[job.run] = errors[-1].removeprefix("error: ") if errors else "it was stopped"
                self.console.print(f"{job.run}: {self.errors[job.run]}", style="red", highlight=False, soft_wrap=True)
                continue
            self.seconds.append(took)
            record = self.results.records()[job.run]
            score = record.score * self.study.factor
            note = f"failed: {record.error}" if record.status == FAILED else f"{score:.2f}"
            self.console.print(f"{job.run}: {note} ({took / 60:.1f} min)", highlight=False, soft_wrap=True)

    def table(self) -> Table:
        """Table of the progress of each variant, with the estimated time for the runs that are known to be needed."""
        records = self.results.records()
        planned = self.runs if self.runs is not None else planned_runs(self.study, self.results.scores())
        table = Table(title=f"{self.study.name}: {self.study.title}", caption=self._time_left(len(self.missing())))
        for name in ("variant", TUNING, FINAL, "failed", "running"):
            table.add_column(name, justify="left" if name in ("variant", "running") else "right")
        for variant in self.study.variants:
            cells = []
            for stage in (TUNING, FINAL):
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

    def _time_left(self, missing: int) -> str:
        if not self.seconds:
            return f"{missing + len(self.jobs)} runs to go"
        minutes = (missing + len(self.jobs) / 2) * statistics.mean(self.seconds) / self.size / 60
        return f"{missing + len(self.jobs)} runs to go, about {int(minutes // 60)} h {int(minutes % 60)} min"


def run_command(study: Study, size: str | None, data: str | None, tool: Path) -> list[str]:
    """Command that executes one run of a study, with data in the folder ``data``; the run's name is to be appended."""
    options = [*(["--size", size] if size else []), *(["--data", str(Path(data).absolute())] if data else [])]
    return [sys.executable, str(tool), str(study.path), *options, "--run"]
