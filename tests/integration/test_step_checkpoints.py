"""A Train stage stopped in the middle goes on as if nothing had happened, on any number of ranks and any ZeRO stage."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.errors import StoppedError, TrainingError
from cl_dist.learners.hat import Hat
from cl_dist.parallel.config import EngineConfig
from cl_dist.parallel.world import World
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import StageRef, Train
from cl_dist.stages import checkpoint, train
from cl_dist.stages import save_policy as pace
from cl_dist.stages.score_dev import score_dev
from cl_dist.stages.stage_job import Job, SaveRequest
from cl_dist.stages.weights import ShardedWeights
from tests.parity import train_here

pytestmark = pytest.mark.timeout(300)
TRAIN = {"epochs": 4, "weight_decay": 0.01, "min_round_steps": 4}


class StopAfter:
    """Stands in for the pace: says stop after a number of steps of the stage."""

    def __init__(self, steps: int | None) -> None:
        self._steps = steps

    def due(self, done: int) -> str:
        return "stop" if done == self._steps else ""


def train_until(rank: int, world: int, job: Job, out: str, steps: int | None) -> None:
    """Train a stage, up to some step; run on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "SavePolicy", lambda *args: StopAfter(steps))
        try:
            train.run(job, Path(out), lambda event: None)
        except StoppedError:
            assert steps is not None


def made(folder: Path, method: str, select: str = "best_dev", dtype: str = "float32") -> Job:
    """Return the second task's training, after a first one."""
    science: dict[str, Any] = {"method": dict(tiny.METHODS[method]), "train": {**TRAIN, "keep": select}}
    if tiny.writes(method):
        science["train"] |= {**tiny.TEXT_TRAIN, "epochs": 4}
    run: Run = tiny.make_run(folder, {"science": science}, tasks=("food", "film"))
    train_here(run.job(run.plan(0)[0]), run.ledger.path(StageRef(task=0, stage="train")))
    stage = next(stage for stage in run.plan(1) if isinstance(stage, Train)).model_copy(update={"samples": None})
    job = run.job(stage)
    return replace(job, model=job.model.model_copy(update={"dtype": dtype}))


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Job]:
    return {method: made(tmp_path_factory.mktemp(method), method) for method in ("ctr", "lamol", "ewc")}


def results(out: Path) -> dict[str, Any]:
    """Return what the stage left behind, without how long it took."""
    facts = json.loads((out / "train.json").read_text())
    facts["metrics"].pop("perf/stage_s")
    learner = out / "learner.safetensors"
    return {"facts": facts, "learner": learner.read_bytes() if learner.exists() else None}


@pytest.mark.parametrize("method", ["ctr", "lamol", "ewc"])
def test_stopped_anywhere_one_worker_ends_in_the_same_bits(jobs: dict[str, Job], tmp_path: Path, method: str) -> None:
    whole = train_here(jobs[method], tmp_path / "whole").weights
    for number, stops in enumerate([(1,), (5,), (2, 3, 7)]):
        out = tmp_path / str(number)
        out.mkdir()
        for steps in (*stops, None):
            train_until(0, 1, jobs[method], str(out), steps)
        after = dict(ShardedWeights(out))
        assert after.keys() == whole.keys()
        assert all(torch.equal(after[name], whole[name]) for name in whole)
        assert results(out)["learner"] == results(tmp_path / "whole")["learner"]
        assert results(out)["facts"]["selected_step"] == results(tmp_path / "whole")["facts"]["selected_step"]
        for found, wanted in zip(
            results(out)["facts"]["rounds"], results(tmp_path / "whole")["facts"]["rounds"], strict=True
        ):
            assert found == pytest.approx(wanted, rel=1e-5)


def test_a_continued_task_keeps_the_earlier_task_that_it_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, out = made(tmp_path, "hat"), tmp_path / "out"
    job = replace(job, method=job.method.updated({"inherit": "nearest"}))
    out.mkdir()
    monkeypatch.setattr(Hat, "nearest", lambda *args: 0)
    train_until(0, 1, job, str(out), 5)
    monkeypatch.setattr(Hat, "nearest", lambda *args: None)  # as rounding on another machine might have it
    train_until(0, 1, job, str(out), 7)
    train_until(0, 1, job, str(out), None)
    assert results(out)["facts"]["learner"]["inherited_from"] == 0


@pytest.fixture(scope="module")
def others() -> Iterator[dict[int, Ranks]]:
    """Gangs of one and of three."""
    found = {1: Ranks(1), 3: Ranks(3)}
    yield found
    for ranks in found.values():
        ranks.close()


