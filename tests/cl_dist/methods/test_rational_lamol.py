"""Rational LAMOL as a plan of stages, its vote as shards, and what its learner freezes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cl_dist.contract import tiny
from cl_dist.data.rows import Row
from cl_dist.errors import CheckpointError, ConfigError, DataError
from cl_dist.parallel.gradients import frozen_entries
from cl_dist.planning.trace import TracedLearner
from cl_dist.run import Run
from cl_dist.run_events import summary
from cl_dist.stage import Record, StageRef, Train, Vote, ref
from cl_dist.stages import train, vote
from cl_dist.stages.build import build_learner
from cl_dist.stages.predict import Predictor
from cl_dist.stages.shards import sharded
from cl_dist.stages.stage_job import Job
from cl_dist.stages.voting_shards import Shard
from tests.parity import train_here

FINAL = StageRef(task=1, stage="train")


def made(folder: Path, name: str = "tiny", train: dict[str, Any] | None = None, **method: Any) -> Run:
    settings = {**tiny.METHODS["rational_lamol"], **method}
    science: dict[str, Any] = {"method": settings, "train": {**tiny.TEXT_TRAIN, **(train or {})}}
    return tiny.make_run(folder, {"run": {"name": name}, "science": science}, tasks=("food", "film"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run with votes of heads."""
    return tiny.compute(made(tmp_path_factory.mktemp("rational")))


