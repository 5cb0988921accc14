"""Progress on a terminal: what is on the screen after each event, at several widths, by a clock of the test."""

import io
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from launcher.console import comparison
from launcher.verbs.job import _sentence, last_progress
from launcher.watch import Watch

TASKS = ("movies", "restaurants", "laptops")
FOLDER = "runs/demo"
TS = "2026-01-01T10:00:00.000Z"
KEYS = [f"{number:02d}-{task}/{stage}" for number, task in enumerate(TASKS) for stage in ("train", "evaluate")]
OPEN = {
    "ts": TS, "event": "open", "run": "demo", "method": "ctr", "model": "package:some_encoder/model",
    "task_ids": list(TASKS), "dispatcher": "ray", "engine": "deepspeed", "workers": 2, "address": None,
    "folder": FOLDER, "baselines": ["sequential"],
}  # fmt: skip


class Terminal:
    """A terminal of some columns, its clock, and what is on it."""

    def __init__(self, columns: int, tasks: tuple[str, ...] = TASKS, **options: Any) -> None:
        self.now = 0.0
        self.file, self.columns = io.StringIO(), columns
        settings = {"force_terminal": True, "width": columns, "height": 30, "legacy_windows": False, **options}
        self.console = Console(file=self.file, **settings)
        self.watch = Watch(self.console, lambda: self.now)
        self.keys = [f"{n:02d}-{task}/{stage}" for n, task in enumerate(tasks) for stage in ("train", "evaluate")]
        runs = [
            {
                "run": name, "method": method, "folder": folder,
                "stages": dict.fromkeys(self.keys, False), "accuracy": [[None] * len(tasks) for _ in tasks],
            }
            for name, method, folder in (("demo", "ctr", FOLDER), ("sequential", "sequential", f"{FOLDER}/b"))
        ]  # fmt: skip
        self.tell(OPEN | {"task_ids": list(tasks)})
        self.tell({"event": "plan", "runs": runs})

    def tell(self, event: Mapping[str, Any]) -> None:
        self.watch({"ts": TS, **event})

    def stage(self, number: int, kind: str = "train") -> None:
        key = self.keys[2 * number + (kind == "evaluate")]
        self.tell({"event": "stage_start", "stage": key, "task": number, "kind": kind})

    def step(self, step: int, total: int = 120, **numbers: float) -> None:
        self.tell({"event": "step", "step": step, "total_steps": total, **numbers})

    def scored(self, number: int, *values: float) -> None:
        key, tasks = self.keys[2 * number + 1], [key[3:].partition("/")[0] for key in self.keys[::2]]
        accuracy = dict(zip(tasks, values, strict=False))
        self.tell({"event": "stage_done", "stage": key, "task": number, "metrics": {}, "accuracy": accuracy})

    def live(self) -> list[str]:
        """Return the lines of the live part."""
        screen = Console(file=io.StringIO(), width=self.columns, record=True)
        screen.print(self.watch.view)
        return self._lines(screen.export_text())

    def stays(self) -> list[str]:
        """Return the lines that stay."""
        return self._lines(self.file.getvalue())

    def _lines(self, text: str) -> list[str]:
        lines = [re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line).rstrip() for line in text.splitlines()]
        assert all(cell_len(line) <= self.columns for line in lines), lines
        return lines


def test_a_header_says_what_runs_before_anything_else() -> None:
    terminal = Terminal(80)
    terminal.tell({"event": "phase", "doing": "starting Ray"})
    assert terminal.stays()[:6] == [
        "run        demo",
        "method     ctr, then the baselines sequential",
        "model      package:some_encoder/model",
        "tasks      3: movies, restaurants, laptops",
        "workers    2, Ray of this run, on this machine",
        "folder     runs/demo",
    ]
    assert terminal.live()[0][2:] == "starting Ray"
    terminal.tell({"event": "cluster", "dashboard": "http://127.0.0.1:8265"})
    assert terminal.stays()[-1] == "dashboard  http://127.0.0.1:8265"


def test_a_step_shows_loss_speed_and_time_and_the_total_none_before_there_is_evidence() -> None:
    terminal = Terminal(100)
    terminal.tell({"event": "begin", "run": "demo", "stages": 6, "done": 0})
    terminal.stage(1)
    assert terminal.live()[0][2:] == "2/3 restaurants  train  starting the workers"
    terminal.tell({"event": "phase", "stage": KEYS[2], "doing": "loading the model"})
    assert terminal.live()[0].endswith("loading the model")
    terminal.tell({"event": "telemetry", "step": 30, "total_steps": 120, "train/loss": 0.41234})
    terminal.step(31)
    assert re.fullmatch(r".  ?2/3 restaurants  train  [━╸╺ ]+  31/120  loss 0.412", terminal.live()[0])
    assert re.fullmatch(r"  in all  [━╸╺ ]+  0/12 stages  0:00:00", terminal.live()[1])
    terminal.now = 75.0
    terminal.step(60, steps_per_s=0.4, stage_left_s=150, left_s=1500)
    assert terminal.live()[0].endswith("60/120  loss 0.412  2.5 s/step  3 min left")
    assert terminal.live()[1].endswith("0/12 stages  0:01:15  about 25 min left")
    terminal.now += 900.0
    assert terminal.live()[1].endswith("0:16:15  about 10 min left")
    assert not any("starting" in line for line in terminal.stays())


