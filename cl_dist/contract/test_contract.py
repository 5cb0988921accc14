"""The promises that every method keeps.

A method of cl-dist is tested by its line in METHODS and one in contract/tiny.py, a method of another package by the
option --method. The methods run as users run them, through plan, ledger and stages; a run that several tests need is
computed once.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cl_dist.contract import parity, tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.errors import ConfigError
from cl_dist.learners.base import Learner, Progress
from cl_dist.methods import capabilities_of
from cl_dist.models.architectures import layers_of
from cl_dist.models.backbone import load_backbone, load_tokenizer
from cl_dist.parallel.engine import TorchEngine
from cl_dist.parallel.forward import ForwardOnly
from cl_dist.parallel.gradients import frozen_entries
from cl_dist.run import Run
from cl_dist.run_events import Tracker
from cl_dist.stage import Evaluate, StageRef, Train, ref
from cl_dist.stages import build, train
from cl_dist.stages.build import build_learner, writes_text
from cl_dist.stages.stage_job import Job, task_data
from cl_dist.stages.weights import ShardedWeights

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about names that DeepSpeed uses
    pytest.mark.timeout(300),  # the first test also starts the ranks, on a machine that may be busy
]
TRAIN = {"epochs": 2, "min_round_steps": 2, "weight_decay": 0.05, "max_grad_norm": 0.5}


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
        return tiny.make_run(
            self.folder, {"run": {"name": f"{name}-{tiny.run_name(method)}"}, "science": science(method)}
        )

    def job(self, method: str, kind: str) -> Job:
        """Return the job of the last Train or Evaluate stage."""
        run = self.finished(method)
        return next(run.job(stage) for stage in reversed(run.plan(len(run.tasks) - 1)) if stage.kind == kind)


def science(method: str) -> dict[str, Any]:
    longer = tiny.TEXT_TRAIN if tiny.writes(method) else {}
    return {"method": dict(tiny.METHODS[method]), "train": {**TRAIN, **longer}}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run over the method of --method, or over all of cl-dist and variants that train something else."""
    given = metafunc.config.getoption("--method", default=None)
    for name, known in (("method", tiny.METHODS), ("variant", parity.SETTINGS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, list(known) if given is None else [given])


def learns_each_task(run: Run) -> bool:
    """Return whether every task has a stage that trains; `joint` waits for the last one."""
    return all(any(stage.kind == "train" for stage in run.plan(task)) for task in range(len(run.tasks)))


def assert_declared(runs: Runs, method: str, flag: str, derived: bool) -> None:
    """Compare a flag of Capabilities with the behaviour of a finished run."""
    science = runs.finished(method).config.science
    declared = getattr(capabilities_of(science.method, science.model), flag)
    assert declared == derived, (
        f"method {method!r} declares Capabilities({flag}={declared}), but its learner shows {flag}={derived}: correct "
        "`capabilities` in its Method, or the learner"
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("contract"))


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
    reference = runs.folder / "parity" / f"reference-{tiny.run_name(cell.method)}"
    if not reference.exists():
        parity.train_here(made.job(made.stage(parity.SECOND)), reference)
    return parity.train_on(ranks, cell, made, out / "out").difference(parity.Trained.read(reference))


@pytest.mark.parametrize(("zero_stage", "accumulation"), [(1, 1), (2, 2), (3, 1)])
def test_two_workers_train_what_one_does(
    runs: Runs, ranks: Ranks, tmp_path: Path, variant: str, zero_stage: Any, accumulation: int
) -> None:
    found = difference(runs, ranks, parity.Cell(variant, zero_stage, 2, accumulation), tmp_path)
    assert found["weights"] <= 1e-5, found
    assert found["metrics"] <= 1e-4, found
    assert found["mask_bits"] == 0, found


def test_training_twice_gives_the_same_bytes(runs: Runs, tmp_path: Path, method: str) -> None:
    job = runs.job(method, "train")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        parity.train_here(job, folder)
    first, second = ({p.name: p.read_bytes() for p in f.glob("*.safetensors")} for f in folders)
    assert first
    assert first == second


def test_what_a_task_may_not_move_does_not_move(runs: Runs, tmp_path: Path, method: str) -> None:
    """Frozen parameters are not written, and entries whose gradient is masked keep every bit, through weight decay."""
    job = runs.job(method, "train")
    assert isinstance(job.stage, Train)
    before = build_learner(job)
    train.prepare_learner(job, before)
    frozen = {name for name, p in before.model.named_parameters() if not p.requires_grad}
    start = {name: p.detach().clone() for name, p in before.model.named_parameters()}
    after = parity.train_here(job, tmp_path / "out").weights
    assert not frozen & after.keys()
    assert any(not torch.equal(start[name], after[name]) for name in after)
    protected = before.gradient_transforms()
    for name, scale in protected.items():
        kept = frozen_entries(scale, start[name])
        assert torch.equal(start[name][kept], after[name][kept]), name


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


def test_scores_of_the_same_model_are_the_same_bytes(runs: Runs, method: str) -> None:
    job = runs.job(method, "evaluate")
    task = job.stage.task
    learner = build_learner(job)
    first = logits(learner, job, task, [0, 1, 2])
    logits(learner, job, 0, [3, 4]) if 0 in getattr(job.stage, "tasks", ()) else None
    assert torch.equal(logits(learner, job, task, [0, 1, 2]), first)
    assert torch.equal(logits(build_learner(job), job, task, [0, 1, 2]), first)


def test_state_that_outlives_a_task_is_stored_and_restored(runs: Runs, method: str) -> None:
    """A learner built from the stored stages has the state that the trained one wrote."""
    job = runs.job(method, "evaluate")
    assert isinstance(job.stage, Evaluate)
    stored = Path(job.chain[-1]) / "learner.safetensors"
    expected = load_file(stored) if stored.exists() else {}
    found = build_learner(job).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_answer_depends_neither_on_the_batch_nor_on_padding(runs: Runs, method: str) -> None:
    job = runs.job(method, "evaluate")
    assert isinstance(job.stage, Evaluate)
    learner = build_learner(job)
    for task in job.stage.tasks:
        together = logits(learner, job, task, [0, 1, 2, 3, 4])
        alone = torch.cat([logits(learner, job, task, [number], pad=3) for number in range(5)])
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-5)
        assert together.std(0).max() > 1e-4  # rows do differ, so that the comparison can fail


