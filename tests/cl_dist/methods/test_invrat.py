"""InvRat as stages: trained on any number of workers, chosen by dev accuracy, its spans read by the vote."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.data.environments import RationaleExamples, environments
from cl_dist.data.rows import Row
from cl_dist.errors import DataError
from cl_dist.models.backbone import load_tokenizer
from cl_dist.parallel.config import EngineConfig
from cl_dist.run import Run
from cl_dist.stage import StageRef
from cl_dist.stages import rationalise, train
from cl_dist.stages.build import build_learner
from cl_dist.stages.shards import sharded
from cl_dist.stages.stage_job import Job
from cl_dist.stages.weights import ShardedWeights
from tests.parity import train_here

pytestmark = pytest.mark.timeout(300)
INVRAT = {"size": 16, "restarts": 2, "share": 0.15, "breaks_weight": 0.5}


def made(folder: Path, over: dict[str, Any] | None = None, rows: int = 60, **training: Any) -> Run:
    method = {**tiny.METHODS["rational_lamol"], "rationales": "invrat", "invrat": {**INVRAT, "train": training}}
    science = {"method": method, "train": tiny.TEXT_TRAIN, **(over or {})}
    return tiny.make_run(folder, {"science": science}, tasks=("food", "film"), train=rows)


def stage_job(run: Run, name: str) -> Job:
    return run.job(run.stage(StageRef(task=1, stage=name)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run whose rationales were found, not given."""
    return tiny.compute(made(tmp_path_factory.mktemp("invrat"), epochs=40, lr=0.01, global_batch=16))


def test_words_that_give_the_label_away_are_found_and_vote(run: Run) -> None:
    names = [stage.name for stage in run.plan(1)]
    wanted = ["generate", "invrat-0", "invrat-1", "rationalise", "record", "free", "vote", "train", "evaluate"]
    assert names == wanted
    assert [stage.name for stage in run.plan(0)] == ["train", "evaluate"]
    vote = run.ledger.read(StageRef(task=1, stage="vote"), "critical.json")
    assert vote["agreement"]["f1"] > 0.8  # people have marked these rows too
    assert vote["used"] + sum(vote["skipped"].values()) == 6
    lines = (run.ledger.path(StageRef(task=1, stage="rationalise")) / "rationales.jsonl").read_text().splitlines()
    texts = {row.id: row.text for row in run.data(0).dev}
    marked = {row: [texts[row][start:end] for start, end in spans] for row, spans in map(json.loads, lines)}
    assert marked.keys() == texts.keys()
    words = [" ".join(spans).split() for spans in marked.values()]
    assert all({"tasty", "bland"} & set(found) for found in words)
    assert all(len(found) <= 2 for found in words)


def test_restarts_differ_and_the_best_on_dev_rows_is_taken(run: Run, tmp_path: Path) -> None:
    job = stage_job(run, "rationalise")
    weights = [ShardedWeights(job.folder(StageRef(task=1, stage=f"invrat-{n}"))) for n in (0, 1)]
    assert not torch.equal(weights[0]["choice.weight"], weights[1]["choice.weight"])
    scores = []
    for number, accuracy in enumerate((0.4, 0.9)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in job.folder(StageRef(task=1, stage=f"invrat-{number}")).iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        facts = json.loads((folder / "train.json").read_text())
        facts["metrics"]["dev/accuracy"] = accuracy
        (folder / "train.json").write_text(json.dumps(facts))
        scores.append(accuracy)
    here = replace(job, folders={StageRef(task=1, stage=f"invrat-{n}"): str(tmp_path / str(n)) for n in (0, 1)})
    assert rationalise.dev_scores(here) == scores
    used = rationalise.RationaliseWorker(here)._model.state_dict()
    assert torch.equal(used["choice.weight"], weights[1]["choice.weight"])


@pytest.mark.parametrize("size", [1, 4, 100])
def test_any_number_of_shards_marks_the_same(run: Run, tmp_path: Path, size: int) -> None:
    job = stage_job(run, "rationalise")
    changed = job.stage.vote.model_copy(update={"shard_samples": size})  # type: ignore[union-attr]
    job = replace(job, stage=job.stage.model_copy(update={"vote": changed}))
    kind = sharded("rationalise")
    worker = kind.worker(job)
    kind.merge(job, [(shard, worker.run(shard)) for shard in reversed(kind.cut(job))], tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (run.ledger.path(StageRef(task=1, stage="rationalise")) / path.name).read_bytes()


def _train(rank: int, world: int, job: Job, out: str) -> None:
    train.run(job, Path(out), lambda event: None)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Path]:
    """Two epochs of 39 rows in batches of 15, 15 and 9, on one worker."""
    folder = tmp_path_factory.mktemp("short")
    job = stage_job(made(folder, rows=39, epochs=2, lr=0.01, global_batch=15), "invrat-0")
    train_here(job, folder / "here")
    return job, folder / "here"


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_two_ranks_train_what_one_trains(
    ranks: Ranks, short: tuple[Job, Path], tmp_path: Path, zero_stage: Any
) -> None:
    job, here = short
    engine = EngineConfig(zero_stage=zero_stage, micro_batch=4, persistence_threshold=0)
    ranks.run(_train, replace(job, engine=engine), str(tmp_path), timeout_s=200.0)
    found, wanted = dict(ShardedWeights(tmp_path)), dict(ShardedWeights(here))
    start = build_learner(job).model.state_dict()
    assert max(float((wanted[name] - start[name]).abs().max()) for name in wanted) > 1e-3
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=1e-5)
    assert not any(name.startswith("embedding") for name in found)


