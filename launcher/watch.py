"""Progress of a run: a header, a line of scores per task and two live bars on a terminal, plain lines elsewhere."""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, redirect_stdout
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from cl_dist.errors import printable
from cl_dist.logs import event_line, log_event
from cl_dist.pace import duration
from launcher import console

PLAIN_SKIPS = ("step", "telemetry", "plan")
"""Events without a line of their own where output is plain; `progress` comes every 30 seconds."""
ENDINGS = ("stopped", "interrupted")
NAME_MAX = 24
"""Longest task name of a row before it is shortened."""
BAR_MIN, BAR_MAX = 8, 60


class Watch:
    """Shows the events of a run. Use as a context manager and as the watcher of `cl_dist.session`."""

    def __init__(
        self, screen: Console | None = None, clock: Callable[[], float] = time.monotonic, command: str = ""
    ) -> None:
        """Print to a terminal; `command` continues a stopped run, by default `cl-dist resume` of its folder."""
        self._screen, self._clock, self._command = screen or console.err, clock, command
        self._is_live = self._screen.is_terminal and not self._screen.is_dumb_terminal
        self.view = _View(clock)
        """The live part, which can be printed at any time."""
        self._live = Live(self.view, console=self._screen, transient=True, refresh_per_second=4)
        self._stack = ExitStack()
        self._is_entered = False
        self._folder = ""
        self._stage: tuple[str, str] | None = None
        self._saved = ""
        self._is_over = False

    def __enter__(self) -> "Watch":
        self._is_entered = True
        if not self._is_live:
            self._stack.enter_context(redirect_stdout(sys.stderr))  # libraries print; stdout is for results
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._is_entered = False
        self._live.stop()
        self._stack.close()
        if kind is KeyboardInterrupt and not self._is_over:
            self._screen.print("interrupted before a stage began", style="yellow" if self._is_live else "")

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        log_event(event)
        if event["event"] == "open":
            self._folder = event["folder"]
        if self._is_live:
            if self._is_entered and not self._live.is_started:
                self._live.start()
            self._show(event)
            self.view.take(event)
            if event["event"] != "step" and self._live.is_started:
                self._live.refresh()
        else:
            self._plain(event)
        self._note_end(event)

    def _show(self, event: Mapping[str, Any]) -> None:
        """Print what stays on the terminal."""
        kind = event["event"]
        if kind == "open":
            self._screen.print(header(event))
        elif kind == "cluster":
            self._screen.print(_facts([("dashboard", event["dashboard"])]))
        elif kind == "plan":
            self.view.plan(event)
        elif kind == "begin":
            self._screen.print()
            for line in self.view.begin(event, self._screen.width):
                self._screen.print(line, soft_wrap=True)
        elif kind == "continued":
            self._screen.print(f"goes on at {_step(event)}", style="yellow", soft_wrap=True)
        elif kind == "stage_done" and "accuracy" in event:
            self._screen.print(self.view.scores(event, self._screen.width), soft_wrap=True)

    def _plain(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind in PLAIN_SKIPS or (kind == "phase" and "stage" in event):
            return
        self._screen.print(f"{event['ts'][11:19]} {event_line(event)}", soft_wrap=True)

    def _note_end(self, event: Mapping[str, Any]) -> None:
        """Print how to go on when the run ends early."""
        kind = event["event"]
        if kind == "stage_start":
            self._stage, self._saved = (event["stage"], event["kind"]), ""
        elif kind == "saved" and "step" in event:
            self._saved = f"saved at {_step(event)}"
        elif kind == "stage_done":
            self._stage = None
        elif kind in ENDINGS:
            saved = self._saved
            if not saved and self._stage is not None:
                kept = "its last checkpoint is" if self._stage[1] == "train" else "its finished shards are"
                saved = f"stopped in {self._stage[0]}; {kept} kept"
            self._end(saved or "finished stages are kept")
        elif kind == "finished":
            self._is_over = True

    def _end(self, text: str) -> None:
        """Print how the run ended and how to go on; the command in a line of its own where both do not fit."""
        self._is_over = True
        text, command = f"{text}; go on with:", self._command or f"cl-dist resume {shlex.quote(self._folder)}"
        is_long = self._is_live and cell_len(f"{text} {command}") > self._screen.width
        between = "\n  " if is_long else " "
        self._screen.print(f"{text}{between}{command}", style="yellow" if self._is_live else "", soft_wrap=True)


def header(event: Mapping[str, Any]) -> Table:
    """Return what a run is, from its first event."""
    others, ids = event["baselines"], event["task_ids"]
    method = event["method"] + (f", then the baselines {', '.join(others)}" if others else "")
    workers = f"{event['workers']}, {_place(event)}"
    return _facts(
        [
            ("run", event["run"]),
            ("method", method),
            ("model", str(event["model"])),
            ("tasks", f"{len(ids)}: {', '.join(ids)}"),
            ("workers", workers),
            ("folder", event["folder"]),
        ]
    )


def _place(event: Mapping[str, Any]) -> str:
    if event["dispatcher"] == "local":
        return "this process, without Ray"
    return f"Ray {'of this run, on this machine' if event['address'] is None else 'at ' + event['address']}"


def _facts(lines: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", width=9)
    table.add_column(overflow="fold")
    for name, value in lines:
        table.add_row(name, Text(printable(value)))
    return table


def _step(event: Mapping[str, Any]) -> str:
    total = f" of {event['total_steps']}" if "total_steps" in event else ""
    return f"step {event['step']}{total} of {event['stage']}"


class _View:
    """The live part of the display: the stage in progress and all stages of all runs."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._began = clock, clock()
        self._spinner = Spinner("dots")
        self._runs: list[Mapping[str, Any]] = []
        self._run: Mapping[str, Any] = {}
        self._done: dict[tuple[str, str], bool] = {}
        self._doing = ""
        self._stage, self._kind, self._label = "", "", ""
        self._step = self._total = 0
        self._numbers: dict[str, float] = {}
        self._left: tuple[float, float] | None = None
        """Seconds left and when that was estimated."""
        self._num_tasks, self._ids = 0, list[str]()

    def take(self, event: Mapping[str, Any]) -> None:
        """Take an event into account."""
        kind = event["event"]
        if kind == "open":
            self._ids, self._num_tasks = event["task_ids"], len(event["task_ids"])
        elif kind == "phase":
            self._doing = event["doing"]
        elif kind == "stage_start":
            self._stage, self._kind, self._doing = event["stage"], event["kind"], _STARTING.get(event["kind"], "")
            self._label = self._name(event)
            self._step = self._total = 0
            self._numbers = {}
        elif kind in ("step", "telemetry", "round", "continued"):
            self._step, self._total = event["step"], event.get("total_steps", self._total)
            names = {"train/loss": "loss", "dev/accuracy": "dev", "steps_per_s": "speed", "stage_left_s": "stage"}
            self._numbers |= {short: event[name] for name, short in names.items() if name in event}
            if kind != "continued" and self._doing != _SAVING:
                self._doing = ""
        elif kind == "stopping":
            self._doing = _SAVING
        elif kind == "stage_done":
            if self._run:
                self._done[self._run["folder"], self._stage] = True
            self._stage = ""
        elif kind == "finished":
            self._stage, self._doing = "", "closing the workers"
        if "left_s" in event:
            self._left = event["left_s"], self._clock()

    def _name(self, event: Mapping[str, Any]) -> str:
        """Return a stage as a person counts: 2/10 movies train, after the name of a baseline."""
        number, ids = event["task"], self._ids
        task = ids[number] if number < len(ids) else event["stage"].partition("/")[0]
        before = f"{self._run['run']}  " if self._run and self._run is not self._runs[0] else ""
        stage = event["stage"].rpartition("/")[2]
        return printable(f"{before}{number + 1}/{self._num_tasks or 1} {task}  {stage}")

    # ------------------------------------------------------------------------------------------ lines that stay

    def plan(self, event: Mapping[str, Any]) -> None:
        """Remember the stages of all runs."""
        self._runs = event["runs"]
        self._done = {(run["folder"], key): done for run in self._runs for key, done in run["stages"].items()}

    def begin(self, event: Mapping[str, Any], width: int) -> Iterator[Text]:
        """Yield the head of a run's matrix, and its finished rows."""
        names = [run["run"] for run in self._runs]
        following = [run for run in self._runs if run["run"] == event["run"] and run is not self._run]
        if not following:
            return
        self._run = following[0]
        number = names.index(event["run"])
        title = event["run"] if event["run"] == self._run["method"] else f"{event['run']} ({self._run['method']})"
        title += f", baseline {number} of {len(self._runs) - 1}" if number else ""
        done, stages = event["done"], event["stages"]
        if 0 < done < stages:
            title += f": goes on after {done} of {stages} stages"
        yield Text(printable(title), style="bold")
        yield _Row(self._ids, width).head()
        for task, cells in enumerate(self._run["accuracy"]):
            if cells[task] is not None and any(
                self._done.get((self._run["folder"], key)) for key in self._keys(task) if key.endswith("/evaluate")
            ):
                yield _Row(self._ids, width).line(task, cells[: task + 1])

    def _keys(self, task: int) -> list[str]:
        return [key for key in self._run["stages"] if key.startswith(f"{task:02d}-")]

    def scores(self, event: Mapping[str, Any], width: int) -> Text:
        """Return the row of the accuracy matrix that a finished task adds."""
        ids = self._ids or list(event["accuracy"])
        return _Row(ids, width).line(event.get("task", len(event["accuracy"]) - 1), list(event["accuracy"].values()))

    # ------------------------------------------------------------------------------------------ live lines

    def __rich_console__(self, screen: Console, options: ConsoleOptions) -> RenderResult:
        """Render at most two lines that fit the width."""
        width = options.max_width
        yield self._line_of_stage(width)
        if self._done:
            yield self._line_of_all(width)

    def _line_of_stage(self, width: int) -> Table:
        spinner = str(self._spinner.render(self._clock()))
        label = Text(self._label if self._stage else "", style="cyan")
        if self._doing or not self._stage:
            what = self._doing or "checking stored files"
            text = Text.assemble(spinner, " ", label, "  " if label else "", (what, "dim"))
            text.truncate(width, overflow="ellipsis")
            return _row([text])
        notes, numbers = [], self._numbers
        if self._total:
            notes.append((f"{self._step}/{self._total}", 9))
        if "loss" in numbers:
            notes.append((f"loss {numbers['loss']:.3f}", 8))
        if "speed" in numbers:
            unit = "steps" if self._kind == "train" else "shards"
            notes.append((f"{_speed(numbers['speed'], unit)}", 7))
        if numbers.get("stage"):
            notes.append((f"{duration(numbers['stage'])} left", 5))
        if "dev" in numbers:
            notes.append((f"dev accuracy {numbers['dev']:.3f}", 4))
        return _bar_line(Text.assemble(spinner, " ", label), self._step, self._total or None, notes, width)

    def _line_of_all(self, width: int) -> Table:
        part = self._step / self._total if self._stage and self._total else 0.0
        done, total = sum(self._done.values()), len(self._done)
        notes = [(f"{done}/{total} stages", 8), (_clock(self._clock() - self._began), 6)]
        if self._left is not None:
            left = max(0.0, self._left[0] - (self._clock() - self._left[1]))
            notes.append((f"about {duration(left)} left", 7))
        return _bar_line(Text("  in all"), done + part, total, notes, width)


_SAVING = "stopping: the stage is saved first"
_STARTING = {"train": "starting the workers", "evaluate": "scoring test rows", "generate": "generating pseudo-samples"}


def _bar_line(name: Text, done: float, total: float | None, notes: list[tuple[str, int]], width: int) -> Table:
    """Return name, bar and notes in one line; where it is too narrow, the notes of least weight are left out."""
    kept = list(notes)
    while kept and cell_len(name.plain) + BAR_MIN + sum(cell_len(text) + 2 for text, _ in kept) + 2 > width:
        kept.remove(min(kept, key=lambda note: note[1]))
    right = Text("  ".join(text for text, _ in kept))
    name = name.copy()
    name.truncate(max(4, width - cell_len(right.plain) - 4), overflow="ellipsis")
    room = width - cell_len(name.plain) - cell_len(right.plain) - 4
    if room < BAR_MIN:
        return _row([name, right])
    bar = ProgressBar(total=total or 1.0, completed=min(done, total or 1.0), width=min(room, BAR_MAX))
    return _row([name, bar, right])


def _row(cells: Sequence[Any]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in cells:
        table.add_column(no_wrap=True)
    table.add_row(*cells)
    return table


def _speed(value: float, unit: str) -> str:
    return f"{value:.1f} {unit}/s" if value >= 1 else f"{1 / value:.1f} s/{unit[:-1]}" if value > 0 else f"0 {unit}/s"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


class _Row:
    """The layout of a row of the accuracy matrix: all cells with their tasks' names, with numbers, or only means."""

    def __init__(self, ids: Sequence[str], width: int) -> None:
        self._ids = ids = [printable(name) for name in ids]
        longest = max(map(cell_len, ids), default=4)
        self._label = min(NAME_MAX, longest) + len(str(len(ids))) + 2
        room = (width - self._label - len(_MEAN) - 3) // max(1, len(ids))
        self._headings, self._cell = [str(number + 1) for number in range(len(ids))], 0
        if room >= longest + 2 or room >= 12:
            self._headings, self._cell = [_fit(name, 14) for name in ids], max(7, min(longest, 14) + 2)
            if room < self._cell:
                self._headings, self._cell = [_fit(name, room - 2) for name in ids], room
        elif room >= 6:
            self._cell = 7 if room >= 7 else 6
        elif room >= 4:
            self._cell = 4

    def head(self) -> Text:
        """Return the line above the rows."""
        label = " " * self._label
        if not self._cell:
            return Text(f"{label}  {_LEARNED}  {_MEAN}", style="dim")
        cells = "".join(f"{_right(name, self._cell)}" for name in self._headings)
        return Text(f"{label}{cells}  {_MEAN}", style="dim")

    def line(self, task: int, cells: Sequence[float | None]) -> Text:
        """Return the scores after a task, its own in bold, and their mean."""
        width = len(str(len(self._ids)))
        name = _fit(self._ids[task] if task < len(self._ids) else "", self._label - width - 2)
        text = Text.assemble((f"{task + 1:>{width}} ", "dim"), (name, "cyan"))
        text.pad_right(self._label - cell_len(text.plain))
        found = [cell for cell in cells if cell is not None]
        mean = f"{math.fsum(found) / len(found):.3f}" if found else "-"
        if not self._cell:
            own = cells[task] if task < len(cells) else None
            text.append(f"  {'-' if own is None else f'{own:.3f}':>{len(_LEARNED)}}", style="bold")
            text.append(f"  {mean:>{len(_MEAN)}}", style="green")
            return text
        for number, cell in enumerate(cells):
            digits = 3 if self._cell >= 6 else 2
            shown = "-" if cell is None else f"{cell:.{digits}f}"
            if digits == 2:
                shown = shown.removeprefix("0") if shown.startswith("0.") else "1.0"
            text.append(_right(shown, self._cell), style="bold" if number == task else "")
        text.append(" " * self._cell * (len(self._ids) - len(cells)))
        text.append(f"  {mean:>{len(_MEAN)}}", style="green")
        return text


_MEAN, _LEARNED = "accuracy", "when learned"


def _fit(text: str, width: int) -> str:
    """Shorten a text to a width in cells."""
    short = Text(text)
    short.truncate(max(1, width), overflow="ellipsis")
    return short.plain


def _right(text: str, width: int) -> str:
    return " " * max(0, width - cell_len(text)) + text
