"""Methods on decoders: which of them write answers, what they train, free-text tasks, distillation."""

from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.data.rows import Row
from cl_dist.data.tasks import TaskConfig
from cl_dist.errors import ConfigError, DataError
from cl_dist.planning.trace import TracedLearner
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import StageRef, ref
from cl_dist.stages.build import build_learner
from cl_dist.stages.evaluate import score_answers
from cl_dist.stages.weights import ShardedWeights
from tests.architectures import TINY
from tests.parity import train_here

TEXT = {"model": {"output": "lm"}}


def made(folder: Path, method: dict[str, Any], name: str = "tiny", **science: Any) -> Run:
    over = {"run": {"name": name}, "science": {**TEXT, "method": method, **science}}
    return tiny.make_run(folder, over, tasks=("food", "film"))


@pytest.mark.parametrize("method", ["sequential", "individual", "joint", "replay"])
def test_baselines_learn_to_answer_in_text(tmp_path: Path, method: str) -> None:
    run = tiny.compute(made(tmp_path, {"name": method}))
    last = run.plan(1)[-1]
    scores = run.ledger.read(ref(last), "scores.json")["tasks"]["1"]
    assert scores["accuracy"] >= 0.8  # the answers are spelled out, and mostly right
    assert scores["score"] == scores["accuracy"]
    assert 0 <= scores["f1_macro"] <= 1


def test_a_method_that_picks_classes_refuses_to_write_and_one_that_writes_to_pick(tmp_path: Path) -> None:
    for method, output in (("ctr", "lm"), ("lamol", "classifier")):
        tree = tiny.tree(tmp_path, {"science": {"method": dict(tiny.METHODS[method])}})
        tree["science"]["model"]["output"] = output
        with pytest.raises(ConfigError, match=rf"output='{output}': this method supports"):
            parse(RunConfig, tree)


def test_free_text_needs_a_method_that_writes(tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path)
    tree["science"]["tasks"][0] |= {"output": "text", "metric": "f1"}
    with pytest.raises(ConfigError, match=r"tasks\.food\.output='text': method 'ctr' predicts labels only"):
        parse(RunConfig, tree)
    tree["science"]["tasks"][0] |= {"metric": "accuracy"}
    with pytest.raises(ConfigError, match="expected exact_match, f1, turn_state, joint_state, rouge_l or bleu"):
        parse(RunConfig, tree)


def test_a_task_with_free_text_is_scored_by_its_metric(tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, {"science": {**TEXT, "method": {"name": "sequential"}}}, tasks=("food",))
    tree["science"]["tasks"][0] |= {"output": "text", "metric": "f1"}
    run = tiny.compute(Run(parse(RunConfig, tree)))
    scores = run.ledger.read(StageRef(task=0, stage="evaluate"), "scores.json")["tasks"]["0"]
    assert scores["score"] == scores["f1"] >= scores["exact_match"] >= 0.8
    assert scores["f1_macro"] is None
    assert run.data(0).labels == ()


def test_turns_are_followed_through_their_dialogues() -> None:
    task = TaskConfig.model_validate(
        {"id": "woz", "output": "text", "metric": "joint_state", "source": {"kind": "jsonl", "path": "woz.jsonl"}}
    )
    said = [("a-0", "food: thai;"), ("b-0", "area: west;"), ("a-1", "area: east;")]
    rows = [Row(name, "text", None, label) for name, label in said]
    found = score_answers(task, (), rows, ["food: thai;", "area: north;", ";"])
    assert found["joint_state"] == found["score"] == found["turn_state"] == 1 / 3
    later = score_answers(task, (), rows, ["food: greek;", "area: west;", "area: east;"])
    assert later["turn_state"] == 2 / 3
    assert later["joint_state"] == 1 / 3  # what was missed in the first turn is still missed in the second
    numbered = [Row(str(number), "text", None, label) for number, (_, label) in enumerate(said)]
    with pytest.raises(DataError, match=r"joint_state needs ids <dialogue>-<turn number>, not '0'"):
        score_answers(task, (), numbered, ["food: thai;"] * 3)


