"""The verbs `train`, `resume` and `status`."""

import dataclasses
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich import box
from rich.table import Table

from cl_dist import session
from cl_dist.pace import duration
from cl_dist.run_folder import latest
from cl_dist.stopping import stop_on_signals
from cl_dist.stored_run import Progress, load_run
from launcher import console, runs
from launcher.options import (
    AddTasks,
    AsJson,
    Baselines,
    BaselinesOrLast,
    Config,
    FailIf,
    Local,
    Overrides,
    RunOrLast,
    Smoke,
    Verbose,
)
from launcher.scores import WIDE
from launcher.verbs.quality import parse_gates
from launcher.verbs.report import conclude
from launcher.watch import Watch

RUNS = Path("runs")
"""Folder of run folders, where `resume` and `status` look for the last one."""


def train(
    config: Config,
    overrides: Overrides = None,
    baselines: Baselines = True,
    local: Local = False,
    smoke: Smoke = False,
    fail_if: FailIf = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Train a task sequence and its baselines, and write the report. Finished stages are not computed again."""
    console.start_logging(verbose)
    gates, source = parse_gates(fail_if or []), runs.run_file(config)
    stop_on_signals()
    session.train(
        source,
        overrides=overrides or [],
        baselines=baselines,
        local=local,
        smoke=smoke,
        watch=Watch(),
        report=partial(conclude, gates=gates, as_json=as_json),
        command=_command(),
    )
    if smoke:
        console.err.print("smoke run: a few rows, one epoch; its scores mean nothing", soft_wrap=True)


def resume(
    run: RunOrLast = None,
    overrides: Overrides = None,
    add_tasks: AddTasks = None,
    baselines: BaselinesOrLast = None,
    local: Local = False,
    fail_if: FailIf = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Continue a run that was stopped, killed or extended by tasks. The number of workers may change."""
    console.start_logging(verbose)
    gates, settings = parse_gates(fail_if or []), overrides or []
    if run is not None and "=" in str(run) and not run.exists():  # `cl-dist resume cluster.workers=4`
        run, settings = None, [str(run), *settings]
    folder = latest(RUNS) if run is None else run
    stop_on_signals()
    session.resume(
        folder,
        overrides=settings,
        add_tasks=add_tasks,
        baselines=baselines,
        local=local,
        watch=Watch(),
        report=partial(conclude, gates=gates, as_json=as_json),
        command=_command(),
    )


def _command() -> str:
    return shlex.join(["cl-dist", *sys.argv[1:]])


def status(run: RunOrLast = None, as_json: AsJson = False) -> None:
    """Show the progress of a run and its baselines: stage, step, loss, and the time that is left."""
    lines = load_run(latest(RUNS) if run is None else run).progress()
    if as_json:
        console.document([dataclasses.asdict(line) for line in lines])
        return
    console.out.print(_table(lines, console.out.width))


def _table(lines: Sequence[Progress], width: int) -> Table:
    """Return what each run is at; below 100 columns without attempts and seconds."""
    is_wide = width >= WIDE
    table = Table(box=box.HEAVY_HEAD if is_wide else box.SIMPLE_HEAD, padding=(0, 1) if is_wide else (0, 1, 0, 0))
    headings = ["run", "status", "stages", "next", "step", "loss", "left"]
    for heading in [*headings, *(("attempts", "seconds in stages") if is_wide else ())]:
        is_text = heading in ("run", "status", "next")
        table.add_column(heading, justify="left" if is_text else "right", overflow="fold")
    for line in lines:
        step = "-" if line.step is None else str(line.step)
        step += f"/{line.total_steps}" if line.total_steps is not None else ""
        loss = "-" if line.loss is None else f"{line.loss:.3f}"
        left = "-" if line.left_s is None else duration(line.left_s)
        cells = [line.run, line.status, f"{line.done}/{line.stages}", line.next or "-", step, loss, left]
        table.add_row(*cells, *((str(line.attempts), str(line.seconds)) if is_wide else ()))
    return table
