"""A Generate stage: samples do not depend on who writes them, and what is wrong with them is counted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.data.language import SpecialTokens, TextCodec
from cl_dist.data.samples import read_samples
from cl_dist.errors import CheckpointError, TrainingError
from cl_dist.models.backbone import load_tokenizer
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import Budget, Record, StageRef, Train
from cl_dist.stages import generate, train
from cl_dist.stages.build import build_learner
from cl_dist.stages.stage_job import Job
from cl_dist.stages.vote import RecordWorker
from cl_dist.stages.weights import ShardedWeights

LAST = StageRef(task=2, stage="generate")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished LAMOL run over three tasks: ten rows of the first replayed, then five of each of the first two."""
    return tiny.compute(
        tiny.make_run(tmp_path_factory.mktemp("lamol"), {"science": {"method": dict(tiny.METHODS["lamol"])}})
    )


@pytest.fixture(scope="module")
def job(run: Run) -> Job:
    return run.job(run.stage(LAST))


def merged(job: Job, results: list[Any], out: Path) -> dict[str, bytes]:
    out.mkdir()
    generate.merge(job, results, out)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_any_worker_writes_the_same_bytes_in_any_order(job: Job, run: Run, tmp_path: Path) -> None:
    shards = generate.shards(job)
    assert [(s.source, s.start, s.stop) for s in shards] == [(0, 0, 4), (0, 4, 5), (1, 0, 4), (1, 4, 5)]
    workers = [generate.GenerateWorker(job), generate.GenerateWorker(job)]
    results = [(shard, workers[number % 2].run(shard)) for number, shard in enumerate(reversed(shards))]
    found = merged(job, results, tmp_path / "other")
    stored = run.ledger.path(LAST)
    assert found == {name: (stored / name).read_bytes() for name in found}
    assert len(read_samples(stored)) >= 5


