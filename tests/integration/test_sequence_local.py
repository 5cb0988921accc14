"""Whole sequences in this process; what every method must keep is in tests/contract."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cl_dist.contract import tiny
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.errors import StageConflictError
from cl_dist.run import Run
from cl_dist.run_events import Tracker
from cl_dist.stage import Evaluate, StageRef, ref
from cl_dist.stages.stage_job import Job

STAGES = [f"{number:02d}-{task}/{stage}" for number, task in enumerate(tiny.TASKS) for stage in ("train", "evaluate")]
TRAIN = {"epochs": 2, "min_round_steps": 2}


class PowerCutError(Exception):
    """Ends an attempt at a run."""


class Flaky(LocalDispatcher):
    """Runs the given number of stages, then fails before or after computing the next one."""

    def __init__(self, good: int, when: str = "before") -> None:
        self.good, self.when, self.ran = good, when, list[StageRef]()

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        if len(self.ran) == self.good and self.when == "before":
            raise PowerCutError
        super().run(job, out, tracker)
        if len(self.ran) == self.good:
            raise PowerCutError
        self.ran.append(ref(job.stage))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sequence")


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Callable[[str], Run]:
    done: dict[str, Run] = {}

    def compute(method: str) -> Run:
        if method not in done:
            done[method] = tiny.compute(make_run(folder, method, f"whole-{method}"))
        return done[method]

    return compute


def make_run(folder: Path, method: str, name: str, over: Mapping[str, Any] | None = None) -> Run:
    settings = dict(tiny.CTR) if method == "ctr" else {"name": method}
    science: dict[str, Any] = {"method": settings, "train": TRAIN} | dict(over or {})
    return tiny.make_run(folder, {"run": {"name": name}, "science": science})


def results(run: Run) -> dict[str, bytes]:
    """Return what a run found: weights, learner state, scores, predictions and matrix; not its timings."""
    folder = run.config.folder
    kept = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".csv") or p.name == "scores.json"]
    kept += folder.rglob("predictions/*.jsonl")
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def scores(run: Run, task: int) -> dict[str, Any]:
    read: dict[str, Any] = run.ledger.read(StageRef(task=task, stage="evaluate"), "scores.json")["tasks"]
    return read


def cells(run: Run) -> list[list[str]]:
    lines = (run.config.folder / "metrics" / "R.csv").read_text().splitlines()
    return [line.split(",")[1:] for line in lines[1:]]


def planned(run: Run) -> list[StageRef]:
    return [ref(stage) for task in range(len(run.tasks)) for stage in run.plan(task)]


def test_cut_off_with_its_files_written_but_unpublished_a_stage_is_computed_again(
    folder: Path, undisturbed: Callable[[str], Run]
) -> None:
    expected = undisturbed("ctr")
    for number in range(len(STAGES)):
        with pytest.raises(PowerCutError):
            tiny.compute(make_run(folder, "ctr", "half"), Flaky(good=min(number, 1), when="after"))
    found = tiny.compute(make_run(folder, "ctr", "half"))
    assert results(found) == results(expected)
    assert not list(found.config.folder.rglob("*.partial-*"))


def test_a_finished_run_computes_nothing_again(undisturbed: Callable[[str], Run]) -> None:
    run = undisturbed("ctr")
    before = results(run)
    tiny.compute(Run(run.config), dispatcher := Flaky(good=0))
    assert dispatcher.ran == []
    assert results(run) == before


def test_other_settings_are_refused_before_anything_runs(folder: Path) -> None:
    with pytest.raises(PowerCutError):
        tiny.compute(make_run(folder, "sequential", "changed"), Flaky(good=1))
    before = results(make_run(folder, "sequential", "changed"))
    dispatcher = Flaky(good=99)
    with pytest.raises(StageConflictError, match=r"00-food/train.*\n  train\.lr: finished with 0\.005, now 0\.001"):
        tiny.compute(make_run(folder, "sequential", "changed", {"train": TRAIN | {"lr": 0.001}}), dispatcher)
    assert dispatcher.ran == []
    assert results(make_run(folder, "sequential", "changed")) == before


def test_ctr_forgets_nothing_old_tasks_keep_every_bit_of_their_logits(undisturbed: Callable[[str], Run]) -> None:
    run = undisturbed("ctr")
    for task in range(3):
        later = [scores(run, after)[str(task)] for after in range(task, 3)]
        assert later == [later[0]] * len(later)
    summary = json.loads((run.config.folder / "metrics" / "summary.json").read_text())
    assert summary["metrics"]["cl/forgetting_max"]["value"] == 0.0
    assert summary["metrics"]["cl/bwt"]["value"] == 0.0


def test_ctr_forgets_nothing_when_a_later_task_has_shorter_inputs(tmp_path: Path) -> None:
    over = tiny.tree(tmp_path, tasks=("food", "film"))["science"]["tasks"]
    over[1]["train"] = {"max_length": 5}  # cuts rows of both tasks
    run = tiny.compute(tiny.make_run(tmp_path, {"science": {"tasks": over, "train": TRAIN}}, tasks=("food", "film")))
    assert scores(run, 1)["0"] == scores(run, 0)["0"]


def test_sequential_fine_tuning_changes_what_it_knew(undisturbed: Callable[[str], Run]) -> None:
    run = undisturbed("sequential")
    digests = {scores(run, after)["0"]["output_sha256"] for after in range(3)}
    assert len(digests) == 3


def test_individual_models_keep_the_scores_of_their_own_task(undisturbed: Callable[[str], Run]) -> None:
    run = undisturbed("individual")
    assert [list(scores(run, after)) for after in range(3)] == [["0"], ["1"], ["2"]]
    own = [repr(scores(run, task)[str(task)]["accuracy"]) for task in range(3)]
    assert cells(run) == [[own[0], "", ""], [own[0], own[1], ""], own]


def test_an_individual_model_knows_nothing_of_the_tasks_before(folder: Path, undisturbed: Callable[[str], Run]) -> None:
    tasks = tiny.tree(folder)["science"]["tasks"]
    tasks[0]["labels"] = ["good", "bad", "neither"]  # a wider head for the first task
    first, other = undisturbed("individual"), make_run(folder, "individual", "other", {"tasks": tasks})
    for wanted in (StageRef(task=1, stage="train"), StageRef(task=2, stage="train")):
        assert other.facts(other.stage(wanted)) == first.facts(first.stage(wanted))
    tiny.compute(other)
    same = {name: data for name, data in results(first).items() if "/train/" in name and "00-food" not in name}
    assert same
    assert {name: results(other)[name] for name in same} == same


def test_joint_training_scores_all_tasks_once_at_the_end(undisturbed: Callable[[str], Run]) -> None:
    run = undisturbed("joint")
    assert planned(run) == [StageRef(task=2, stage="train"), StageRef(task=2, stage="evaluate")]
    assert cells(run)[:2] == [["", "", ""], ["", "", ""]]
    assert cells(run)[2] == [repr(scores(run, 2)[str(task)]["accuracy"]) for task in range(3)]
    train = json.loads((run.ledger.path(StageRef(task=2, stage="train")) / "train.json").read_text())
    assert train["selected_step"] <= 2 * -(-60 // 8)  # two epochs over the rows of all three tasks
    assert len(train["rounds"]) == 2


def test_ctr_scores_a_new_task_also_without_knowledge_sharing_and_without_that_of_earlier_tasks(
    undisturbed: Callable[[str], Run],
) -> None:
    run = undisturbed("ctr")
    for task in range(3):
        stage = run.stage(StageRef(task=task, stage="evaluate"))
        assert isinstance(stage, Evaluate)
        assert set(run.ledger.read(ref(stage), "scores.json")["without"]) == set(stage.without)
        assert list(stage.without) == ["sharing", *(["earlier", "gates"] if task else [])]
