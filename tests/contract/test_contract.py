"""What every method must keep: a new one gets all of this by a line in tests/tiny.py and one in METHODS.

The methods are run as users run them, through plan, ledger and stages; what one test needs is computed once.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.learners.base import Learner
from cl_dist.methods import METHODS
from cl_dist.models.backbone import load_tokenizer
from cl_dist.parallel.engine import TorchEngine
from cl_dist.parallel.gradients import frozen_entries
from cl_dist.run import Run
from cl_dist.run_events import Tracker
from cl_dist.stage import Evaluate, StageRef, Train, ref
from cl_dist.stages import train
from cl_dist.stages.build import build_learner, writes_text
from cl_dist.stages.stage_job import Job, task_data
from cl_dist.stages.weights import ShardedWeights
from tests import parity, tiny
from tests.pool import Ranks

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about names that DeepSpeed uses
    pytest.mark.timeout(300),  # the first test also starts the ranks, on a machine that may be busy
]
ISOLATED = {"ctr", "hat", "adapter", "lora", "individual"}
"""Methods of which no earlier task's answer may change by one bit."""
TRAIN = {"epochs": 2, "min_round_steps": 2, "weight_decay": 0.05, "max_grad_norm": 0.5}
each_method = pytest.mark.parametrize("method", METHODS)


class PowerCutError(Exception):
    """Ends an attempt at a run."""


class OneStage(LocalDispatcher):
    """Runs one stage, then fails."""

    def __init__(self) -> None:
        self.ran: list[StageRef] = []

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        if self.ran:
            raise PowerCutError
        super().run(job, out, tracker)
        self.ran.append(ref(job.stage))


