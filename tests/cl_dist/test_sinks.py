"""Numbers go to trackers at the right steps, and a run of several attempts is one run there."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cl_dist import session
from cl_dist import sinks as trackers
from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.errors import ConfigError
from cl_dist.run_config import RunConfig
from cl_dist.sinks import Trackers

FAST = {"train": {"epochs": 2, "min_round_steps": 1}, "method": {"name": "sequential"}}
ROUNDS, TELEMETRY = [3, 6, 9, 12, 15, 18], [2, 4, 6, 8, 10, 12, 14, 16, 18]
ALL_STEPS = sorted([*ROUNDS, *TELEMETRY])
Logged = list[tuple[str, int, Mapping[str, float]]]


class StopError(Exception):
    """Ends an attempt in the middle."""


class Recorder:
    """A tracker that keeps what it is sent."""

    def __init__(self, logged: Logged, ended: list[str]) -> None:
        self._logged, self._ended = logged, ended

    def log(self, numbers: Mapping[str, float], step: int, axis: str) -> None:
        self._logged.append((axis, step, dict(numbers)))

    def close(self, status: str) -> None:
        self._ended.append(status)


def config(folder: Path, name: str) -> RunConfig:
    return parse(RunConfig, tiny.tree(folder, {"science": FAST, "run": {"trackers": [name], "log_every": 2}}))


def steps_of(logged: Logged, name: str) -> list[int]:
    """Return the steps at which a number was logged."""
    return [step for _, step, numbers in logged if name in numbers]


def attempts(settings: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run up to the second task's training, then to the end."""
    with monkeypatch.context() as patch:
        watched = session._watchers

        def stopping(each: RunConfig, watch: Any) -> Any:
            seen = watched(each, watch)

            def both(event: Mapping[str, Any]) -> None:
                seen(event)
                if event["event"] == "round" and event["stage"] == "01-film/train":
                    raise StopError

            return both

        patch.setattr(session, "_watchers", stopping)
        with pytest.raises(StopError):
            session.train(settings)
    session.train(settings)


def test_steps_count_over_tasks_and_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: Logged = []
    ended: list[str] = []
    monkeypatch.setattr(trackers, "_opened", lambda name: lambda folder, run, settings: Recorder(logged, ended))
    attempts(config(tmp_path, "wandb"), monkeypatch)
    # Three tasks of 3 steps an epoch, with a round after each; the second task begins twice, and repeats its steps 1-3.
    assert [step for axis, step, _ in logged if axis == "step"] == ALL_STEPS
    assert steps_of(logged, "round/loss") == steps_of(logged, "dev/loss") == ROUNDS
    for name in ("train/loss", "train/lr", "train/grad_norm", "train/tokens_per_s", "memory/rss_peak_gib"):
        assert steps_of(logged, name) == TELEMETRY
    tasks = [(step, numbers) for axis, step, numbers in logged if axis == "task"]
    assert {name for step, numbers in tasks for name in numbers if step == 1} >= {"acc/R/food", "acc/R/film"}
    assert "cl/avg_acc" in tasks[-1][1]
    assert ended == ["failed", "finished"]


def test_generate_and_vote_tell_numbers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: Logged = []
    monkeypatch.setattr(trackers, "_opened", lambda name: lambda folder, run, settings: Recorder(logged, []))
    science = {"method": dict(tiny.METHODS["rational_lamol"]), "train": dict(tiny.TEXT_TRAIN)}
    tree = tiny.tree(tmp_path, {"science": science, "run": {"trackers": ["mlflow"]}}, tasks=("food", "film"))
    session.train(parse(RunConfig, tree))
    names = {name for _, _, numbers in logged for name in numbers}
    assert {"replay/kept", "vote/margin", "vote/samples", "perf/tokens_per_s"} <= names


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(trackers, "import_module", missing)
    with pytest.raises(ConfigError, match=r"run\.trackers: 'mlflow' is not installed; try pip install 'cl-dist\["):
        Trackers(["mlflow"], tmp_path, "tiny", {})


@pytest.mark.parametrize(
    "cut", ['{"event": "round", "stage": "01-fi', '["round"]', '{"event": "round"}', '"round"' + "[" * 10**5]
)
def test_a_damaged_line_of_events_is_passed_over(tmp_path: Path, cut: str) -> None:
    lines = [f'{{"event": "round", "stage": "{t}-x/train", "step": 1, "total_steps": {t}}}' for t in (3, 5)]
    (tmp_path / "metrics").mkdir()
    (tmp_path / trackers.EVENTS).write_text("\n".join([lines[0], cut, lines[1], cut]))
    found = Trackers([], tmp_path, "tiny", {})._stages
    assert {name: stage.total for name, stage in found.items()} == {"3-x/train": 3, "5-x/train": 5}


def test_a_stage_that_is_trained_anew_with_other_settings_is_logged_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: Logged = []
    monkeypatch.setattr(trackers, "_opened", lambda name: lambda folder, run, settings: Recorder(logged, []))
    events: list[dict[str, Any]] = []
    for fingerprint in ("a", "a", "b"):
        events.append({"event": "stage_start", "stage": "00-x/train", "fingerprint": fingerprint})
        step = {"event": "telemetry", "stage": "00-x/train", "total_steps": 9, "train/loss": 1.0}
        events += [step | {"step": number} for number in (2, 4)]
    sink = Trackers(["wandb"], tmp_path, "tiny", {})
    for event in events:
        sink(event)
    assert steps_of(logged, "train/loss") == [2, 4, 2, 4]


def test_the_module_needs_no_torch() -> None:
    code = "import sys, cl_dist.sinks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_tensorboard_reads_one_run_of_two_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard", reason="trackers are not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = config(tmp_path, "tensorboard")
    attempts(settings, monkeypatch)
    found = EventAccumulator(str(settings.folder / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Scalars("train/loss")] == TELEMETRY
    assert [event.step for event in found.Scalars("round/loss")] == ROUNDS


def test_mlflow_has_one_run_of_two_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="trackers are not installed")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    settings = config(tmp_path, "mlflow")
    attempts(settings, monkeypatch)
    client = MlflowClient((settings.folder / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("cl-dist").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["method.name"] == "sequential"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    assert sorted(steps) == TELEMETRY


def test_wandb_writes_offline_under_one_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="trackers are not installed")
    settings = config(tmp_path, "wandb")
    attempts(settings, monkeypatch)
    folders = sorted((settings.folder / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert len({folder.name.rpartition("-")[2] for folder in folders}) == 1  # wandb sync makes one run of them
    assert all(list(folder.glob("*.wandb")) for folder in folders)