def results(job: Job, out: Path, size: int) -> dict[str, bytes]:
    """Work on a stage in shards of another size."""
    assert not isinstance(job.stage, Train)
    changed = job.stage.vote.model_copy(update={"shard_samples": size})  # type: ignore[union-attr]
    job = replace(job, stage=job.stage.model_copy(update={"vote": changed}))
    kind = sharded(job.stage.kind)
    workers = [kind.worker(job), kind.worker(job)]
    cut = kind.cut(job)
    found = [(shard, workers[number % 2].run(shard)) for number, shard in enumerate(reversed(cut))]
    out.mkdir()
    kind.merge(job, found, out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_plan_is_the_papers_four_steps(run: Run) -> None:
    names = [[stage.name for stage in run.plan(task)] for task in (0, 1)]
    assert names == [["train", "evaluate"], ["generate", "record", "free", "vote", "train", "evaluate"]]
    free, final = (run.stage(StageRef(task=1, stage=name)) for name in ("free", "train"))
    assert isinstance(free, Train)
    assert isinstance(final, Train)
    first = StageRef(task=0, stage="train")
    assert free.init == final.init == first  # the second time from the model before the task, not from the free one
    assert run.job(final).chain == (str(run.ledger.path(first).absolute()),)
    assert free.frozen is None
    assert final.frozen == StageRef(task=1, stage="vote")
    evaluate = run.plan(1)[-1]
    assert str(run.ledger.path(FINAL).absolute()) in run.job(evaluate).chain


@pytest.mark.parametrize("kind", ["record", "vote"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_any_number_of_shards_finds_the_same(run: Run, tmp_path: Path, kind: str, size: int) -> None:
    stage = run.stage(StageRef(task=1, stage=kind))
    found = results(run.job(stage), tmp_path / "out", size)
    assert len(sharded(kind).cut(run.job(stage))) == 2  # of six dev rows four at a time
    for name, content in found.items():
        assert content == (run.ledger.path(ref(stage)) / name).read_bytes()


def test_the_vote_tells_what_it_rests_on(run: Run) -> None:
    found = run.ledger.read(StageRef(task=1, stage="vote"), "critical.json")
    assert found["used"] == 6
    assert found["voting_tasks"] == ["food"]
    assert found["skipped"] == {}
    assert np.array(found["votes"]).shape == (2, 2)
    assert np.array(found["votes"]).sum() == 6
    assert len(found["chosen"]) == 1
    assert len(found["minima"]) == 6
    assert 0 <= found["margin"] <= 1
    layer, unit = found["chosen"][0]
    assert found["votes"][layer][unit] == np.array(found["votes"]).max()
    facts = run.ledger.read(FINAL, "train.json")["learner"]
    assert facts["frozen_units"] == found["chosen"]
    assert 0 < facts["freeze/params_frac"] < 0.2


def test_the_summary_keeps_how_c_is_distributed(run: Run) -> None:
    (found,) = summary(run)["votes"]
    stored = run.ledger.read(StageRef(task=1, stage="vote"), "critical.json")
    ((layer, unit),) = stored["chosen"]
    assert found["distribution"]["chosen"] == [stored["histogram"][layer][unit]]
    assert sum(found["distribution"]["others"]) == 3 * 6  # of 2 x 2 heads the others, six rows each
    assert (
        np.add(found["distribution"]["others"], stored["histogram"][layer][unit]).tolist()
        == np.sum(stored["histogram"], axis=(0, 1)).tolist()
    )


def test_rows_without_a_rationale_and_rows_that_are_cut_off_do_not_vote(run: Run) -> None:
    job = run.job(run.stage(StageRef(task=1, stage="record")))
    data = run.data(0)
    reader = vote.RecordWorker(job)

    def skipped(row: Row) -> str | None:
        return reader._rationale(0, data, row, reader._tokens(data, row)[1])[1]

    assert skipped(data.dev[0]) is None
    assert skipped(replace(data.dev[0], rationale=())) == "no_rationale"
    assert skipped(replace(data.dev[0], text="tasty", rationale=((0, 5),))) == "too_short"
    long = replace(data.dev[0], text="the " * 40 + "tasty", rationale=((160, 165),))
    assert skipped(long) == "cut_off"
    tokens, kept = reader._tokens(data, long)
    assert len(tokens) == kept == job.train.max_length - 6  # ans, the token that asks, answer, question
    with pytest.raises(DataError, match=r"none of 1 rows can vote: \{'no_rationale': 1\}.*tasks\.<id>\.rationale"):
        vote.merge_record(job, [(Shard(0, 0, 1), [{"skipped": "no_rationale"}])], Path())


def test_question_and_answer_are_read_only_if_asked_for(run: Run) -> None:
    job = run.job(run.stage(StageRef(task=1, stage="record")))
    assert isinstance(job.stage, Record)
    whole = replace(
        job, stage=job.stage.model_copy(update={"vote": job.stage.vote.model_copy(update={"attention_scope": "all"})})
    )
    data = run.data(0)
    short, kept = vote.RecordWorker(job)._tokens(data, data.dev[0])
    long, same = vote.RecordWorker(whole)._tokens(data, data.dev[0])
    assert kept == same == len(short)
    assert long[:kept] == short
    assert len(long) == len(short) + 3 + 1 + 1  # question, ans, answer


def test_a_record_of_other_tokens_is_refused(run: Run, tmp_path: Path) -> None:
    job = run.job(run.stage(StageRef(task=1, stage="vote")))
    assert isinstance(job.stage, Vote)
    recorded = job.folder(job.stage.recorded) / "recorded.jsonl"
    lines = [json.loads(line) for line in recorded.read_text().splitlines()]
    lines[2]["tokens"] = "0" * 64
    (tmp_path / "recorded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    worker = vote.VoteWorker(replace(job, folders={**job.folders, job.stage.recorded: str(tmp_path)}))
    with pytest.raises(CheckpointError, match="was recorded with other tokens"):
        worker.run(Shard(0, 0, 4))


def test_gradients_stand_in_for_people(tmp_path: Path) -> None:
    run = tiny.compute(made(tmp_path, rationales="gradient", rationale_share=0.2))
    found = run.ledger.read(StageRef(task=1, stage="vote"), "critical.json")
    assert found["used"] == 6
    assert 0 < found["agreement"]["iou"] <= found["agreement"]["f1"] <= 1
    example = found["example"]
    assert len(example["rationale"]) == max(1, -(-len(example["words"]) // 5))
    assert set(example["looked_at"]) <= set(range(len(example["words"])))


def test_gradients_keep_no_attention_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the backward pass needs grows with a text, not with its square, and holds nothing for weights."""
    model = {"config": {"n_positions": 600}}
    over = {"model": model, "method": {**tiny.METHODS["rational_lamol"], "rationales": "gradient"}}
    run = tiny.make_run(tmp_path, {"science": {**over, "train": {"max_length": 600}}}, tasks=("food", "film"))
    train_here(run.job(run.plan(0)[0]), run.ledger.path(StageRef(task=0, stage="train")))
    reader = vote.RecordWorker(run.job(run.stage(StageRef(task=1, stage="record"))))
    row, found = run.data(0).dev[0], []
    for length in (250, 500):
        long = replace(row, text="the " * length)
        monkeypatch.setattr(vote, "voting_rows", lambda data, samples, long=long: [long])
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            (line,) = reader.run(Shard(0, 0, 1))
        assert line["shape"][-1] == length
        found.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    assert 0 < found[1] < 2.1 * found[0]
    assert not any(parameter.requires_grad for parameter in reader._model.parameters())


def test_the_example_shows_the_rationale_in_words(run: Run) -> None:
    example = run.ledger.read(StageRef(task=1, stage="vote"), "critical.json")["example"]
    assert [example["words"][place] for place in example["rationale"]] in (["tasty"], ["bland"])


@pytest.mark.parametrize("level", ["block", "group", "head"])
def test_what_is_frozen_keeps_every_bit_through_decay_and_clipping(tmp_path: Path, level: str) -> None:
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.5, "epochs": 3}
    run = made(tmp_path, train=settings, level=level, freeze="list", frozen_units=[[1, 0]], freeze_output=True)
    first = train_here(run.job(run.plan(0)[0]), run.ledger.path(StageRef(task=0, stage="train"))).weights
    stage = next(stage for stage in run.plan(1) if isinstance(stage, Train)).model_copy(update={"samples": None})
    job = run.job(stage)
    after = train_here(job, tmp_path / "out").weights
    learner = build_learner(job)
    train.prepare_learner(job, learner)
    if level == "block":
        mine = [name for name, p in learner.model.named_parameters() if not p.requires_grad]
        assert mine
        assert all(".h.1." in name for name in mine)
        assert not set(mine) & after.keys()  # nothing of it is in the optimizer, or stored again
        return
    held = {name: scale for name, scale in learner.gradient_transforms().items() if scale.decay}
    assert {name.split(".", 4)[-1] for name in held} == {"attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"}
    for name, scale in held.items():
        kept = frozen_entries(scale, first[name])
        assert torch.equal(after[name][kept], first[name][kept])
        assert not torch.equal(after[name][~kept], first[name][~kept])


def test_all_else_is_updated_as_without_freezing(tmp_path: Path) -> None:
    """After one step with decay and without clipping, whose norm freezing does change."""
    settings = {"weight_decay": 0.1, "max_grad_norm": 0.0, "epochs": 1, "global_batch": 64, "warmup_ratio": 0.0}
    found = {}
    for freeze, units in (("none", []), ("list", [[0, 1]])):
        run = made(tmp_path, freeze, settings, freeze=freeze, frozen_units=units)
        train_here(run.job(run.plan(0)[0]), run.ledger.path(StageRef(task=0, stage="train")))
        stage = next(stage for stage in run.plan(1) if isinstance(stage, Train)).model_copy(update={"samples": None})
        job = run.job(stage)
        found[freeze] = train_here(job, tmp_path / f"out-{freeze}").weights
    learner = build_learner(job)
    train.prepare_learner(job, learner)
    held = {name: scale for name, scale in learner.gradient_transforms().items() if scale.decay}
    assert held
    for name, weight in found["none"].items():
        moves = ~frozen_entries(held[name], weight) if name in held else torch.ones_like(weight, dtype=torch.bool)
        assert torch.equal(found["list"][name][moves], weight[moves])
        assert name not in held or not torch.equal(found["list"][name][~moves], weight[~moves])


@pytest.mark.parametrize(
    ("freeze", "units"),
    [("first", [(0, 0), (0, 1)]), ("last", [(1, 0), (1, 1)]), ("list", [(1, 1)]), ("none", [])],
)
def test_controls_freeze_as_much_without_a_vote(tmp_path: Path, freeze: str, units: list[tuple[int, int]]) -> None:
    run = made(tmp_path, freeze=freeze, top_k=2, frozen_units=units if freeze == "list" else [])
    assert [stage.name for stage in run.plan(1)] == ["generate", "train", "evaluate"]
    train_here(run.job(run.plan(0)[0]), run.ledger.path(StageRef(task=0, stage="train")))
    stage = next(stage for stage in run.plan(1) if isinstance(stage, Train))
    learner: Any = build_learner(run.job(stage))
    learner.start_task(1, (1,))
    assert learner._frozen.units == units


def test_a_random_control_is_drawn_by_seed_and_task(tmp_path: Path) -> None:
    run = made(tmp_path, freeze="random", top_k=2)
    train_here(run.job(run.plan(0)[0]), run.ledger.path(StageRef(task=0, stage="train")))
    job = run.job(next(stage for stage in run.plan(1) if isinstance(stage, Train)))
    drawn = []
    for seed in (0, 0, 1, 2, 3, 4):
        learner: Any = build_learner(replace(job, seed=seed))
        learner.start_task(1, (1,))
        drawn.append(learner._frozen.units)
    assert drawn[0] == drawn[1]
    assert len({tuple(units) for units in drawn}) > 1
    assert all(len(set(units)) == 2 for units in drawn)


def test_a_unit_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    run = made(tmp_path, freeze="list", frozen_units=[[1, 1], [1, 2]])
    train_here(run.job(run.plan(0)[0]), run.ledger.path(StageRef(task=0, stage="train")))
    job = run.job(next(stage for stage in run.plan(1) if isinstance(stage, Train)))
    with pytest.raises(ConfigError, match=r"frozen_units=\[1, 2\]: this model has layers 0..1, each with 2 unit"):
        build_learner(job).start_task(1, (1,))
    with pytest.raises(ConfigError, match="frozen_units belong to freeze: list or brute_force"):
        made(tmp_path, freeze="list")
    with pytest.raises(ConfigError, match="frozen_units belong to freeze: list or brute_force"):
        made(tmp_path, frozen_units=[[1, 1]])


@pytest.mark.parametrize("level", ["head", "group"])
def test_updates_of_which_nothing_can_be_frozen_are_refused(tmp_path: Path, level: Any) -> None:
    def build(*targets: str, **over: Any) -> None:
        lora = {"r": 2, "target_modules": targets}
        run = made(tmp_path, **{"level": level, "lora": lora, **over})
        build_learner(run.job(run.plan(0)[0]))
        TracedLearner(run.config.science.method, run.config.science.model, (2, 2))  # what a plan does

    for targets in (("c_fc",), ("c_fc", "c_proj")):
        with pytest.raises(ConfigError, match=rf"target_modules=\('c_fc'.*level: {level} .* add c_attn, or"):
            build(*targets)
    build("c_fc", "c_attn")
    build("c_proj", freeze_output=True)
    build("c_fc", level="block")
    build("c_fc", freeze="none")


def test_brute_force_tries_every_unit_and_keeps_the_best(tmp_path: Path) -> None:
    run = tiny.compute(made(tmp_path, level="block", freeze="brute_force", frozen_units=[[0, 0], [1, 0]]))
    names = [stage.name for stage in run.plan(1)]
    assert names == ["generate", "try-0", "try-1", "choose", "train", "evaluate"]
    found = run.ledger.read(StageRef(task=1, stage="choose"), "critical.json")
    scores = [tried["accuracy"] for tried in found["tried"]]
    assert found["chosen"] == [found["tried"][scores.index(max(scores))]["unit"]]
    number = scores.index(max(scores))
    best, final = (run.ledger.path(StageRef(task=1, stage=name)) for name in (f"try-{number}", "train"))
    assert (best / "trainable.safetensors").read_bytes() == (final / "trainable.safetensors").read_bytes()
    frozen = [
        run.ledger.read(StageRef(task=1, stage=name), "train.json")["learner"]["frozen_units"]
        for name in ("try-0", "try-1", "train")
    ]
    assert frozen == [[[0, 0]], [[1, 0]], found["chosen"]]
    # Each candidate's score is that of its own weights: the same rows, answered by a predictor over its chain.
    job = run.job(run.stage(StageRef(task=1, stage="choose")))
    for tried, name in zip(found["tried"], ("try-0", "try-1"), strict=True):
        predictor = Predictor(replace(job, chain=(*job.chain, str(run.ledger.path(StageRef(task=1, stage=name))))))
        shares = []
        for task in (1, 0):
            rows = run.data(task).dev
            shares.append(np.mean([a == r.label for a, r in zip(predictor.answers(task, rows), rows, strict=True)]))
        assert tried["accuracy"] == pytest.approx(np.mean(shares))
