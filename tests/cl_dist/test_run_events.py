import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cl_dist import session
from cl_dist.contract import tiny
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.errors import CheckpointError, StoppedError
from cl_dist.intervals import wilson
from cl_dist.metrics import summarize
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_events import (
    NOT_STORED,
    Tracker,
    Watcher,
    last_progress,
    matrix,
    now,
    read_state,
    summary,
    with_references,
)
from cl_dist.sequence import run_stages
from cl_dist.stage import StageRef
from cl_dist.stages.stage_job import Job

FAST = {"train": {"epochs": 1, "min_round_steps": 1}}
SEQUENTIAL = FAST | {"method": {"name": "sequential"}}


class KilledError(BaseException):
    """Ends a process in the middle, as far as a test can."""


class Watching(LocalDispatcher):
    """Looks at run.json before each stage; fails at the given one."""

    def __init__(self, folder: Path, fail_at: int = 99) -> None:
        self.folder, self.fail_at, self.seen = folder, fail_at, list[dict[str, Any]]()

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        self.seen.append(read_state(self.folder))
        if len(self.seen) == self.fail_at:
            raise InterruptedError
        super().run(job, out, tracker)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run."""
    return tiny.compute(tiny.make_run(tmp_path_factory.mktemp("tracking"), {"science": SEQUENTIAL}))


def read(run: Run, name: str) -> Any:
    return json.loads((run.config.folder / name).read_text())


def events(run: Run) -> list[dict[str, Any]]:
    lines = (run.config.folder / "metrics" / "events.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_r_csv_holds_the_accuracy_of_every_scored_cell_and_nothing_elsewhere(run: Run) -> None:
    with (run.config.folder / "metrics" / "R.csv").open(newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["after", *tiny.TASKS]
    for after, (name, *cells) in enumerate(lines):
        scores = run.ledger.read(StageRef(task=after, stage="evaluate"), "scores.json")["tasks"]
        assert name == tiny.TASKS[after]
        measured = [float(cell) if cell else None for cell in cells]
        assert measured == [scores[str(on)]["accuracy"] if on <= after else None for on in range(3)]


def test_metrics_of_the_summary_are_those_of_its_matrix(run: Run) -> None:
    stored = read(run, "metrics/summary.json")
    assert stored["matrix"]["accuracy"] == matrix(run, "accuracy")
    assert stored["matrix"]["f1_macro"] == matrix(run, "f1_macro")
    metrics = summarize(stored["matrix"]["accuracy"], stored["matrix"]["f1_macro"])
    assert {name: metric | {"interval": stored["metrics"][name]["interval"]} for name, metric in metrics.items()} == (
        stored["metrics"]
    )
    # by hand: the mean of the last row
    last = stored["matrix"]["accuracy"][-1]
    assert stored["metrics"]["cl/avg_acc"]["value"] == pytest.approx(sum(last) / 3)
    assert stored["metrics"]["cl/fwt_one"]["value"] is None  # needs a reference, which this run has not


def test_scores_of_the_summary_have_intervals(run: Run) -> None:
    stored = read(run, "metrics/summary.json")
    assert stored["intervals"]["level"] == 0.95
    for scores, intervals in zip(stored["matrix"]["accuracy"], stored["intervals"]["accuracy"], strict=True):
        for score, interval in zip(scores, intervals, strict=True):
            assert interval == (None if score is None else list(wilson(round(score * 10), 10)))
    for name, metric in stored["metrics"].items():
        if metric["value"] is None or name in ("cl/fwt_one", "cl/intransigence"):
            assert metric["interval"] is None
        else:
            assert metric["interval"][0] <= metric["value"] <= metric["interval"][1], name
    kept = with_references(stored, individual=[0.5, 0.5, 0.5])["metrics"]
    assert kept["cl/avg_acc"] == stored["metrics"]["cl/avg_acc"]


def test_a_run_without_its_predictions_has_scores_without_intervals(run: Run, tmp_path: Path) -> None:
    copy = shutil.copytree(run.config.folder, tmp_path / "tiny")
    for folder in copy.rglob("predictions"):
        shutil.rmtree(folder)
    opened = Run(run.config.model_copy(update={"run": run.config.run.model_copy(update={"dir": str(tmp_path)})}))
    found = summary(opened)
    assert found["matrix"] == summary(run)["matrix"]
    assert {metric["interval"] for metric in found["metrics"].values()} == {None}


def test_references_fill_the_metrics_that_need_them(run: Run) -> None:
    found = with_references(summary(run), individual=[0.5, 0.5, 0.5], joint=[1.0, None, 1.0])
    learned = [row[t] for t, row in enumerate(matrix(run, "accuracy"))]
    assert all(score is not None for score in learned)
    expected = sum(score - 0.5 for score in learned if score is not None) / 3
    assert found["metrics"]["cl/fwt_one"]["value"] == pytest.approx(expected)
    assert found["metrics"]["cl/intransigence"]["value"] is None  # a missing cell is never an average over the rest


def test_the_summary_tells_tasks_and_stages(run: Run) -> None:
    stored = read(run, "metrics/summary.json")
    assert stored["status"] == "finished"
    assert [(task["id"], task["rows"]) for task in stored["tasks"]] == [
        (name, {"train": 20, "dev": 6, "test": 10}) for name in tiny.TASKS
    ]
    assert all("only 10 test rows" in task["warnings"][0] for task in stored["tasks"])
    assert [stage["key"] for stage in stored["stages"]] == [
        f"{number:02d}-{task}/{kind}" for number, task in enumerate(tiny.TASKS) for kind in ("train", "evaluate")
    ]
    assert all(stage["metrics"]["train/loss"] > 0 for stage in stored["stages"] if stage["kind"] == "train")
    assert "plugins" not in stored


def test_a_ctr_summary_tells_masks_gates_and_the_ablation(tmp_path: Path) -> None:
    run = tiny.compute(tiny.make_run(tmp_path, {"science": FAST}, tasks=("food", "film")))
    facts = read(run, "metrics/summary.json")["plugins"]
    assert facts["layers"] == ["0.attention", "0.ffn", "1.attention", "1.ffn"]
    assert facts["units"] == [{"hidden": 24, "output": 32}] * 4
    assert [len(facts[name]) for name in ("mask_use", "mask_shared", "free_units", "accuracy_without_ksm")] == [2] * 4
    assert facts["mask_shared"][0] == [[0.0, 0.0]] * 4  # nobody to share with
    assert [[len(gates) for gates in layer] for layer in facts["gate_open"]] == [[0] * 4, [1] * 4]


def test_a_hat_summary_tells_masks_and_no_gates(tmp_path: Path) -> None:
    science = FAST | {"method": {"name": "hat", "tsm_size": 24}}
    facts = read(
        tiny.compute(tiny.make_run(tmp_path, {"science": science}, tasks=("food", "film"))), "metrics/summary.json"
    )
    assert [len(facts["plugins"][name]) for name in ("mask_use", "mask_shared", "free_units")] == [2] * 3
    assert facts["plugins"]["gate_open"] == [None, None]
    assert facts["plugins"]["accuracy_without_ksm"] == [None, None]


def test_a_run_is_running_until_it_is_finished(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, {"science": SEQUENTIAL}, tasks=("food",))
    assert read_state(run.config.folder) == {}
    watching = Watching(run.config.folder)
    tiny.compute(run, watching)
    assert [state["status"] for state in watching.seen] == ["running", "running"]
    state = read_state(run.config.folder)
    assert state["status"] == "finished"
    (attempt,) = state["attempts"]
    assert attempt["stages_done"] == 0
    assert attempt["started"] <= attempt["ended"]


def test_every_attempt_is_noted_with_what_it_found_done_and_how_it_ended(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, {"science": SEQUENTIAL}, tasks=("food", "film"))
    folder = run.config.folder
    tracker = Tracker(run, command="cl-dist train tiny")
    with pytest.raises(InterruptedError):
        run_stages(run, Watching(folder, fail_at=3), tracker)
    assert read_state(folder)["status"] == "running"  # as after a power cut
    tracker.finish("failed")
    assert read_state(folder)["status"] == "failed"
    partial = read(run, "metrics/summary.json")
    assert partial["status"] == "failed"
    assert partial["matrix"]["accuracy"][1] == [None, None]
    assert partial["metrics"]["cl/avg_acc"]["value"] == partial["matrix"]["accuracy"][0][0]

    again = Run(run.config)
    run_stages(again, LocalDispatcher(), Tracker(again, command="cl-dist resume tiny"))
    state = read_state(folder)
    assert (state["status"], state["command"]) == ("finished", "cl-dist train tiny")
    assert [attempt["stages_done"] for attempt in state["attempts"]] == [0, 2]
    assert all("ended" in attempt for attempt in state["attempts"])


@pytest.mark.parametrize("name", ["R.csv", "summary.json", "run.json"])
def test_killed_while_it_notes_its_end_a_run_is_finished_by_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    run = tiny.compute(tiny.make_run(tmp_path, {"science": SEQUENTIAL}, tasks=("food",)))
    folder, replace = run.config.folder, Path.replace
    matrix_file, stored = (folder / "metrics/R.csv").read_bytes(), read(run, "metrics/summary.json")
    (folder / "run.json").unlink()
    tracker = Tracker(run)
    tracker.begin([], set())

    def killed(self: Path, target: Path) -> Path:
        if target.name == name:
            raise KilledError
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KilledError):
            tracker.finish()
    assert read_state(folder)["status"] == "running"
    assert (folder / "metrics/R.csv").read_bytes() == matrix_file
    told: list[str] = []

    def watched(config: RunConfig, watch: Watcher) -> Watcher:
        return lambda event: told.append(f"{event['event']} {read_state(folder)['status']}")

    monkeypatch.setattr(session, "_watchers", watched)
    session.train(run.config)
    assert told == ["begin running", "finished finished"]  # a mirror copies what is there by then
    assert (folder / "metrics/R.csv").read_bytes() == matrix_file
    assert read(run, "metrics/summary.json")["status"] == "finished"
    assert read(run, "metrics/summary.json")["matrix"] == stored["matrix"]


def test_a_run_that_is_stopped_before_it_begins_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped() -> None:
        raise StoppedError("told to")

    run = tiny.make_run(tmp_path, {"science": SEQUENTIAL}, tasks=("food",))
    monkeypatch.setattr("cl_dist.run_events._git", stopped)
    with pytest.raises(StoppedError, match="told to"):
        session.train(run.config)
    assert read_state(run.config.folder) == {}


def test_an_event_after_a_line_that_was_cut_off_is_on_a_line_of_its_own(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, {"science": SEQUENTIAL}, tasks=("food",))
    path = run.config.folder / "metrics" / "events.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"event": "begin"}\n{"event": "rou')
    Tracker(run).event({"event": "saved"})
    Tracker(run).event({"event": "saved"})
    whole, cut, *rest = path.read_text().splitlines()
    assert (whole, cut) == ('{"event": "begin"}', '{"event": "rou')
    assert [json.loads(line)["event"] for line in rest] == ["saved", "saved"]


def test_events_frame_each_stage_and_steps_are_shown_but_not_stored(tmp_path: Path) -> None:
    run = tiny.make_run(tmp_path, {"science": SEQUENTIAL}, tasks=("food",))
    shown: list[Mapping[str, Any]] = []
    run_stages(run, LocalDispatcher(), Tracker(run, watch=shown.append))
    stored = events(run)
    assert [event["event"] for event in stored if event["event"] != "round"] == [
        "begin", "stage_start", "telemetry", "stage_end", "stage_done",
        "stage_start", "stage_end", "stage_done", "finished",
    ]  # fmt: skip
    assert stored == [event for event in shown if event["event"] not in NOT_STORED]
    steps = [event["step"] for event in shown if event["event"] == "step" and event["kind"] == "train"]
    assert steps == [1, 2, 3]  # 20 rows in batches of 8
    training = [event for event in shown if event.get("kind") == "train"]
    assert {(event["stage"], event["task"]) for event in training} == {("00-food/train", 0)}
    assert stored[-2]["accuracy"] == {"food": matrix(run, "accuracy")[0][0]}


WHOLE = {"status": "running", "command": "", "versions": {}, "attempts": [{"pid": 1, "host": "x"}]}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        "{}",
        "[" * 100_000,
        json.dumps(WHOLE | {"attempts": 1}),
        json.dumps(WHOLE | {"attempts": [1]}),
        json.dumps(WHOLE | {"attempts": [{"pid": "1", "host": "x"}]}),
    ],
)
def test_a_damaged_run_json_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps(WHOLE))
    assert read_state(tmp_path) == WHOLE
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run.json: damaged"):
        read_state(tmp_path)


def test_progress_of_a_stage_comes_from_its_events_while_it_runs_and_from_its_checkpoint_afterwards(
    tmp_path: Path,
) -> None:
    stage, other = {"stage": "01-film/train"}, {"stage": "00-food/train"}
    numbers = {"total_steps": 24, "train/loss": 0.75}
    lines = [
        {"event": "telemetry", "step": 24, "total_steps": 24, "train/loss": 0.1, **other},
        {"event": "stage_start", **stage},
        {"event": "telemetry", "step": 10, **numbers, **stage},
        {"event": "progress", "step": 12, "total_steps": 24, "loss": 0.5, "left_s": 10**9, "ts": now(), **stage},
        {"event": "round", "step": 15, **numbers, **stage},
    ]
    (tmp_path / "metrics").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics/events.jsonl").write_text('a line that is cut"}\n' + text + '{"event": "st')
    found = last_progress(tmp_path, "01-film/train", is_running=True)
    assert found.pop("left_s") == pytest.approx(10**9, abs=5)
    assert found == {"step": 15, "total_steps": 24, "loss": 0.75}
    assert last_progress(tmp_path, "01-film/train", is_running=False) == {}
    for step in (5, 14):
        checkpoint = tmp_path / f"stages/01-film/train.partial-abc/checkpoints/step-{step:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "checkpoint.json").touch()
    assert last_progress(tmp_path, "01-film/train", is_running=False) == {"step": 14, "total_steps": 24, "loss": 0.75}
    assert last_progress(tmp_path / "none", "01-film/train", is_running=True) == {}