def test_earlier_tasks_keep_every_bit_of_their_logits_if_the_method_is_isolated(runs: Runs, method: str) -> None:
    run = runs.finished(method)
    digests: dict[str, list[str]] = {}
    for stage in (stage for t in range(len(run.tasks)) for stage in run.plan(t) if stage.kind == "evaluate"):
        for task, scores in run.ledger.read(ref(stage), "scores.json")["tasks"].items():
            digests.setdefault(task, []).append(scores["output_sha256"])
    assert len(digests) == len(run.tasks)
    if learns_each_task(run):
        assert_declared(runs, method, "isolated", all(len(set(found)) == 1 for found in digests.values()))


def test_a_task_appended_to_a_finished_run_is_learned_as_if_it_had_been_there(runs: Runs, method: str) -> None:
    expected = runs.finished(method)
    if not learns_each_task(expected):
        return
    over = {
        "run": {"name": f"grown-{tiny.run_name(method)}"},
        "science": science(method) | {"order": list(tiny.TASKS[:2])},
    }
    tiny.compute(tiny.make_run(runs.folder, over))
    found = tiny.compute(runs.run(method, "grown"))
    assert results(found) == results(expected)


def test_what_a_task_stores_does_not_grow_with_the_tasks_before_it(runs: Runs, method: str) -> None:
    run = runs.finished(method)
    if not learns_each_task(run):
        return
    stored = [ShardedWeights(run.ledger.path(StageRef(task=task, stage="train"))) for task in (1, 2)]
    sizes = [sum(w[name].numel() for name in w if not name.startswith("heads.")) for w in stored]
    assert sizes[0] == sizes[1]  # heads apart, whose sizes are those of their tasks
    assert all(stored)


def test_a_report_finds_plain_facts(runs: Runs, method: str) -> None:
    summary = json.loads((runs.finished(method).config.folder / "metrics" / "summary.json").read_text())
    accuracy = summary["metrics"]["cl/avg_acc"]["value"]
    assert 0 <= accuracy <= 1
    assert summary["method"] == method