@pytest.mark.parametrize(
    ("method", "kind"), [("lamol", "bert"), ("rational_lamol", "roberta"), ("sequential", "modernbert")]
)
def test_an_encoder_is_not_asked_to_write(tmp_path: Path, method: str, kind: str) -> None:
    sizes = {"model_type": kind, **TINY[kind]}
    tree = tiny.tree(tmp_path, {"science": {**TEXT, "method": dict(tiny.METHODS[method])}}, tasks=("food",))
    tree["science"]["model"]["config"] = sizes
    run = Run(parse(RunConfig, tree))
    science = run.config.science
    for build in (
        lambda: build_learner(run.job(run.plan(0)[0])),
        lambda: TracedLearner(science.method, science.model, (2,)),  # what a plan does
    ):
        with pytest.raises(
            ConfigError, match=rf"model_type='{kind}' is an encoder, which cannot generate text; .* gpt2,"
        ):
            build()


def test_rows_longer_than_the_model_reads_are_refused(tmp_path: Path) -> None:
    run = made(tmp_path, {"name": "sequential"}, train={"max_length": 64})
    with pytest.raises(ConfigError, match="max_length=64: this model reads at most 32 tokens"):
        train_here(run.job(run.plan(0)[0]), tmp_path / "out")


def test_distillation_follows_the_model_before_the_task(tmp_path: Path) -> None:
    """Learned wholly from a teacher that is the model itself, replayed rows pull no weight anywhere at the start."""
    found = []
    for share in (0.0, 1.0):
        run = made(tmp_path, {"name": "lamol_real", "gamma": 1.0, "distill": share}, f"share{share:g}")
        tiny.compute(run)
        stage = run.stage(StageRef(task=1, stage="train"))
        learner = build_learner(run.job(stage))
        learner.start_task(1, (0, 1))
        found.append(run)
        data = run.data(0)
        rows = learner.rows(_tokenizer(run), 16, training=True)
        rows.add(0, data, data.train[:4], replayed=True)
        loss = learner.loss(learner.model.train(), rows.batch([0, 1, 2, 3]), None)  # type: ignore[arg-type]
        total = sum(float(term.sum()) for term in loss.per_example.values())
        assert (total < 1e-4) == (share == 1.0)
    weights = [ShardedWeights(run.ledger.path(StageRef(task=1, stage="train"))) for run in found]
    name = min(weights[0])
    assert not torch.equal(weights[0][name], weights[1][name])


def test_a_vocabulary_that_is_used_up_grows_at_the_next_task(tmp_path: Path) -> None:
    science = {"model": {"output": "lm", "spare_task_tokens": 1}, "method": {"name": "lamol", "gamma": 0.5}}
    run = tiny.compute(tiny.make_run(tmp_path, {"science": science}, tasks=("food", "film")))
    stored = [ShardedWeights(run.ledger.path(StageRef(task=t, stage="train"))) for t in (0, 1)]
    name = next(name for name in stored[0] if name.endswith("wte.weight"))
    sizes = [len(weights[name]) for weights in stored]
    assert sizes == [len(tiny.SPOKEN) + 5, len(tiny.SPOKEN) + 6]
    fresh = build_learner(run.job(run.stage(StageRef(task=1, stage="train"))))
    assert torch.equal(fresh.model.get_parameter(name)[: sizes[0]], stored[0][name])
    job = run.job(run.stage(StageRef(task=1, stage="evaluate")))
    early = build_learner(job, up_to=0)  # as a worker that is given an early task's shards first
    assert torch.equal(early.model.get_parameter(name), stored[1][name][: sizes[0]])


def test_the_keys_biases_of_gpt2_keep_every_bit(tmp_path: Path) -> None:
    run = made(tmp_path, {"name": "sequential"}, train={"weight_decay": 0.1})
    stage = run.plan(0)[0]
    before = build_learner(run.job(stage))
    after = train_here(run.job(stage), tmp_path / "out").weights
    name = next(name for name in after if name.endswith("0.attn.c_attn.bias"))
    start = before.model.get_parameter(name).detach()
    size = len(start) // 3
    assert torch.equal(after[name][size : 2 * size], start[size : 2 * size])
    assert not torch.equal(after[name][:size], start[:size])


def _tokenizer(run: Run) -> Any:
    from cl_dist.models.backbone import load_tokenizer

    return load_tokenizer(run.config.science.model)
