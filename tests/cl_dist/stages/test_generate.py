"""A Generate stage: samples do not depend on who writes them, and what is wrong with them is counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.data.language import Special
from cl_dist.data.samples import read_samples
from cl_dist.errors import CheckpointError, TrainingError
from cl_dist.jobs import Workbook
from cl_dist.stage import Budget, Ref
from cl_dist.stages import generate
from cl_dist.stages.job import Job
from cl_dist.stages.weights import StoredWeights
from tests import tiny

LAST = Ref(task=2, stage="generate")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Workbook:
    """A finished LAMOL run over three tasks: ten rows of the first replayed, then five of each of the first two."""
    return tiny.compute(
        tiny.book(tmp_path_factory.mktemp("lamol"), {"science": {"method": dict(tiny.METHODS["lamol"])}})
    )


@pytest.fixture(scope="module")
def job(book: Workbook) -> Job:
    return book.job(book.stage(LAST))


def merged(job: Job, results: list[Any], out: Path) -> dict[str, bytes]:
    out.mkdir()
    generate.merge(job, results, out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_any_worker_writes_the_same_bytes_in_any_order(job: Job, book: Workbook, tmp_path: Path) -> None:
    shards = generate.shards(job)
    assert [(s.source, s.start, s.stop) for s in shards] == [(0, 0, 4), (0, 4, 5), (1, 0, 4), (1, 4, 5)]
    workers = [generate.Dreamer(job), generate.Dreamer(job)]
    results = [(shard, workers[number % 2].run(shard)) for number, shard in enumerate(reversed(shards))]
    found = merged(job, results, tmp_path / "other")
    stored = book.ledger.path(LAST)
    assert found == {name: (stored / name).read_bytes() for name in found}
    assert len(read_samples(stored)) >= 5


def test_draws_are_keyed_on_seed_and_attempt(job: Job) -> None:
    shard = generate.shards(job)[0]
    texts = [
        [
            (s["number"], s["attempt"], s["text"])
            for s in generate.Dreamer(replace(job, seed=seed)).run(shard)["samples"]
        ]
        for seed in (job.seed, job.seed, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_every_request_is_accounted_for(job: Job, book: Workbook) -> None:
    facts = book.ledger.read(LAST, "replay.json")["tasks"]
    samples = read_samples(book.ledger.path(LAST))
    assert list(facts) == ["food", "film"]
    for source, numbers in enumerate(facts.values()):
        own = [sample for sample in samples if sample.source == source]
        assert numbers["requested"] == 5
        assert numbers["kept"] == len(own) == len({(s.prefix, s.answer) for s in own})
        assert numbers["malformed"] + numbers["surplus"] == sum(numbers["faults"].values())
        well_formed = numbers["generated"] - numbers["malformed"]
        kept = numbers["kept"] + numbers["duplicate"]
        assert well_formed - numbers["surplus"] <= kept <= well_formed  # a surplus one is kept if no other comes
        assert 0 < numbers["first_attempt_yield"] <= 1
        assert set(numbers["labels"]) <= set(book.data(source).labels)
        assert all(sample.attempt < job.generate.max_attempts for sample in own)
        assert len(numbers["firsts"]) == 5


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        ([1, 2, 100, 3, 9], None),
        ([1, 2, 3, 9], None),  # that the mark is absent is seen when the whole is judged
        ([1, 100, 2, 100], "no_answer_mark"),
        ([1, 104], "stray_token"),
        ([1] * 15, "no_end"),
    ],
)
def test_what_ends_a_sample_and_how(tokens: list[int], fault: str | None) -> None:
    line = generate._Line(104, 0, 0, 0, Special(base=100, eos=9), 16)
    ended = [line.takes(token) for token in tokens]
    assert ended == [False] * (len(tokens) - 1) + [True]
    assert line.fault == fault


def test_labels_keep_their_shares_as_far_as_attempts_go(job: Job) -> None:
    shards = [generate.Shard(0, 0, 24)]
    found = []
    for balanced in (False, True):
        changed = job.generate.model_copy(update={"balance_labels": balanced, "max_attempts": 12})
        written = generate.Dreamer(replace(job, generate=changed)).run(shards[0])
        counts = [sum(s["label"] == name for s in written["samples"]) for name in ("good", "bad")]
        found.append(abs(counts[0] - counts[1]) / sum(counts))
        assert len({s["number"] for s in written["samples"]}) == len(written["samples"])
    assert found[1] <= found[0]
    assert found[1] <= 0.2


def test_too_few_samples_stop_the_run_and_name_the_commonest_fault(job: Job, tmp_path: Path) -> None:
    shards = generate.shards(job)
    nothing = {
        "samples": [],
        "faults": {"no_end": 7, "empty": 2},
        "attempts": 9,
        "first_well_formed": 0,
        "firsts": {},
        "tokens": 90,
    }
    strict = replace(job, generate=job.generate.model_copy(update={"min_yield": 0.5}))
    with pytest.raises(TrainingError, match=r"task food: 0 of 5 .* no_end \(14 of 18 attempts\)"):
        merged(strict, [(shard, nothing) for shard in shards], tmp_path / "out")


@pytest.mark.parametrize(
    ("budget", "new_rows", "earlier", "expected"),
    [
        (Budget(gamma=0.2), 1000, 2, 100),
        (Budget(gamma=0.2), 13, 2, 1),  # ceil(2.6) = 3, one of which no task can have
        (Budget(gamma=0.05, min_replay=30), 405, 2, 30),
        (Budget(gamma=0), 1000, 3, 0),
        (Budget(), 1000, 0, 0),
    ],
)
def test_the_budget_is_the_papers_with_a_floor(budget: Budget, new_rows: int, earlier: int, expected: int) -> None:
    assert budget.per_task(new_rows, earlier) == expected


def test_a_damaged_file_of_samples_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"samples\.jsonl: missing"):
        read_samples(tmp_path)
    (tmp_path / "samples.jsonl").write_text(json.dumps({"source": 0}) + "\n")
    with pytest.raises(CheckpointError, match="damaged"):
        read_samples(tmp_path)


def test_pseudo_samples_change_what_is_trained(book: Workbook, tmp_path: Path) -> None:
    """Without them the task would be trained as by `sequential`: the rows must really arrive."""
    without = {"science": {"method": {"name": "lamol", "gamma": 0.0}}}
    other = tiny.compute(tiny.book(tmp_path, without))
    stored = [StoredWeights(made.ledger.path(Ref(task=1, stage="train"))) for made in (book, other)]
    name = min(stored[0])
    assert not torch.equal(stored[0][name], stored[1][name])
    assert [stage.name for stage in other.plan(1)] == ["train", "evaluate"]
