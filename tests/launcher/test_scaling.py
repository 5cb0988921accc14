"""The paper's arithmetic, by hand; the operations that it starts from, against those of real steps."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cl_dist.contract import tiny
from cl_dist.learners.base import Progress
from cl_dist.models.backbone import load_backbone, load_tokenizer, recompute_activations
from cl_dist.planning.planner import planned, work_of
from cl_dist.planning.scaling import Machine, Work, stage_costs, step_costs
from cl_dist.run import Run
from cl_dist.stages.build import new_learner
from tests.launcher.commands import Cli, save_run

MACHINE = Machine(peak=1e12, used=0.5, inside=100e9, between=10e9, gpus=8, memory=1e9, files=1e6)
WORK = Work(
    elements=1000,
    trained=100,
    item=2,
    global_batch=64,
    tokens=10,
    zero_stage=2,
    most_rows=4,
    operations=42_000,
)
BERT = {"model_type": "bert", "vocab_size": len(tiny.WORDS), "max_position_embeddings": 64}
BERT |= {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA = {**BERT, "model_type": "llama", "vocab_size": len(tiny.SPOKEN), "bos_token_id": None, "eos_token_id": None}
LENGTH, ROWS = 48, 8


def test_operations_and_seconds_of_a_step() -> None:
    (eight,) = step_costs(WORK, MACHINE, (8,))
    assert eight.rows == 8
    assert eight.compute_s == 8 * 42_000 / 0.5e12
    assert eight.moved_bytes == 2 * 3 * 100 * 7 // 8  # two micro-batches reduced, one gathering
    assert eight.link_s == eight.moved_bytes / 100e9
    assert eight.step_s == eight.compute_s + eight.link_s
    assert eight.least_s == max(eight.compute_s, eight.link_s)
    assert eight.tokens_per_s == pytest.approx(640 / eight.step_s)


@pytest.mark.parametrize(("stage", "elements"), [(0, 200), (1, 200), (2, 300), (3, 2 * 2100)])
def test_bytes_by_zero_stage(stage: int, elements: int) -> None:
    (eight,) = step_costs(replace(WORK, zero_stage=stage), MACHINE, (8,))
    assert eight.moved_bytes == 2 * elements * 7 // 8


def test_more_nodes_use_the_slower_link_and_more_ranks_than_rows_idle() -> None:
    eight, sixteen, many = step_costs(replace(WORK, zero_stage=3), MACHINE, (8, 16, 128))
    assert eight.link_s < sixteen.link_s
    assert sixteen.share_of_first < 1
    assert "links take longer" in sixteen.note
    assert many.rows == 1
    assert "64 ranks have no row" in many.note


def make_run(folder: Path, name: str, again: bool = False, **over: Any) -> Run:
    """Return a run of rows that are all of the greatest length."""
    sizes = LLAMA if tiny.writes(name) else BERT
    settings = {"science": {"method": dict(tiny.METHODS[name]), "model": {"config": sizes}, **over}}
    settings["science"]["train"] = {"max_length": LENGTH, "global_batch": ROWS, "epochs": 3}
    settings["cluster"] = {"activation_checkpointing": again}
    tasks = ("food", "film")
    folder.mkdir(exist_ok=True)
    for task in tasks:
        rows = [row | {"text": row["text"] + " the" * LENGTH} for row in tiny.rows(task, 20)]
        tiny.save_rows(folder / f"{task}.jsonl", rows)
    return tiny.make_run(folder, settings, tasks=tasks)


def counted(run: Run) -> float:
    """Return the operations of a row in a real step of the second task, as torch counts them, attention written out."""
    science, data = run.config.science, run.data(1)
    learner = new_learner(science.method, science.model, (2, 2), 0)
    learner.build(load_backbone(science.model, causal=run.output == "lm"), 1)
    learner.start_task(0, (0,))
    learner.end_task(dict(learner.model.named_parameters()), ())
    learner.start_task(1, (1,))
    if run.config.cluster.activation_checkpointing:
        recompute_activations(learner.model)
    rows = learner.rows(load_tokenizer(science.model), LENGTH, training=True)
    rows.add(1, data, data.train[:ROWS])
    assert {rows.length(number) for number in range(ROWS)} == {LENGTH}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = learner.loss(learner.model.train(), rows.batch(range(ROWS)), Progress(0, 10, 0, 10))
        torch.stack([term.sum() for term in (*loss.per_example.values(), *loss.regularizers.values())]).sum().backward()
    return counter.get_total_flops() / ROWS


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("method", ["lamol", "ctr", "sequential", "lora"])
def test_the_operations_on_paper_are_those_of_a_real_step(tmp_path: Path, method: str, again: bool) -> None:
    run = make_run(tmp_path, method, again)
    work = work_of(run.config, planned(run.config, (80.0,)))
    assert work.operations == pytest.approx(counted(run), rel=0.05)


def test_lamol_reads_a_row_twice_and_without_its_second_loss_once(tmp_path: Path) -> None:
    twice, once = (
        work_of(run.config, planned(run.config, (80.0,)))
        for weight in (0.25, 0.0)
        for run in [make_run(tmp_path, "lamol", method={"name": "lamol", "lm_weight": weight})]
    )
    assert twice.operations / once.operations == pytest.approx(2.0, rel=0.05)
    trained = 4 * (4 * 64 * 64 + 3 * 64 * 256)  # of the layers: what the embeddings hold multiplies nothing
    attention = 4 * 4 * LENGTH * 64  # scores, and sums by them
    assert once.read_operations == LENGTH * (2 * trained + attention)
    assert once.operations == pytest.approx(3 * once.read_operations, rel=0.1)


def test_seconds_of_stages_by_hand(tmp_path: Path) -> None:
    """Loading at 1 MB/s. A pass takes the longer of its operations at 0.5 T/s and of the weights at 1 GB/s."""
    settings: dict[str, Any] = {
        "evaluate": {"batch": 4, "shard_rows": 8},
        "generate": {"parallel_samples": 3, "shard_samples": 4},
    }
    run = make_run(tmp_path, "rational_lamol", **settings)
    plan = planned(run.config, (80.0,))
    work = work_of(run.config, plan)
    rows = [stage.rows for stage in plan.stages]
    found = {line.stage: line for line in stage_costs(run.config, rows, work, MACHINE, (1, 2, 64))}
    loading = (4 * work.elements + 4 * work.trained) / 1e6
    weights = 4 * work.elements / 1e9
    token = work.read_operations / LENGTH / 0.5e12
    assert token < weights  # writing waits for weights
    assert work.answer == 2  # the word, and its end

    def seconds(stage: str) -> Any:
        return pytest.approx([each - loading for each in found[stage].seconds or ()])

    # 10 samples are 3 shards of 4, each 2 times 3 slots of LENGTH tokens
    assert found["01-film/generate"].rows == 10
    assert [shards * 2 * LENGTH * weights for shards in (3, 2, 1)] == seconds("01-film/generate")
    # 6 voting rows are 2 shards of 4, a row at a time
    assert found["01-film/record"].rows == found["01-film/vote"].rows == 6
    row = max(LENGTH * token, weights)
    assert [shards * 4 * row for shards in (2, 1, 1)] == seconds("01-film/vote")
    # 20 test rows are 3 shards of 8, each 2 batches of 4 rows that are read, then write a token more
    assert found["01-film/evaluate"].rows == 20
    batch = max(4 * LENGTH * token, weights) + weights
    assert [shards * 2 * batch for shards in (3, 2, 1)] == seconds("01-film/evaluate")
    # 30 rows are 4 steps, 3 times
    steps = [step.step_s for step in step_costs(work, MACHINE, (1, 2, 64))]
    assert [12 * step for step in steps] == seconds("01-film/train")


def test_workers_that_hold_a_model_together_are_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, "lamol", evaluate={"batch": 4, "shard_rows": 1})
    plan = planned(run.config, (80.0,))
    cluster = {"dispatcher": "ray", "engine": "deepspeed", "workers": 4, "gpus_per_worker": 1.0}
    together = run.config.model_copy(
        update={"cluster": run.config.cluster.model_copy(update=cluster | {"workers_per_model": 4})}
    )
    rows = [stage.rows for stage in plan.stages]
    alone, shared = (
        list(stage_costs(config, rows, work_of(config, plan), MACHINE, (4, 16)))[-1].seconds
        for config in (run.config, together)
    )
    assert alone is not None
    assert shared is not None
    assert alone[0] == shared[1] < shared[0]


def test_a_plan_shows_stages_by_gpus_and_says_where_it_cannot(cli: Cli, tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, {"science": {"method": dict(tiny.METHODS["lamol"])}}, tasks=("food", "film"))
    path = save_run(tmp_path / "tiny.yaml", tree)
    found = cli("plan", path, "--scaling", "--json").json()
    assert [line["stage"] for line in found["stage_seconds"]] == [stage["stage"] for stage in found["stages"]]
    assert all(len(line["seconds"]) == len(found["scaling"]) == 7 for line in found["stage_seconds"])
    assert "estimated seconds of a stage" in cli("plan", path, "--scaling").out
    (tmp_path / "film.jsonl").unlink()
    assumptions = cli("plan", path, "--scaling", "--json").json()["stage_seconds"]
    assert {line["seconds"] for line in assumptions} == {None}