def test_two_ranks_train_it_in_bfloat16(ranks: Ranks, short: tuple[Job, Path], tmp_path: Path) -> None:
    job = replace(short[0], model=short[0].model.model_copy(update={"dtype": "bfloat16"}))
    engine = EngineConfig(zero_stage=2, persistence_threshold=0)
    ranks.run(_train, replace(job, engine=engine), str(tmp_path), timeout_s=200.0)
    assert json.loads((tmp_path / "train.json").read_text())["metrics"]["train/loss"] > 0


def rows(count: int, environment: str | None = None) -> list[Row]:
    return [
        Row(f"{n}", "tasty soup" if n % 2 else "bland cake", None, "good" if n % 2 else "bad", (), environment)
        for n in range(count)
    ]


def test_environments_are_read_or_made() -> None:
    named = [replace(row, environment="ab"[number // 3]) for number, row in enumerate(rows(6))]
    assert environments(named, 2) == [0, 0, 0, 1, 1, 1]
    with pytest.raises(DataError, match="environments=2: the rows have 3: a, b, c"):
        environments([*named, replace(named[0], environment="c")], 2)
    mixed = rows(40)
    for number in (4, 5, 6, 7, 20, 21):  # words say one thing, the label the other
        mixed[number] = replace(mixed[number], label="bad" if mixed[number].label == "good" else "good")
    found = environments(mixed, 2)
    assert sorted(found) == [0] * 20 + [1] * 20
    assert all(found[number] == 1 for number in (4, 5, 6, 7, 20, 21))


def test_an_environment_column_enters_the_fingerprints_of_invrat_alone(tmp_path: Path) -> None:
    plain = made(tmp_path)
    tree = plain.config.model_dump(mode="json", exclude_unset=True)
    tree["science"]["tasks"][0]["environment"] = "split"
    other = Run(type(plain.config).model_validate(tree))
    before, after = ({s.name: b.ledger.fingerprint(s) for s in b.plan(1)} for b in (plain, other))
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"invrat-0", "invrat-1", "rationalise", "record", "vote", "train", "evaluate"}


def test_a_long_text_loses_its_end_and_keeps_its_pair(run: Run) -> None:
    job = stage_job(run, "rationalise")
    encoded = RationaleExamples(load_tokenizer(job.model), 6, 2)
    data = run.data(0)
    long = replace(data.dev[0], text="the soup was very tasty and here again", text_pair="which one ?")
    encoded.add(0, data, [long, data.dev[1]])
    batch = encoded.batch([0, 1])
    assert batch["length"].tolist() == [6, min(6, len(data.dev[1].text.split()))]
    assert batch["context"].tolist()[0] == 3
    assert [long.text[start:end] for start, end in encoded.offsets[0]] == ["the", "soup", "was"]