@pytest.mark.parametrize("method", ["ctr", "lamol"])
@pytest.mark.parametrize("stages", [(1, 2, 3), (3, 1, 2), (2, 3, 0)])
def test_two_ranks_then_one_then_three_end_where_one_worker_ends(
    ranks: Ranks, others: dict[int, Ranks], jobs: dict[str, Job], tmp_path: Path, method: str, stages: tuple[Any, ...]
) -> None:
    whole = train_here(jobs[method], tmp_path / "whole").weights
    out = tmp_path / "out"
    out.mkdir()
    for gang, zero_stage, steps in zip((ranks, others[1], others[3]), stages, (3, 8, None), strict=True):
        engine = EngineConfig(zero_stage=zero_stage, micro_batch=2, persistence_threshold=0)
        gang.run(train_until, replace(jobs[method], engine=engine), str(out), steps, timeout_s=200.0)
    after = dict(ShardedWeights(out))
    torch.testing.assert_close(after, whole, rtol=0.0, atol=1e-5)
    assert results(out)["learner"] == results(tmp_path / "whole")["learner"]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_goes_on_from_its_float32_masters(ranks: Ranks, tmp_path: Path, zero_stage: Any) -> None:
    """On the same ranks to the bit: masters, moments and the step are all there is."""
    job = made(tmp_path / "made", "lamol", "last", "bfloat16")
    job = replace(job, engine=EngineConfig(zero_stage=zero_stage, persistence_threshold=0))
    for name, stops in (("whole", (None,)), ("cut", (4, None))):
        (tmp_path / name).mkdir()
        for steps in stops:
            ranks.run(train_until, job, str(tmp_path / name), steps, timeout_s=200.0)
    whole, cut = (dict(ShardedWeights(tmp_path / name)) for name in ("whole", "cut"))
    assert all(torch.equal(cut[name], whole[name]) for name in whole)


