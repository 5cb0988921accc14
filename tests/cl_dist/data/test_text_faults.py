"""Labels and rows that a model that writes cannot take, on a tokenizer of whole words."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoTokenizer

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.data.language import TextCodec, encode_row
from cl_dist.data.rows import Row, TaskData, Where
from cl_dist.data.tasks import TaskConfig
from cl_dist.data.text_faults import label_faults, length_faults
from cl_dist.errors import DataError


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path_factory.mktemp("words"), tiny.SPOKEN))
    tokenizer.eos_token = "[SEP]"
    return TextCodec(tokenizer)


@pytest.mark.parametrize(
    ("labels", "faults"),
    [
        (("good", "bad"), []),
        (("good", "+"), []),  # unknown, but unlike the other
        (("+", "bad", "-"), ["labels '+' and '-' alike ([UNK])"]),
        (("good", "good [SEP] bad"), ["labels 'good' and 'good [SEP] bad' alike"]),  # an answer ends there
        (("good", "[SEP]"), ["label '[SEP]' as the end of text"]),
        (("good", " "), ["label ' ' as no token"]),
        (("+", "-", "*"), ["labels '+' and '-'", "labels '+' and '*'"]),
    ],
)
def test_labels_that_the_tokenizer_encodes_alike_are_faults(
    codec: TextCodec, labels: tuple[str, ...], faults: list[str]
) -> None:
    found = label_faults(labels, codec)
    assert len(found) == len(faults)
    prefix = "the tokenizer encodes "
    assert all(fault.startswith(prefix + start) for fault, start in zip(found, faults, strict=True))


def row(number: int, pair: str, label: str) -> Row:
    return Row(str(number), "the cake", pair, label)


@pytest.mark.parametrize("length", [5, 6, 7, 8, 9])
def test_a_row_is_told_exactly_where_it_cannot_be_laid_out(codec: TextCodec, length: int) -> None:
    """Expected: words and two special tokens, counted; of test rows with the longest answer of the train rows."""
    task = parse(
        TaskConfig,
        {"id": "t", "text_pair": "pair", "output": "text", "metric": "f1", "source": {"kind": "jsonl", "path": "x"}},
    )
    rows = [row(n, "soup " * pair, "good " * label) for n, (pair, label) in enumerate([(1, 1), (1, 3), (3, 2), (5, 1)])]
    splits = {"train": rows, "dev": rows[:3], "test": rows}
    train, dev, test = (
        tuple(replace(each, where=Where(split, number)) for number, each in enumerate(part))
        for split, part in splits.items()
    )
    data = TaskData("t", (), "?", train, dev, test, {}, 0)
    found = [(fault.file, fault.line) for fault in length_faults(task, data, codec, length)]
    expected = []
    for split, reserved in (("train", 0), ("dev", 0), ("test", 3)):
        for number, each in enumerate(data.rows(split)):
            answer = reserved or len(each.label.split())
            if len((each.text_pair or "").split()) + 1 + answer + 2 > length:
                expected.append((split, number))
                with pytest.raises(DataError, match=rf"max_length={length} leaves room for {length - 2};"):
                    encode_row(codec, replace(each, label="") if reserved else each, "?", length, reserved)
    assert found == expected
