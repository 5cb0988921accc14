import hashlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cl_dist.contract import tiny
from cl_dist.data.rows import Row
from cl_dist.run import Run
from cl_dist.stage import StageRef
from cl_dist.stages.predict import Predictor
from cl_dist.stages.weights import ShardedWeights

LAST = StageRef(task=1, stage="evaluate")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished CTR run over two tasks with ten test rows each, scored in shards of six rows, four at a time."""
    over = {"science": {"train": {"epochs": 1, "min_round_steps": 1}}}
    return tiny.compute(tiny.make_run(tmp_path_factory.mktemp("predict"), over, tasks=("food", "film")))


@pytest.fixture(scope="module")
def predictor(run: Run) -> Predictor:
    return Predictor(run.job(run.stage(LAST)))


@pytest.mark.parametrize("task", [1, 0])
def test_logits_are_to_the_bit_those_of_the_evaluate_stage(run: Run, predictor: Predictor, task: int) -> None:
    logits = predictor.logits(task, run.data(task).test)
    text = "\n".join(row_K.numpy().tobytes().hex() for row_K in logits)
    scores = run.ledger.read(LAST, "scores.json")["tasks"][str(task)]
    assert hashlib.sha256(text.encode()).hexdigest() == scores["output_sha256"]


def test_labels_are_not_looked_at(run: Run, predictor: Predictor) -> None:
    rows = run.data(0).test
    blind = [Row(row.id, row.text, None, label="") for row in rows]
    assert torch.equal(torch.stack(predictor.logits(0, rows)), torch.stack(predictor.logits(0, blind)))
    assert predictor.logits(0, []) == []


def test_nothing_is_written(run: Run, predictor: Predictor) -> None:
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in run.config.folder.rglob("*")}

    before = stamps()
    predictor.logits(1, run.data(1).dev)
    assert stamps() == before


def test_an_early_task_is_answered_without_loading_what_later_tasks_added(run: Run, tmp_path: Path) -> None:
    """The last task's files need not even hold its capsules; those of the shared layers are still its own."""
    job = run.job(run.stage(LAST))
    lean = tmp_path / "lean"
    weights = ShardedWeights(job.chain[-1])
    shared = {name: tensor for name, tensor in weights.items() if ".fc1." in name or ".fc2." in name}
    lean.mkdir()
    save_file(shared, lean / "trainable.safetensors")
    shutil.copy(Path(job.chain[-1]) / "learner.safetensors", lean)
    early = Predictor(replace(job, chain=(*job.chain[:-1], str(lean))))
    expected = Predictor(job)
    expected.logits(1, run.data(1).test)  # which loads all there is
    rows = run.data(0).test
    assert torch.equal(torch.stack(early.logits(0, rows)), torch.stack(expected.logits(0, rows)))
    sizes = [sum(p.numel() for p in predictor.learner.model.parameters()) for predictor in (early, expected)]
    own = sum(t.numel() for name, t in weights.items() if name not in shared)
    assert sizes[1] - sizes[0] >= own > 0


def test_shared_weights_of_a_later_task_are_not_left_out(run: Run, tmp_path: Path) -> None:
    job = run.job(run.stage(LAST))
    old = Predictor(replace(job, chain=job.chain[:-1]))
    new = Predictor(job)
    rows = run.data(0).test
    old.logits(0, rows)
    new.logits(0, rows)
    name = next(name for name, _ in new.learner.model.named_parameters() if name.endswith("fc1.weight"))
    weights = [predictor.learner.model.get_parameter(name) for predictor in (old, new)]
    assert not torch.equal(*weights)  # the second task has changed units that the first does not use
