"""What a person sees while a run goes on: a progress bar on a terminal, plain lines elsewhere; and how errors look."""

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from cl_dist.errors import ClDistError

out = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
"""Results: stdout."""
err = Console(stderr=True, highlight=False)
"""Everything else: stderr."""
LINE = "%(asctime)s %(levelname)-5s %(name)s  %(message)s"


def start_logging(verbose: bool) -> None:
    """Send our warnings (everything with -v) to stderr, and keep other libraries quiet."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(LINE, "%H:%M:%S"))
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING)
    root = logging.getLogger("cl_dist")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False


@contextmanager
def results_only() -> Iterator[TextIO]:
    """Yield stdout, and keep off it and off the screen what libraries write while they load and save models."""
    from transformers.utils import logging as untyped

    noise: Any = untyped
    stdout, bars = sys.stdout, noise.is_progress_bar_enabled()
    noise.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers may import, logs to what stdout is by then
            yield stdout
    finally:
        if bars:
            noise.enable_progress_bar()


def log_to(path: Path) -> logging.Handler:
    """Also write the log to a file of the run folder; return the handler, to be removed when the run ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf8")
    handler.setFormatter(logging.Formatter(LINE))
    logging.getLogger("cl_dist").addHandler(handler)
    return handler


class Watch:
    """Shows the events of a run. Use as a context manager and as the tracker's watcher."""

    def __init__(self) -> None:
        self._log = logging.getLogger("cl_dist.run")
        self._bar: TaskID | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=err,
            disable=not err.is_terminal,
        )

    def __enter__(self) -> "Watch":
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        kind, stage = event["event"], event.get("stage", "")
        if kind == "step":
            if self._bar is not None:
                self._progress.update(self._bar, completed=event["step"], total=event["total_steps"])
            return
        if kind == "stage_start":
            note = "starting workers" if event["kind"] == "train" else ""
            self._bar = self._progress.add_task(stage, total=None, note=note)
        elif kind == "round" and self._bar is not None:
            note = f"loss {event['train/loss']:.3f}"
            if "dev/accuracy" in event:
                note += f"  dev accuracy {event['dev/accuracy']:.3f}"
            self._progress.update(self._bar, completed=event["step"], total=event["total_steps"], note=note)
        elif kind == "stage_done" and self._bar is not None:
            scores = ", ".join(
                f"{task} {value:.3f}" for task, value in event.get("accuracy", {}).items() if value is not None
            )
            if scores:
                self._progress.update(self._bar, note=scores)
            self._progress.stop_task(self._bar)
            self._bar = None
        self._plain(event)

    def _plain(self, event: Mapping[str, Any]) -> None:
        """Write one line: to the log file always, to stderr where no bar is shown."""
        skipped = {"ts", "event", "stage", "task", "kind", "metrics", "tasks"}
        words = [f"{key}={_short(value)}" for key, value in event.items() if key not in skipped]
        line = " ".join([event["event"], *([f"stage={event['stage']}"] if "stage" in event else []), *words])
        self._log.info(line)
        if not err.is_terminal:
            err.print(f"{event['ts'][11:19]} {line}", soft_wrap=True, markup=False)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{_short(item)}" for key, item in value.items())
    return str(value)


def comparison(summaries: list[dict[str, Any]]) -> Table:
    """Return the table of runs: the main one first, then its baselines."""
    table = Table(title="Average over tasks, after the last one")
    columns = {
        "cl/avg_acc": "accuracy",
        "cl/f1_macro": "macro F1",
        "cl/learning_acc": "when learned",
        "cl/forgetting_max": "forgetting",
        "cl/bwt": "backward transfer",
        "cl/fwt_one": "transfer vs. own model",
    }
    table.add_column("run")
    for heading in columns.values():
        table.add_column(heading, justify="right")
    for summary in summaries:
        values = [summary["metrics"].get(name, {}).get("value") for name in columns]
        table.add_row(f"{summary['run']} ({summary['method']})", *("-" if v is None else f"{v:.4f}" for v in values))
    majority = [task["majority"] for task in summaries[0]["tasks"]]
    table.add_row("always the commonest label", f"{sum(majority) / len(majority):.4f}", *[""] * (len(columns) - 1))
    return table


def show_error(error: BaseException, verbose: bool, as_json: bool) -> int:
    """Tell a person (or a program) what went wrong; return the exit code."""
    code = error.exit_code if isinstance(error, ClDistError) else 1
    if verbose or code == 1:
        err.print("".join(traceback.format_exception(error)), markup=False, soft_wrap=True)
    if as_json:
        out.print_json(json.dumps({"code": code, "kind": type(error).__name__, "message": str(error)}))
    elif code != 1:
        err.print(f"[bold red]{type(error).__name__}[/]", end=": ")
        err.print(str(error), markup=False, soft_wrap=True)
    else:
        err.print("This is a fault of cl-dist; please report it with the lines above and `cl-dist env`.")
    return code