@pytest.mark.parametrize("columns", [20, 40, 80, 200])
def test_lines_fit_the_terminal_and_use_its_width(columns: int) -> None:
    terminal = Terminal(columns)
    terminal.tell({"event": "begin", "run": "sequential", "stages": 6, "done": 0})
    terminal.stage(1)
    terminal.tell({"event": "round", "step": 60, "total_steps": 120, "train/loss": 0.4, "dev/accuracy": 0.75})
    terminal.step(60, steps_per_s=4.0, stage_left_s=15, left_s=1500)
    first, second = terminal.live()
    assert columns < 40 or len(second) > min(columns, 100) * 0.6
    if columns >= 80:
        assert first[2:].startswith("sequential  2/3 restaurants  train")
        assert "60/120" in first
        assert "loss 0.400" in first
        assert "about 25 min left" in second
    if columns == 200:
        assert first.endswith("4.0 steps/s  15 s left  dev accuracy 0.750")


def test_the_matrix_grows_by_a_row_per_task_and_bars_leave_nothing() -> None:
    terminal = Terminal(80)
    with terminal.watch:
        terminal.tell({"event": "begin", "run": "demo", "stages": 6, "done": 0})
        for number, row in enumerate([(0.9,), (0.85, 0.8), (0.8, 0.75, 1.0)]):
            terminal.stage(number)
            terminal.step(1)
            terminal.stage(number, "evaluate")
            terminal.scored(number, *row)
        terminal.tell({"event": "begin", "run": "sequential", "stages": 6, "done": 0})
        terminal.stage(0, "evaluate")
        terminal.scored(0, 0.5)
    rows = [line for line in terminal.stays() if re.match(r"(\d |demo \(|sequential,| +movies)", line)]
    assert rows == [
        "demo (ctr)",
        "                     movies  restaurants      laptops  accuracy",
        "1 movies              0.900                               0.900",
        "2 restaurants         0.850        0.800                  0.825",
        "3 laptops             0.800        0.750        1.000     0.850",
        "sequential, baseline 1 of 1",
        "                     movies  restaurants      laptops  accuracy",
        "1 movies              0.500                               0.500",
    ]


@pytest.mark.parametrize(
    ("columns", "head", "row"),
    [
        (200, r"\s+task0\s+task1\s.*task18  accuracy", r" 3 task2 +0\.900   0\.900   0\.900\s+0\.900"),
        (140, r"\s+1 +2 +3 .* 19  accuracy", r" 3 task2 +0\.900 0\.900 0\.900\s+0\.900"),
        (100, r"\s+1   2   3 .* 19  accuracy", r" 3 task2 +\.90 \.90 \.90\s+0\.900"),
        (80, r"\s+when learned  accuracy", r" 3 task2\s+0\.900     0\.900"),
    ],
)
def test_many_tasks_get_narrower_cells_and_at_last_only_means(columns: int, head: str, row: str) -> None:
    terminal = Terminal(columns, tuple(f"task{number}" for number in range(19)))
    terminal.tell({"event": "begin", "run": "demo", "stages": 38, "done": 0})
    terminal.scored(2, 0.9, 0.9, 0.9)
    *_, above, below = terminal.stays()
    assert re.fullmatch(head, above), above
    assert re.fullmatch(row, below), below


def test_an_interrupted_run_says_where_it_was_saved_and_how_to_go_on() -> None:
    for columns, between in ((120, " "), (80, "\n  ")):
        terminal = Terminal(columns)
        with terminal.watch:
            terminal.tell({"event": "begin", "run": "demo", "stages": 6, "done": 0})
            terminal.stage(1)
            terminal.step(15, 24)
            terminal.tell({"event": "stopping"})
            assert terminal.live()[0].endswith("stopping: the stage is saved first")
            terminal.step(16, 24)
            assert terminal.live()[0].endswith("stopping: the stage is saved first")
            terminal.tell({"event": "saved", "stage": KEYS[2], "step": 16, "total_steps": 24})
            terminal.tell({"event": "interrupted", "metrics": {}})
        said = f"saved at step 16 of 24 of 01-restaurants/train; go on with:{between}cl-dist resume runs/demo"
        assert said in "\n".join(terminal.stays())
    terminal = Terminal(80)
    terminal.stage(1, "evaluate")
    terminal.tell({"event": "stopped", "metrics": {}})
    assert "stopped in 01-restaurants/evaluate; its finished shards are kept" in " ".join(terminal.stays())


