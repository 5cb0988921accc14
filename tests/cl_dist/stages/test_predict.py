import hashlib
from pathlib import Path

import pytest
import torch

from cl_dist.data.rows import Row
from cl_dist.jobs import Workbook
from cl_dist.stage import Ref
from cl_dist.stages.predict import Predictor
from tests import tiny

LAST = Ref(task=1, stage="evaluate")


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Workbook:
    """A finished CTR run over two tasks with ten test rows each, scored in shards of six rows, four at a time."""
    over = {"science": {"train": {"epochs": 1, "min_round_steps": 1}}}
    return tiny.compute(tiny.book(tmp_path_factory.mktemp("predict"), over, tasks=("food", "film")))


@pytest.fixture(scope="module")
def predictor(book: Workbook) -> Predictor:
    return Predictor(book.job(book.stage(LAST)))


@pytest.mark.parametrize("task", [1, 0])
def test_logits_are_to_the_bit_those_of_the_evaluate_stage(book: Workbook, predictor: Predictor, task: int) -> None:
    logits = predictor.logits(task, book.data(task).test)
    text = "\n".join(row_K.numpy().tobytes().hex() for row_K in logits)
    scores = book.ledger.read(LAST, "scores.json")["tasks"][str(task)]
    assert hashlib.sha256(text.encode()).hexdigest() == scores["logits_sha256"]


def test_labels_are_not_looked_at(book: Workbook, predictor: Predictor) -> None:
    rows = book.data(0).test
    blind = [Row(row.id, row.text, None, label="") for row in rows]
    assert torch.equal(torch.stack(predictor.logits(0, rows)), torch.stack(predictor.logits(0, blind)))
    assert predictor.logits(0, []) == []


def test_nothing_is_written(book: Workbook, predictor: Predictor) -> None:
    def stamps() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in book.config.folder.rglob("*")}

    before = stamps()
    predictor.logits(1, book.data(1).dev)
    assert stamps() == before