def test_capabilities_are_those_of_the_learner(runs: Runs, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    job, pretrained, load = runs.job(method, "train"), list[torch.nn.Parameter](), load_backbone

    def watched(*args: Any, **kwargs: Any) -> Any:
        backbone = load(*args, **kwargs)
        pretrained.extend(backbone.parameters())
        return backbone

    monkeypatch.setattr("cl_dist.stages.build.load_backbone", watched)
    learner = build_learner(job)
    train.prepare_learner(job, learner)
    inside = {id(parameter) for parameter in learner.model.parameters()}
    trained = any(parameter.requires_grad for parameter in pretrained if id(parameter) in inside)
    assert_declared(runs, method, "freezes_backbone", not trained)
    assert_declared(runs, method, "penalties", bool(learner.penalties()))


class Opaque(torch.nn.Module):
    """A linear layer whose weight cannot be read or trained, as if it were quantized."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self._inner = [inner]  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self._inner[0].weight.detach(), self._inner[0].bias.detach()
        return torch.nn.functional.linear(x, weight, bias)


def test_a_method_for_quantized_backbones_neither_trains_nor_wraps_linear_layers(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    job, load = replace(runs.job(method, "train"), chain=()), load_backbone
    if writes_text(job.method, job.model):
        return  # its backbone here is a GPT-2, whose layers are no nn.Linear

    def opaque(*args: Any, **kwargs: Any) -> Any:
        backbone = load(*args, **kwargs)
        for _, layer in layers_of(backbone):
            for name, module in list(layer.named_modules()):
                if isinstance(module, torch.nn.Linear):
                    layer.set_submodule(name, Opaque(module))
        return backbone

    monkeypatch.setattr("cl_dist.stages.build.load_backbone", opaque)
    try:
        learner = build_learner(job)
        train.prepare_learner(job, learner)
        loss = learner.loss(learner.model.train(), two_rows(learner, job), Progress(0, 10, 0, 10))
        torch.stack([term.sum() for term in loss.per_example.values()]).sum().backward()
        works = True
    except (ConfigError, AttributeError):
        works = False
    freezes = capabilities_of(job.method, job.model).freezes_backbone
    assert_declared(runs, method, "takes_quantized", works and freezes)


def two_rows(learner: Learner, job: Job) -> Any:
    """Return a batch of two train rows."""
    rows = learner.rows(load_tokenizer(job.model), job.max_length[job.stage.task], training=True)
    data = task_data(job, job.stage.task)
    rows.add(job.stage.task, data, data.train)
    return rows.batch([0, 1])


def test_a_method_that_refuses_a_partitioned_backbone_cannot_train_on_one(
    runs: Runs, ranks: Ranks, tmp_path: Path, method: str
) -> None:
    """Methods that take one train on it in the comparison of two workers with one, at ZeRO 3."""
    science = runs.finished(method).config.science
    if capabilities_of(science.method, science.model).takes_partitioned or science.model.config is not None:
        return
    made = parity.run(runs.folder / "parity", method)
    job = made.job(made.stage(parity.SECOND))
    reference = parity.train_here(job, tmp_path / "here")
    (tmp_path / "out").mkdir()
    job = replace(job, engine=parity.Cell(method, 3, 2, 1).engine)
    try:
        ranks.run(train_partitioned, job, str(tmp_path / "out"), timeout_s=200.0)
        works = parity.Trained.read(tmp_path / "out").difference(reference)["weights"] <= 1e-5
    except Exception:  # any fault says that it cannot
        works = False
    assert_declared(runs, method, "takes_partitioned", works)


def train_partitioned(rank: int, world: int, job: Job, out: str) -> None:
    """Train on a backbone that is partitioned while it is loaded, whatever the method declares."""
    own = build.loads_partitioned
    build.loads_partitioned = lambda *args: True
    try:
        train.run(job, Path(out), lambda event: None)
    finally:
        build.loads_partitioned = own


def test_a_loss_reads_parameters_in_the_forward_pass_alone(runs: Runs, method: str) -> None:
    """Under ZeRO 3 they are empty elsewhere; here the same check runs on one worker, over all parameters."""
    job = runs.job(method, "train")
    learner = build_learner(job)
    train.prepare_learner(job, learner)
    reads = ForwardOnly(dict(learner.model.named_parameters()))

    def model(batch: Any) -> Any:
        with reads.suspended():
            return learner.model(batch)

    batch = two_rows(learner, job)
    learner.model.train()
    with reads.watching():
        learner.loss(model, batch, Progress(0, 10, 0, 10))
