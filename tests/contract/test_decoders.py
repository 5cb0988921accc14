"""Methods made for encoders, on decoders, as users run them: a class is read from the last token of each row.

What every method must keep is in test_contract.py; this is what depends on the backbone.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.data.classify import ClassifyRows
from cl_dist.data.rows import Row, TaskData
from cl_dist.models.backbone import load_tokenizer
from cl_dist.models.config import ModelConfig
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import ref
from cl_dist.stages import train
from cl_dist.stages.build import build_learner
from cl_dist.stages.stage_job import task_data
from tests import parity
from tests.architectures import TINY
from tests.parity import Cell, Trained

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of torch, about names that DeepSpeed uses
    pytest.mark.timeout(300),
]
LLAMA: Mapping[str, Any] = {**TINY["llama"], "model_type": "llama", "vocab_size": len(tiny.SPOKEN), "pad_token_id": 0}
GPT2: Mapping[str, Any] = {**tiny.DECODER}
DECODERS = {"gpt2": GPT2, "llama": {**LLAMA, "initializer_range": 0.15}}
CASES = [("ctr", "gpt2"), ("ctr", "llama"), ("hat", "llama"), ("adapter", "llama"), ("lora", "llama")]
each_case = pytest.mark.parametrize(("method", "kind"), CASES)


class Runs:
    """Finished runs in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.finished = cache(lambda method, kind: tiny.compute(self.run(method, kind)))

    def run(self, method: str, kind: str, **train_: Any) -> Run:
        spelling = tiny.save_tokenizer(self.folder / "decoder", tiny.SPOKEN)
        model = {"source": str(spelling), "config": dict(DECODERS[kind])}
        science = {"method": dict(tiny.METHODS[method]), "model": model, "train": train_, "seed": parity.SEED}
        over = {"run": {"name": f"{method}-{kind}"}, "science": science}
        return Run(parse(RunConfig, tiny.tree(self.folder, over, tasks=("food", "film"), train=parity.ROWS)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("decoders"))


@each_case
def test_the_first_task_keeps_every_bit_of_its_logits(runs: Runs, method: str, kind: str) -> None:
    run = runs.finished(method, kind)
    stages = [stage for t in range(2) for stage in run.plan(t) if stage.kind == "evaluate"]
    found = [run.ledger.read(ref(stage), "scores.json")["tasks"] for stage in stages]
    assert [set(tasks) for tasks in found] == [{"0"}, {"0", "1"}]
    assert found[0]["0"]["output_sha256"] == found[1]["0"]["output_sha256"]


@each_case
@torch.no_grad()
def test_an_answer_depends_neither_on_the_batch_nor_on_padding(runs: Runs, method: str, kind: str) -> None:
    run = runs.finished(method, kind)
    job = next(run.job(stage) for stage in run.plan(1) if stage.kind == "evaluate")
    learner = build_learner(job)
    data = task_data(job, 1)
    rows = ClassifyRows(load_tokenizer(job.model), 16)
    rows.add(1, data, data.test)
    learner.activate(1)
    model = learner.model.eval()
    together = model(rows.batch(range(5)))
    assert together.std(0).max() > 1e-4
    for number in range(5):
        batch = rows.batch([number])
        for name in ("input_ids", "attention_mask"):
            batch[name] = torch.nn.functional.pad(batch[name], (0, 3))
        torch.testing.assert_close(model(batch), together[[number]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "zero_stage"), [("gpt2", 3), ("llama", 2), ("llama", 3)])
def test_ctr_on_a_decoder_is_trained_by_two_workers_as_by_one(
    runs: Runs, ranks: Ranks, tmp_path: Path, kind: str, zero_stage: Any
) -> None:
    run = runs.finished("ctr", kind)
    job = run.job(run.stage(parity.SECOND))
    expected = parity.train_here(job, tmp_path / "here")
    out = tmp_path / "ranks"
    out.mkdir()
    engine = Cell("ctr", zero_stage, 2, 1).engine.model_copy(update={"verify_protection_every": 1})
    ranks.run(_train, replace(job, engine=engine), str(out), timeout_s=200.0)
    found = Trained.read(out).difference(expected)
    assert found["weights"] <= 1e-5, found
    assert found["metrics"] <= 1e-4, found
    assert found["mask_bits"] == 0, found


def _train(rank: int, world: int, job: Any, out: str) -> None:
    train.run(job, Path(out), lambda event: None)


def test_a_decoders_tokenizer_that_knows_no_separator_gets_a_line_break(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "a", "b", "\n"])}
    spelling = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    spelling.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast: Any = PreTrainedTokenizerFast
    plain = fast(tokenizer_object=spelling, unk_token="[UNK]")
    known = load_tokenizer(ModelConfig(source=str(tiny.save_model(tmp_path / "bert"))))
    row = Row(id="0", text="a", text_pair="b", label="x")
    data = TaskData(id="t", labels=("x",), question="", train=(row,), dev=(), test=(), digests={}, overlap=0)
    for tokenizer, expected in ((plain, [1, 3, 2]), (known, None)):
        rows = ClassifyRows(tokenizer, 16)
        rows.add(0, data, [row])
        found = rows.batch([0])["input_ids"][0].tolist()
        assert found == (expected or known("a", "b")["input_ids"])