def test_lost_moments_are_noticed(jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would see if a checkpoint held weights alone."""
    whole = train_here(jobs["ctr"], tmp_path / "whole").weights
    (tmp_path / "out").mkdir()
    train_until(0, 1, jobs["ctr"], str(tmp_path / "out"), 5)
    monkeypatch.setattr(checkpoint.Checkpoint, "load_moments", lambda self, engine: None)
    train_until(0, 1, jobs["ctr"], str(tmp_path / "out"), None)
    after = dict(ShardedWeights(tmp_path / "out"))
    assert max(float((after[name] - whole[name]).abs().max()) for name in whole) > 1e-4


@pytest.mark.parametrize("harm", ["flip", "cut", "index", "missing"])
def test_a_damaged_checkpoint_is_passed_over(
    jobs: dict[str, Job], tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for steps in (3, 6):
        train_until(0, 1, jobs["ctr"], str(out), steps)
    newest = checkpoint._checkpoints(out)[0]
    assert newest.name == "step-00000006"
    file = newest / ("checkpoint.json" if harm == "index" else "exp_avg.safetensors")
    data = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data[: len(data) // 3] if harm == "cut" else b"{" if harm == "index" else data)
    found = checkpoint.latest(out, World.current())
    assert found is not None
    assert found.step == 3
    assert f"checkpoint damaged folder={newest}" in caplog.text
    whole = train_here(jobs["ctr"], tmp_path / "whole").weights
    train_until(0, 1, jobs["ctr"], str(out), None)
    after = dict(ShardedWeights(out))
    assert all(torch.equal(after[name], whole[name]) for name in whole)
    shutil.rmtree(out)
    out.mkdir()
    assert checkpoint.latest(out, World.current()) is None


def test_a_checkpoint_that_was_not_finished_is_none_and_two_are_kept(jobs: dict[str, Job], tmp_path: Path) -> None:
    for steps in (1, 2, 3):
        train_until(0, 1, jobs["ctr"], str(tmp_path), steps)
    names = [path.name for path in checkpoint._checkpoints(tmp_path)]
    assert names == ["step-00000003", "step-00000002"]
    newest = tmp_path / "checkpoints" / names[0]
    newest.rename(newest.with_name("step-00000009.partial"))
    (newest.with_name("step-00000009.partial") / "checkpoint.json").unlink()
    found = checkpoint.latest(tmp_path, World.current())
    assert found is not None
    assert found.step == 2


def test_the_best_round_of_an_earlier_attempt_outlives_the_folder_it_lay_in(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its dev loss is never undercut again, and its checkpoint is soon one of the old ones."""
    score = score_dev
    worse = iter(range(1, 1000))
    monkeypatch.setattr(train, "score_dev", lambda *args: score(*args) | {"dev/loss": float(next(worse))})
    train_until(0, 1, jobs["ctr"], str(tmp_path), 4)  # the first round is the best
    best = checkpoint.latest(tmp_path, World.current())
    assert best is not None
    wanted = dict(ShardedWeights(best.folder / "best"))
    for steps in (6, 7, 8, 9, None):
        train_until(0, 1, jobs["ctr"], str(tmp_path), steps)
    found = dict(ShardedWeights(tmp_path))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


class SaveAlways:
    """Stands in for the pace: saves after every step."""

    def due(self, done: int) -> str:
        return "save"


def test_saved_after_every_step_a_resumed_stage_ends_as_undisturbed(
    jobs: dict[str, Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_here(jobs["ctr"], tmp_path / "whole").weights
    (tmp_path / "out").mkdir()
    train_until(0, 1, jobs["ctr"], str(tmp_path / "out"), 5)
    monkeypatch.setattr(train, "SavePolicy", lambda *args: SaveAlways())
    train.run(jobs["ctr"], tmp_path / "out", lambda event: None)
    after = dict(ShardedWeights(tmp_path / "out"))
    assert all(torch.equal(after[name], whole[name]) for name in whole)


def crash_in_step(rank: int, world: int, job: Job, out: str, step: int) -> None:
    """Train up to a step that fails, while files are written slowly; run on every rank."""
    write, alone = checkpoint._write, train._Loop.step

    def slow(*args: Any) -> dict[str, str]:
        time.sleep(0.2)
        return write(*args)

    def fails(self: train._Loop, number: int, *args: Any) -> None:
        if number == step:
            raise RuntimeError("planted")
        alone(self, number, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_write", slow)
        patch.setattr(train._Loop, "step", fails)
        with pytest.raises(RuntimeError, match="planted"):
            train.run(job, Path(out), lambda event: None)


@pytest.mark.parametrize("size", [1, 2])
def test_what_is_written_while_training_goes_on_is_of_its_step(
    jobs: dict[str, Job], tmp_path: Path, ranks: Ranks, size: int
) -> None:
    whole = train_here(jobs["ctr"], tmp_path / "whole").weights
    engine = {"checkpoint_steps": 3, "engine": "torch" if size == 1 else "deepspeed"}
    job = replace(jobs["ctr"], engine=jobs["ctr"].engine.model_copy(update=engine))
    out = tmp_path / "out"
    out.mkdir()
    if size == 1:
        crash_in_step(0, 1, job, str(out), 8)
    else:
        ranks.run(crash_in_step, job, str(out), 8)
    assert {path.name for path in checkpoint._checkpoints(out)} - {"step-00000006"} == {
        "step-00000003"
    }  # 6 may have ended
    if size == 1:
        train_until(0, 1, job, str(out), None)
    else:
        ranks.run(train_until, job, str(out), None)
    after = dict(ShardedWeights(out))
    torch.testing.assert_close(after, whole, rtol=0.0, atol=0.0 if size == 1 else 1e-5)


def test_damaged_newer_checkpoints_do_not_push_out_good_ones(jobs: dict[str, Job], tmp_path: Path) -> None:
    for steps in (5, 8):
        train_until(0, 1, jobs["ctr"], str(tmp_path), steps)
    for path in tmp_path.rglob("exp_avg.safetensors"):
        path.write_bytes(b"")
    train_until(0, 1, jobs["ctr"], str(tmp_path), 2)  # from the start, since nothing is whole
    found = checkpoint.latest(tmp_path, World.current())
    assert found is not None
    assert found.step == 2


def test_what_a_larger_gang_had_written_is_removed_before_a_smaller_one_writes(
    jobs: dict[str, Job], tmp_path: Path
) -> None:
    for name in (
        "trainable.safetensors",
        "trainable-00000-of-00002.safetensors",
        "trainable-00001-of-00002.safetensors",
    ):
        (tmp_path / name).write_bytes(b"of an attempt that died before it was published")
    train_until(0, 1, jobs["ctr"], str(tmp_path), None)
    assert [path.name for path in tmp_path.glob("trainable*")] == ["trainable.safetensors"]


def test_a_diverged_stage_says_so(jobs: dict[str, Job], tmp_path: Path) -> None:
    job = replace(
        jobs["lamol"],
        train=jobs["lamol"].train.model_copy(update={"lr": 1e30, "max_grad_norm": 0.0, "warmup_ratio": 0.0}),
    )
    with pytest.raises(TrainingError, match=r"diverged by step \d+: .*; lower train\.lr"):
        train_until(0, 1, job, str(tmp_path), None)


class NothingToWrite(checkpoint.Writer):
    """Stands in for the writer."""

    def __init__(self) -> None:
        self._written = None


def test_a_resumed_stage_is_asked_about_once_a_second_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    asked: list[float] = []
    stop = [False]

    def wanted() -> SaveRequest:
        asked.append(now[0])
        return "stop" if stop[0] else ""

    watched = pace.SavePolicy(EngineConfig(checkpoint_minutes=1.0), World.current(), wanted, 5000, NothingToWrite())
    dues = []
    for done in range(5001, 5200):  # of half a second each
        now[0] += 0.5
        dues.append(watched.due(done))
    assert len(asked) > 60
    assert dues.count("save") == 1
    stop[0] = True
    assert "stop" in [watched.due(done) for done in range(5200, 5203)]


def test_one_task_without_dev_rows_is_left_out_of_the_dev_score(tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, {"science": {"method": {"name": "joint"}}}, tasks=("food", "film"))
    rows = [row for row in tiny.rows("film", 20) if row["split"] != "dev"]
    tiny.save_rows(tmp_path / "film.jsonl", rows)
    tree["science"]["tasks"][1]["source"]["split"]["dev"] = 0
    run = tiny.compute(Run(parse(RunConfig, tree)))
    facts = run.ledger.read(StageRef(task=1, stage="train"), "train.json")
    assert 0 <= facts["metrics"]["dev/accuracy"] <= 1