def test_a_stopped_run_of_a_study_goes_on_with_the_study() -> None:
    terminal = Terminal(120)
    terminal.watch = Watch(terminal.console, lambda: terminal.now, command="cl-dist study runs/orders")
    terminal.stage(1)
    terminal.tell({"event": "stopped", "metrics": {}})
    assert "go on with: cl-dist study runs/orders" in " ".join(terminal.stays())


def test_a_resumed_run_says_where_it_goes_on_and_shows_the_finished_rows() -> None:
    terminal = Terminal(80)
    main = {
        "run": "demo", "method": "ctr", "folder": FOLDER, "stages": {key: key < "01" for key in KEYS},
        "accuracy": [[0.9, None, None], [None] * 3, [None] * 3],
    }  # fmt: skip
    terminal.tell({"event": "plan", "runs": [main]})
    terminal.tell({"event": "begin", "run": "demo", "stages": 6, "done": 2})
    terminal.stage(1)
    terminal.tell({"event": "continued", "stage": KEYS[2], "step": 15, "total_steps": 24})
    assert terminal.stays()[-4] == "demo (ctr): goes on after 2 of 6 stages"
    assert terminal.stays()[-2].startswith("1 movies              0.900")
    assert terminal.stays()[-1] == "goes on at step 15 of 24 of 01-restaurants/train"
    assert terminal.live()[1].endswith("2/6 stages  0:00:00")


@pytest.mark.parametrize("options", [{"force_terminal": False}, {"_environ": {"TERM": "dumb"}}])
def test_without_a_terminal_there_are_plain_lines(options: dict[str, Any]) -> None:
    terminal = Terminal(400, **options)
    with terminal.watch:
        terminal.tell({"event": "phase", "doing": "reading data"})
        terminal.stage(0)
        terminal.tell({"event": "phase", "stage": KEYS[0], "doing": "loading the model"})
        terminal.step(1)
        terminal.tell({"event": "telemetry", "stage": KEYS[0], "step": 10, "total_steps": 120, "train/loss": 0.5})
        progress = {"step": 20, "total_steps": 120, "loss": 0.5, "steps_per_s": 3.25, "left_s": 12345}
        terminal.tell({"event": "progress", "stage": KEYS[0], **progress})
        terminal.tell({"event": "saved", "stage": KEYS[0], "step": 21, "total_steps": 120})
        terminal.tell({"event": "stopped", "metrics": {}})
    text = terminal.file.getvalue()
    assert "\x1b" not in text
    assert text.splitlines()[1:] == [
        "10:00:00 phase doing=reading data",
        "10:00:00 stage_start stage=00-movies/train",
        "10:00:00 progress stage=00-movies/train step=20 total_steps=120 loss=0.5 steps_per_s=3.25 left_s=12345",
        "10:00:00 saved stage=00-movies/train step=21 total_steps=120",
        "10:00:00 stopped",
        "saved at step 21 of 120 of 00-movies/train; go on with: cl-dist resume runs/demo",
    ]
    found = last_progress(text.splitlines()[:4])
    assert found is not None
    assert _sentence(found) == "00-movies/train, step 20 of 120, loss 0.5, about 3 h 30 min left"
    assert last_progress(text.splitlines()[:3]) is None  # the stage has just begun


def test_without_colour_a_terminal_has_bars_and_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = Terminal(80)
    terminal.tell({"event": "begin", "run": "demo", "stages": 6, "done": 0})
    terminal.stage(0)
    terminal.step(60)
    assert "60/120" in terminal.live()[0]
    assert not re.search(r"\x1b\[[0-9;]*3\dm", terminal.file.getvalue())


@pytest.mark.parametrize(("width", "head"), [(80, "acc"), (100, "backward transfer"), (140, "transfer vs. own model")])
def test_the_table_of_results_is_cut_at_no_width(width: int, head: str) -> None:
    metrics = {"cl/avg_acc": 0.85914, "cl/f1_macro": 0.8, "cl/forgetting_max": 0.0, "cl/bwt": -0.1, "cl/fwt_one": 0.01}
    summary = {
        "run": "a-run-of-a-long-name", "method": "ctr", "tasks": [{"majority": 0.5}],
        "metrics": {name: {"value": value} for name, value in metrics.items()},
    }  # fmt: skip
    screen = Console(file=io.StringIO(), width=width, record=True)
    screen.print(comparison([summary, summary | {"run": "sequential", "method": "sequential"}], width))
    text = screen.export_text()
    assert "…" not in text
    assert all(word in text for word in head.split())
    assert "a-run-of-a-long-name (ctr)" in text
    assert text.count("0.8591") == 2
    assert text.count("0.5000") == 1
    assert ("majority" in text) == (width < 100)


def test_errors_and_logs_are_printed_above_the_bars(tmp_path: Path) -> None:
    terminal = Terminal(80)
    with terminal.watch:
        terminal.stage(0)
        terminal.step(1)
        terminal.console.print("a warning", soft_wrap=True)
    assert "a warning" in terminal.stays()
    assert terminal.stays()[-1] == ""  # the bars have gone
