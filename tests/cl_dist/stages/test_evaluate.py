import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.parallel.config import EngineConfig
from cl_dist.run import Run
from cl_dist.run_config import ClusterConfig
from cl_dist.stage import StageRef
from cl_dist.stages.evaluate import EvaluateWorker, Shard, merge, shards
from cl_dist.stages.stage_job import Job

LAST = StageRef(task=1, stage="evaluate")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished CTR run over two tasks with ten test rows each, scored in shards of six rows, four at a time."""
    over = {"science": {"train": {"epochs": 1, "min_round_steps": 1}}}
    return tiny.compute(tiny.make_run(tmp_path_factory.mktemp("evaluate"), over, tasks=("food", "film")))


@pytest.fixture(scope="module")
def job(run: Run) -> Job:
    return run.job(run.stage(LAST))


def files(folder: Path) -> dict[str, bytes]:
    kept = [p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def scored(job: Job, of: list[Shard]) -> list[tuple[Shard, dict[str, Any]]]:
    scorer = EvaluateWorker(job)
    return [(shard, scorer.run(shard)) for shard in of]


def test_shards_cover_every_test_row_of_every_task_once_and_the_new_task_again_without_parts(job: Job) -> None:
    assert shards(job) == [
        Shard(task=0, without="", start=0, stop=6),
        Shard(task=0, without="", start=6, stop=10),
        Shard(task=1, without="", start=0, stop=6),
        Shard(task=1, without="", start=6, stop=10),
        *(
            Shard(task=1, without=part, start=start, stop=stop)
            for part in ("sharing", "earlier", "gates")
            for start, stop in ((0, 6), (6, 10))
        ),
    ]


@pytest.mark.parametrize("cluster", [{"workers": 7}, {"micro_batch": 1}, {"zero_stage": 3}])
def test_shards_do_not_depend_on_the_workers(job: Job, cluster: dict[str, Any]) -> None:
    engine: EngineConfig = parse(ClusterConfig, cluster)
    assert shards(replace(job, engine=engine)) == shards(job)


def test_a_shard_scored_alone_gives_the_bytes_it_gives_among_others(job: Job) -> None:
    together = scored(job, shards(job))
    for shard, expected in together:
        ((_, alone),) = scored(job, [shard])
        assert alone == expected


def test_shards_scored_in_any_order_by_any_scorer_merge_to_the_same_bytes(run: Run, job: Job, tmp_path: Path) -> None:
    of = shards(job)[::-1]
    parts = scored(job, of[:3]) + scored(job, of[3:])
    merge(job, parts, tmp_path)
    assert files(tmp_path) == files(run.ledger.path(LAST))


def test_predictions_stand_in_row_order_beside_their_labels_and_give_the_accuracy(run: Run) -> None:
    folder = run.ledger.path(LAST)
    scores = json.loads((folder / "scores.json").read_text())["tasks"]
    for number, task in enumerate(("food", "film")):
        lines = [json.loads(line) for line in (folder / "predictions" / f"{task}.jsonl").read_text().splitlines()]
        rows = [row for row in tiny.rows(task, 20) if row["split"] == "test"]
        assert [(line["id"], line["label"]) for line in lines] == [(row["id"], row["label"]) for row in rows]
        right = sum(line["prediction"] == line["label"] for line in lines)
        assert scores[str(number)]["accuracy"] == right / 10
        assert scores[str(number)]["rows"] == 10


def test_a_prediction_of_a_classifier_carries_its_probability(run: Run, job: Job, tmp_path: Path) -> None:
    import numpy as np

    results = scored(job, shards(job))
    logits = [
        np.frombuffer(bytes.fromhex(text), dtype=np.float32).astype(float)
        for shard, found in sorted(results, key=lambda result: result[0])
        if shard.task == 1 and not shard.without
        for text in found["logits"]
    ]
    lines = [json.loads(x) for x in (run.ledger.path(LAST) / "predictions/film.jsonl").read_text().splitlines()]
    for line, logits_K in zip(lines, logits, strict=True):
        softmax = np.exp(logits_K) / np.exp(logits_K).sum()
        assert line["probability"] == pytest.approx(softmax.max(), abs=1e-6)
    (_, first), *rest = results
    first["logits"] = [np.array([np.nan, 1.0], np.float32).tobytes().hex() for _ in first["logits"]]
    merge(job, [(results[0][0], first), *rest], tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "predictions/food.jsonl").read_text().splitlines()]
    assert ["probability" in line for line in lines] == [False] * 6 + [True] * 4, "diverged logits have none"


def test_the_unit_of_work_is_science_but_rows_do_not_see_each_other(run: Run, job: Job) -> None:
    """Other batches round otherwise, and no more than that."""
    import numpy as np

    def logits(size: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        other = replace(job, evaluate=job.evaluate.updated({"batch": size, "shard_rows": 10}))
        ((_, found),) = scored(other, shards(other)[1:2])
        return np.array([np.frombuffer(bytes.fromhex(row), dtype=np.float32) for row in found["logits"]])

    np.testing.assert_allclose(logits(1), logits(10), rtol=0, atol=1e-5)


def test_switching_sharing_off_is_an_ablation_that_changes_logits(job: Job) -> None:
    by_shard = dict(scored(job, shards(job)))
    with_, without = (by_shard[Shard(1, part, 0, 6)]["logits"] for part in ("", "sharing"))
    assert with_ != without
