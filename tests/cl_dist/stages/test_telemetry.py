"""Telemetry events are right, are equal on all ranks, and change nothing."""

import hashlib
import json
import math
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.data.sampler import global_batch
from cl_dist.errors import StoppedError, TrainingError
from cl_dist.learners.base import Progress
from cl_dist.parallel.config import EngineConfig
from cl_dist.run import Run
from cl_dist.stage import Train
from cl_dist.stages import train
from cl_dist.stages.build import build_learner
from cl_dist.stages.save_policy import SavePolicy
from cl_dist.stages.stage_job import Job

pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.timeout(300)]
Event = dict[str, Any]
TRAIN = {"epochs": 4, "min_round_steps": 5, "max_grad_norm": 0.05, "warmup_ratio": 0.25, "keep": "last"}
"""12 steps, with clipping that bites and three steps of warm-up."""


def made(folder: Path, method: str = "sequential") -> Job:
    """Return the first task's training: 20 rows in global batches of 8, 8 and 4."""
    over = {"method": dict(tiny.METHODS[method]), "train": TRAIN}
    run = tiny.make_run(folder, {"science": over}, tasks=("food", "film"))
    return run.job(run.plan(0)[0])


def trained(job: Job, out: Path, every: int = 1) -> list[Event]:
    """Train a stage and return its telemetry events."""
    out.mkdir(parents=True)
    events: list[Event] = []
    train.run(replace(job, log_every=every), out, events.append)
    return [event for event in events if event["event"] == "telemetry"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return made(tmp_path_factory.mktemp("telemetry"))


@pytest.fixture(scope="module")
def events(job: Job, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    return trained(job, tmp_path_factory.mktemp("telemetry") / "out")


def test_an_event_follows_every_nth_step_and_the_last(job: Job, events: list[Event], tmp_path: Path) -> None:
    assert [event["step"] for event in events] == list(range(1, 13))
    assert {event["total_steps"] for event in events} == {12}
    found = trained(job, tmp_path / "5", 5)
    assert [event["step"] for event in found] == [5, 10, 12]
    # Each is the mean of the steps since the one before; the norm and the rate are those of its own step.
    for event, part in zip(found, (events[:5], events[5:10], events[10:]), strict=True):
        assert event["train/loss"] == pytest.approx(sum(one["train/loss"] for one in part) / len(part), rel=1e-6)
        assert event["train/grad_norm"] == part[-1]["train/grad_norm"]
        assert event["train/lr"] == part[-1]["train/lr"]


def test_the_learning_rate_follows_the_schedule_by_hand(events: list[Event]) -> None:
    # 3 of 12 steps of warm-up to 0.005, then linear to 0 over the 9 that are left.
    shares = [1 / 3, 2 / 3, 3 / 3, *(left / 9 for left in range(9, 0, -1))]
    assert [event["train/lr"] for event in events] == pytest.approx([0.005 * share for share in shares], rel=1e-12)


def test_parameters_with_a_rate_of_their_own_are_named_by_it(tmp_path: Path) -> None:
    found = trained(made(tmp_path, "ctr"), tmp_path / "out", 12)[0]
    rates = {name: value for name, value in found.items() if name.startswith("train/lr")}
    # gate_lr and head_lr of tiny.CTR, and train.lr; the last of 9 steps after the warm-up.
    assert rates == pytest.approx({"train/lr_0.02": 0.02 / 9, "train/lr_0.01": 0.01 / 9, "train/lr": 0.005 / 9})


def slow(job: Job) -> list[tuple[float, float]]:
    """Return loss and gradient norm of every step, example by example: no engine, no schedule, no micro-batches."""
    learner, stage = build_learner(job), job.stage
    assert isinstance(stage, Train)
    train.prepare_learner(job, learner)
    rows, _ = train._rows(job, stage, learner)
    weights = [parameter for parameter in learner.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    found = []
    for step in range(12):
        _, indices = global_batch(job.seed, "food", step, len(rows), job.train.global_batch)
        losses = [learner.loss(learner.model.train(), rows.batch([n]), Progress(step, 12, 0, 12)) for n in indices]
        loss = torch.stack([term.sum() for each in losses for term in each.per_example.values()]).sum() / len(indices)
        optimizer.zero_grad()
        loss.backward()
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        norm = math.sqrt(sum(float((gradient.double() ** 2).sum()) for gradient in gradients))
        for gradient in gradients:
            gradient *= min(1.0, job.train.max_grad_norm / norm)
        for group in optimizer.param_groups:
            group["lr"] = 0.005 * ((step + 1) / 3 if step < 3 else (12 - step) / 9)
        optimizer.step()
        found.append((loss.item(), norm))
    return found


def test_losses_and_gradient_norms_are_those_of_a_slow_loop(job: Job, tmp_path: Path) -> None:
    job = replace(job, engine=EngineConfig(engine="torch", micro_batch=3))
    found = [(event["train/loss"], event["train/grad_norm"]) for event in trained(job, tmp_path / "out")]
    expected = slow(job)
    assert all(norm > job.train.max_grad_norm for _, norm in expected)  # it is that before clipping
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [norm for _, norm in found] == pytest.approx([norm for _, norm in expected], rel=1e-3)


@pytest.mark.parametrize(
    ("method", "names"), [("ctr", {"train/ce", "train/sparsity"}), ("lamol", {"train/qa_loss", "train/lm_loss"})]
)
def test_terms_are_named_and_add_up(tmp_path: Path, method: str, names: set[str]) -> None:
    for event in trained(made(tmp_path, method), tmp_path / "out", 2):
        assert names <= event.keys()
        assert sum(event[name] for name in names) == pytest.approx(event["train/loss"], rel=1e-6)


def test_examples_and_tokens_are_counted_by_hand(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    class Clock:
        """Two seconds pass in every optimizer step."""

        @staticmethod
        def monotonic() -> float:
            return now[0]

    monkeypatch.setattr("cl_dist.stages.telemetry.time", Clock)
    events: list[Event] = []

    def heartbeat(step: int) -> None:
        now[0] = 2.0 * (step + 1)

    train.run(replace(job, log_every=3), tmp_path, events.append, heartbeat=heartbeat)
    rows = [row for row in tiny.rows("food", 20) if row["split"] == "train"]
    tokens = sum(len(row["text"].split()) + 2 for row in rows)  # a token per word, [CLS] and [SEP]
    found = [event for event in events if event["event"] == "telemetry"]
    # Three steps are an epoch: all 20 rows in 6 seconds.
    assert [event["train/examples_per_s"] for event in found] == pytest.approx([20 / 6] * 4)
    assert [event["train/tokens_per_s"] for event in found] == pytest.approx([tokens / 6] * 4)


def test_peak_memory_is_that_of_the_process(events: list[Event]) -> None:
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peaks = [event["memory/rss_peak_gib"] for event in events]
    assert 0.05 < peaks[0] <= peaks[-1] <= limit
    assert peaks == sorted(peaks)


def on_ranks(rank: int, world: int, job: Job, out: str) -> list[Event]:
    events: list[Event] = []
    train.run(job, Path(out), events.append)
    return [event for event in events if event["event"] == "telemetry"]


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_report_the_numbers_of_one(
    job: Job, events: list[Event], ranks: Ranks, tmp_path: Path, zero_stage: Any
) -> None:
    engine = EngineConfig(zero_stage=zero_stage, micro_batch=2, persistence_threshold=0)
    gang = replace(job, engine=engine, log_every=1)
    first, second = ranks.run(on_ranks, gang, str(tmp_path), timeout_s=200.0)
    assert second == []
    assert [event["step"] for event in first] == [event["step"] for event in events]
    for alone, both in zip(events, first, strict=True):
        assert both.keys() == alone.keys()
        assert both["train/lr"] == pytest.approx(alone["train/lr"], rel=1e-12)
        for name in ("train/loss", "train/grad_norm"):
            assert both[name] == pytest.approx(alone[name], rel=1e-3), (name, alone["step"])


def test_a_resumed_stage_goes_on_at_the_same_steps(job: Job, events: list[Event], tmp_path: Path) -> None:
    stopped: list[Event] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SavePolicy, "due", lambda self, done: "stop" if done == 5 else "")
        with pytest.raises(StoppedError):
            train.run(replace(job, log_every=2), tmp_path, stopped.append)
    resumed: list[Event] = []
    train.run(replace(job, log_every=2), tmp_path, resumed.append)
    found = [event for event in stopped + resumed if event["event"] == "telemetry"]
    assert [event["step"] for event in found] == [2, 4, 6, 8, 10, 12]
    for event in found[3:]:  # the window of the sixth step began with the second attempt
        pair = events[event["step"] - 2 : event["step"]]
        assert event["train/loss"] == pytest.approx(sum(one["train/loss"] for one in pair) / 2, rel=1e-5)
        assert event["train/lr"] == pytest.approx(pair[1]["train/lr"], rel=1e-12)
    assert found[2]["train/loss"] == pytest.approx(events[5]["train/loss"], rel=1e-5)


def test_divergence_is_found_at_the_next_event(job: Job, tmp_path: Path) -> None:
    settings = job.train.model_copy(update={"lr": 1e30, "max_grad_norm": 0.0, "warmup_ratio": 0.0})
    with pytest.raises(TrainingError, match=r"diverged by step 2: train/.* not finite; lower train\.lr"):
        trained(replace(job, train=settings), tmp_path / "out", 2)


def files(folder: Path) -> dict[str, str]:
    """Return the digests of a run's weights, learner states and scores."""
    found = [path for path in sorted((folder / "stages").rglob("*")) if path.suffix == ".safetensors"]
    found += sorted((folder / "stages").rglob("scores.json"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def computed(folder: Path, run: dict[str, Any], cluster: dict[str, Any]) -> tuple[Run, list[Event]]:
    """Return a tiny run after its end, and its stored events."""
    science = {"method": dict(tiny.CTR), "train": {"epochs": 2, "min_round_steps": 3}}
    over = {"run": run, "science": science, "cluster": cluster}
    done = tiny.compute(tiny.make_run(folder, over, tasks=("food", "film")))
    lines = (done.config.folder / "metrics" / "events.jsonl").read_text().splitlines()
    return done, [json.loads(line) for line in lines]


def test_neither_telemetry_nor_a_profile_changes_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, events = computed(tmp_path, {"name": "quiet", "log_every": 0}, {})
    assert not [event for event in events if event["event"] in ("telemetry", "profile")]
    loud, events = computed(tmp_path, {"name": "loud", "log_every": 1}, {"profile": {"steps": [1, 3]}})
    assert len([event for event in events if event["event"] == "telemetry"]) == 2 * 6
    monkeypatch.setattr(train, "Prefetch", lambda source, device: _NotAhead(source))
    plain, _ = computed(tmp_path, {"name": "plain", "log_every": 0}, {})
    assert files(quiet.config.folder) == files(loud.config.folder) == files(plain.config.folder) != {}
    for stage in quiet.plan(1):
        assert quiet.facts(stage) == loud.facts(stage)
    names = {path.name for path in loud.config.folder.rglob("*.json.gz")}
    assert names == {"00-food-train-rank0.json.gz", "01-film-train-rank0.json.gz"}
    assert not list((loud.config.folder / "stages").rglob("*.json.gz"))


class _NotAhead(Iterator[Any]):
    """Stands in for Prefetch: collates each micro-batch when it is used."""

    def __init__(self, source: Iterator[Any]) -> None:
        self._source = source

    def __next__(self) -> Any:
        return next(self._source)

    def close(self) -> None:
        pass