def test_draws_are_keyed_on_seed_and_attempt(job: Job) -> None:
    shard = generate.shards(job)[0]
    texts = [
        [
            (s["number"], s["attempt"], s["text"])
            for s in generate.GenerateWorker(replace(job, seed=seed)).run(shard)["samples"]
        ]
        for seed in (job.seed, job.seed, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_every_request_is_accounted_for(job: Job, run: Run) -> None:
    facts = run.ledger.read(LAST, "replay.json")["tasks"]
    samples = read_samples(run.ledger.path(LAST))
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
        assert set(numbers["labels"]) <= set(run.data(source).labels)
        assert all(sample.attempt < job.generate.max_attempts for sample in own)
        assert len(numbers["firsts"]) == 5


@pytest.mark.parametrize(
    ("tokens", "fault"),
    [
        ([1, 2, 100, 3, 9], None),
        ([1, 2, 3, 9], None),  # that the mark is absent is seen when the whole is judged
        ([1, 100, 2, 100], "no_answer_mark"),
        ([1, 104], "stray_token"),
        ([*[1] * 15, 9], None),  # as long as a row that was cut: its end is still drawn
        ([1] * 16, "no_end"),
        ([*[1] * 15, 100], "no_end"),
    ],
)
def test_what_ends_a_sample_and_how(tokens: list[int], fault: str | None) -> None:
    line = generate._SampleGeneration(104, 0, 0, 0, SpecialTokens(base=100, eos=9), 16)
    ended = [line.accept(token) for token in tokens]
    assert ended == [False] * (len(tokens) - 1) + [True]
    assert line.fault == fault
    assert len(line.tokens) <= 15  # with the token that asks, no longer than a row: there is no place for more


def test_labels_keep_their_shares_as_far_as_attempts_go(job: Job) -> None:
    shards = [generate.Shard(0, 0, 24)]
    found = []
    for balanced in (False, True):
        changed = job.generate.model_copy(update={"balance_labels": balanced, "max_attempts": 12})
        written = generate.GenerateWorker(replace(job, generate=changed)).run(shards[0])
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


def test_pseudo_samples_change_what_is_trained(run: Run, tmp_path: Path) -> None:
    """Without them the task would be trained as by `sequential`: the rows must really arrive."""
    without = {"science": {"method": {"name": "lamol", "gamma": 0.0}}}
    other = tiny.compute(tiny.make_run(tmp_path, without))
    stored = [ShardedWeights(made.ledger.path(StageRef(task=1, stage="train"))) for made in (run, other)]
    name = min(stored[0])
    assert not torch.equal(stored[0][name], stored[1][name])
    assert [stage.name for stage in other.plan(1)] == ["train", "evaluate"]


LENGTH = 12


def cut(folder: Path, method: str, lengths: tuple[int, int]) -> Run:
    """Return a run on texts that are longer than any row may be, with a max_length for each task."""
    settings = {**tiny.METHODS[method], **({"gamma": 1.0} if tiny.writes(method) else {})}
    tree = tiny.tree(folder, {"science": {"method": settings}}, tasks=("food", "film"))
    for task in ("food", "film"):
        rows = tiny.rows(task, 20)
        for row in rows:
            row["text"] = " ".join([row["text"].split()[-1], *tiny.FILLERS, *tiny.FILLERS])
        tiny.save_rows(folder / f"{task}.jsonl", rows)
    for task, length in zip(tree["science"]["tasks"], lengths, strict=True):
        task["train"] = {"max_length": length}
    return Run(parse(RunConfig, tree))


@pytest.mark.parametrize("lengths", [(LENGTH, LENGTH), (LENGTH, LENGTH - 4)])
def test_rows_that_were_cut_are_written_again(tmp_path: Path, lengths: tuple[int, int]) -> None:
    """Whatever the new task's max_length: a sample is as long as a row of its own task may be."""
    run = tiny.compute(cut(tmp_path, "lamol", lengths))
    job = run.job(run.stage(StageRef(task=1, stage="generate")))
    once = job.generate.model_copy(update={"max_attempts": 1, "balance_labels": False})
    written = generate.GenerateWorker(replace(job, generate=once)).run(generate.Shard(0, 0, 128))
    assert len(written["samples"]) >= 100
    assert written["faults"].get("no_end", 0) <= 20
    assert {len(s["prefix"]) + len(s["answer"]) + 2 for s in written["samples"]} >= {LENGTH}
    assert max(len(s["prefix"]) + len(s["answer"]) + 2 for s in written["samples"]) == LENGTH


@pytest.mark.parametrize(
    ("method", "lengths"),
    [
        ("lamol_real", (LENGTH, LENGTH - 4)),
        ("replay", (LENGTH, LENGTH - 4)),
        ("joint", (LENGTH, LENGTH + 4)),
        ("rational_lamol", (LENGTH, LENGTH + 4)),
    ],
)
def test_real_rows_of_a_task_are_cut_as_its_own_settings_say(
    tmp_path: Path, method: str, lengths: tuple[int, int]
) -> None:
    run = cut(tmp_path, method, lengths)
    stage = next(s for s in run.plan(1) if isinstance(s, Record if method == "rational_lamol" else Train))
    job = replace(run.job(stage), chain=())  # its data, with a model that nothing has trained
    if isinstance(stage, Record):
        reader = RecordWorker(job)
        tokens, _ = reader._tokens(run.data(0), run.data(0).train[0])
        assert len(tokens) == LENGTH - 3 - 1 - 2  # question, answer, and two tokens around the answer
    else:
        assert isinstance(stage, Train)
        learner = build_learner(job)
        train.prepare_learner(job, learner)
        rows, _ = train._rows(job, stage, learner)
        number = {length: sum(rows.length(k) == length for k in range(len(rows))) for length in lengths}
        assert number[lengths[1]] == 20
        assert number[LENGTH] == len(rows) - 20 > 0
    other = cut(tmp_path, method, (LENGTH - 1, lengths[1]))
    assert other.facts(stage) != run.facts(stage)


def test_labels_are_chosen_by_number_and_not_by_which_sample_ends_first(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of even numbers are long, and end last: they are kept all the same where labels are balanced."""
    special = TextCodec(load_tokenizer(job.model)).special
    cake, *question = (tiny.SPOKEN.index(word) for word in ("cake", "which", "one", "?"))

    def written(model: Any, waiting: Any, slots: int, length: int, pick: Any) -> Any:
        while waiting:
            line = min(waiting, key=lambda line: (line.attempt, line.number % 2 == 0, line.number))
            label = tiny.SPOKEN.index("bad" if line.attempt else "good")
            line.tokens = [*[cake] * (6 if line.number % 2 == 0 else 1), *question, special.ans, label]
            waiting.remove(line)
            yield line

    monkeypatch.setattr(generate, "generate", written)
    found = generate.GenerateWorker(job).run(generate.Shard(0, 0, 8))
    assert found["faults"] == {"surplus_label": 4}
    assert {s["number"]: s["label"] for s in found["samples"]} == {n: "good" if n < 4 else "bad" for n in range(8)}