class Runs:
    """Finished runs of every method in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished: Callable[[str], Run] = cache(lambda method: tiny.compute(self.run(method, "whole")))

    def run(self, method: str, name: str) -> Run:
        return tiny.make_run(self.folder, {"run": {"name": f"{name}-{method}"}, "science": science(method)})

    def job(self, method: str, kind: str) -> Job:
        """Return the job of the last Train or Evaluate stage."""
        run = self.finished(method)
        return next(run.job(stage) for stage in reversed(run.plan(len(run.tasks) - 1)) if stage.kind == kind)


def science(method: str) -> dict[str, Any]:
    longer = tiny.TEXT_TRAIN if tiny.writes(method) else {}
    return {"method": dict(tiny.METHODS[method]), "train": {**TRAIN, **longer}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="module")
def three() -> Iterator[Ranks]:
    pool = Ranks(world=3)
    yield pool
    pool.close()


def results(run: Run) -> dict[str, bytes]:
    """Return what a run found: weights, learner state, scores, predictions and matrix; not its timings."""
    folder = run.config.folder
    kept = [p for p in folder.rglob("*") if p.suffix in (".safetensors", ".csv") or p.name == "scores.json"]
    kept += folder.rglob("predictions/*.jsonl")
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def planned(run: Run) -> list[StageRef]:
    return [ref(stage) for task in range(len(run.tasks)) for stage in run.plan(task)]


@torch.no_grad()
def logits(learner: Learner, job: Job, task: int, numbers: list[int], pad: int = 0) -> Tensor:
    """Return the logits (B, K) of some test rows, with `pad` more tokens of padding than they need.

    Of a decoder, whose answers have no classes, the loss of each row (B, 1) is returned; it has no more padding.
    """
    data = task_data(job, task)
    rows = learner.rows(load_tokenizer(job.model), job.max_length[task], training=False)
    rows.add(task, data, data.test)
    batch: dict[str, Any] = rows.batch(numbers)
    if writes_text(job.method, job.model):
        learner.activate(task)
        return learner.score_examples(learner.model.eval()(batch), batch)[0][:, None]
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        if name in batch:
            batch[name] = torch.nn.functional.pad(batch[name], (0, pad))
    learner.activate(task)
    return learner.model.eval()(batch)


def test_every_method_has_settings_to_be_tested_with() -> None:
    assert set(tiny.METHODS) == set(METHODS)
    for name, settings in tiny.METHODS.items():
        assert METHODS[name].config.model_validate(dict(settings)).name == name


@each_method
def test_interrupted_before_every_stage_a_run_ends_with_the_same_bytes(runs: Runs, method: str) -> None:
    expected = runs.finished(method)
    ran: list[StageRef] = []
    for _ in planned(expected)[1:]:
        dispatcher = OneStage()
        with pytest.raises(PowerCutError):
            tiny.compute(runs.run(method, "cut"), dispatcher)
        ran += dispatcher.ran
    last = OneStage()
    found = tiny.compute(runs.run(method, "cut"), last)
    assert ran + last.ran == planned(expected)  # each stage once, in order
    assert results(found) == results(expected)


def difference(runs: Runs, ranks: Ranks, cell: parity.Cell, out: Path) -> dict[str, float]:
    """Train the second task on a gang and in this process, and compare."""
    made = parity.run(runs.folder / "parity", cell.method)
    reference = runs.folder / "parity" / f"reference-{cell.method}"
    if not reference.exists():
        parity.train_here(made.job(made.stage(parity.SECOND)), reference)
    return parity.train_on(ranks, cell, made, out / "out").difference(parity.Trained.read(reference))


@pytest.mark.parametrize("method", parity.SETTINGS)
@pytest.mark.parametrize(("zero_stage", "accumulation"), [(1, 1), (2, 2), (3, 1)])
def test_two_workers_train_what_one_does(
    runs: Runs, ranks: Ranks, tmp_path: Path, method: str, zero_stage: Any, accumulation: int
) -> None:
    found = difference(runs, ranks, parity.Cell(method, zero_stage, 2, accumulation), tmp_path)
    assert found["weights"] <= 1e-5, found
    assert found["metrics"] <= 1e-4, found
    assert found["mask_bits"] == 0, found


@pytest.mark.parametrize("method", ["ctr", "ewc"])
def test_three_workers_train_what_one_does_where_they_divide_nothing_evenly(
    three: Ranks, runs: Runs, tmp_path: Path, method: str
) -> None:
    found = difference(runs, three, parity.Cell(method, 3, workers=3, accumulation=2), tmp_path)
    assert found["weights"] <= 1e-5, found
    assert found["mask_bits"] == 0, found


@each_method
def test_training_twice_gives_the_same_bytes(runs: Runs, tmp_path: Path, method: str) -> None:
    job = runs.job(method, "train")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        parity.train_here(job, folder)
    first, second = ({p.name: p.read_bytes() for p in f.glob("*.safetensors")} for f in folders)
    assert first
    assert first == second


@each_method
def test_what_a_task_may_not_move_does_not_move(runs: Runs, tmp_path: Path, method: str) -> None:
    """Frozen parameters are not written, and entries whose gradient is masked keep every bit, through weight decay."""
    job = runs.job(method, "train")
    assert isinstance(job.stage, Train)
    before = build_learner(job)
    train.start(job, before)
    frozen = {name for name, p in before.model.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in before.model.named_parameters()}
    after = parity.train_here(job, tmp_path / "out").weights
    assert not frozen & after.keys()
    assert any(not torch.equal(start[name], after[name]) for name in after)
    protected = before.gradient_transforms()
    for name, scale in protected.items():
        kept = frozen_entries(scale, start[name])
        assert torch.equal(start[name][kept], after[name][kept]), name
    kept_any = any((frozen_entries(scale, start[name])).any() for name, scale in protected.items())
    assert kept_any == (method in {"ctr", "hat", "lamol", "lamol_real", "rational_lamol"})


@each_method
def test_every_forward_pass_in_training_goes_through_the_engine(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Around it no gradient would be reduced with some wrappers, and ranks would train models of their own."""
    through_engine, forwards, learners = list[int](), list[int](), list[Learner]()
    job, call, build = runs.job(method, "train"), TorchEngine.__call__, build_learner

    def counted(engine: TorchEngine, batch: Any) -> Any:
        through_engine.append(1)
        return call(engine, batch)

    def watched(asked: Job, **how: Any) -> Learner:
        learners.append(build(asked, **how))
        if len(learners) == 1:  # a second one measures what was learned, and trains nothing
            learners[0].model.register_forward_hook(lambda *args: forwards.append(1))
        return learners[-1]

    monkeypatch.setattr(TorchEngine, "__call__", counted)
    monkeypatch.setattr(train, "build_learner", watched)
    parity.train_here(job, tmp_path / "out")
    assert through_engine
    assert len(forwards) == len(through_engine)


@each_method
def test_scores_of_the_same_model_are_the_same_bytes(runs: Runs, method: str) -> None:
    job = runs.job(method, "evaluate")
    task = job.stage.task
    learner = build_learner(job)
    first = logits(learner, job, task, [0, 1, 2])
    logits(learner, job, 0, [3, 4]) if 0 in getattr(job.stage, "tasks", ()) else None
    assert torch.equal(logits(learner, job, task, [0, 1, 2]), first)
    assert torch.equal(logits(build_learner(job), job, task, [0, 1, 2]), first)


@each_method
def test_state_that_outlives_a_task_is_stored_and_restored(runs: Runs, method: str) -> None:
    """A learner built from the stored stages has the state that the trained one wrote."""
    job = runs.job(method, "evaluate")
    assert isinstance(job.stage, Evaluate)
    stored = Path(job.chain[-1]) / "learner.safetensors"
    expected = load_file(stored) if stored.exists() else {}
    found = build_learner(job).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@each_method
def test_an_answer_depends_neither_on_the_batch_nor_on_padding(runs: Runs, method: str) -> None:
    job = runs.job(method, "evaluate")
    assert isinstance(job.stage, Evaluate)
    learner = build_learner(job)
    for task in job.stage.tasks:
        together = logits(learner, job, task, [0, 1, 2, 3, 4])
        alone = torch.cat([logits(learner, job, task, [number], pad=3) for number in range(5)])
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
        assert together.std(0).max() > 1e-4  # rows do differ, so that the comparison can fail


@each_method
def test_earlier_tasks_keep_every_bit_of_their_logits_where_that_is_promised(runs: Runs, method: str) -> None:
    run = runs.finished(method)
    digests: dict[str, set[str]] = {}
    for stage in (stage for t in range(len(run.tasks)) for stage in run.plan(t) if stage.kind == "evaluate"):
        for task, scores in run.ledger.read(ref(stage), "scores.json")["tasks"].items():
            digests.setdefault(task, set()).add(scores["output_sha256"])
    assert len(digests) == len(run.tasks)
    changed = any(len(found) > 1 for found in digests.values())
    assert changed == (method not in ISOLATED | {"joint"})  # joint scores once, at the end


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"joint"}))  # which waits for the last task
def test_a_task_appended_to_a_finished_run_is_learned_as_if_it_had_been_there(runs: Runs, method: str) -> None:
    expected = runs.finished(method)
    over = {"run": {"name": f"grown-{method}"}, "science": science(method) | {"order": list(tiny.TASKS[:2])}}
    tiny.compute(tiny.make_run(runs.folder, over))
    found = tiny.compute(runs.run(method, "grown"))
    assert results(found) == results(expected)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"joint"}))  # which trains once
def test_what_a_task_stores_does_not_grow_with_the_tasks_before_it(runs: Runs, method: str) -> None:
    run = runs.finished(method)
    stored = [ShardedWeights(run.ledger.path(StageRef(task=task, stage="train"))) for task in (1, 2)]
    sizes = [sum(w[name].numel() for name in w if not name.startswith("heads.")) for w in stored]
    assert sizes[0] == sizes[1] > 0


@each_method
def test_a_report_finds_plain_facts(runs: Runs, method: str) -> None:
    summary = json.loads((runs.finished(method).config.folder / "metrics" / "summary.json").read_text())
    accuracy = summary["metrics"]["cl/avg_acc"]["value"]
    assert 0 <= accuracy <= 1
    assert summary["method"] == method
