from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cl_dist.contract import tiny
from cl_dist.data.language import TextCodec
from cl_dist.data.load import check_task
from cl_dist.data.rationales import read_spans, token_mask
from cl_dist.data.tasks import DataConfig, TaskConfig


@pytest.mark.parametrize(
    ("given", "unit", "spans"),
    [
        ([[1, 3]], "words", ((3, 7),)),
        ([[0, 1], [3, 4]], "words", ((0, 2), (8, 10))),
        ([[3, 7]], "chars", ((3, 7),)),
        ([], "words", ()),
        (None, "words", ()),
    ],
)
def test_spans_become_characters(given: Any, unit: Any, spans: Any) -> None:
    assert read_spans(given, "ab c dd ef", unit) == (spans, None)


@pytest.mark.parametrize("given", ["[[0, 1]]", [[0]], [[0, 1.0]], [[True, 2]], [[0, 5]], [[2, 2]], [[-1, 1]]])
def test_what_is_no_span_is_named(given: Any) -> None:
    spans, fault = read_spans(given, "ab c dd ef", "words")
    assert spans == ()
    assert fault is not None


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    folder = tiny.save_tokenizer(tmp_path_factory.mktemp("words"), tiny.SPOKEN)
    return TextCodec(AutoTokenizer.from_pretrained(folder))


@pytest.mark.parametrize(
    "text", ["the cake was tasty", "  the  cake\u00a0was \u0085 tasty ", "the \U0001f370 cake was tasty\n"]
)
def test_a_rationale_finds_its_tokens_through_odd_white_space(codec: TextCodec, text: str) -> None:
    start = text.index("tasty")
    tokens, places = codec.encode_with_offsets(text)
    assert tokens == codec.encode(text)
    found = token_mask(places, [(start, start + 5)])
    assert [token for token, is_in in zip(tokens, found, strict=True) if is_in] == [tiny.SPOKEN.index("tasty")]
    assert [text[a:b] for (a, b), is_in in zip(places, found, strict=True) if is_in] == ["tasty"]


def test_a_token_counts_where_it_overlaps() -> None:
    assert token_mask([(0, 2), (2, 5), (5, 5), (6, 9)], [(4, 7)]) == [False, True, False, True]


def test_faults_in_rationales_name_line_and_field(tmp_path: Path) -> None:
    rows = tiny.rows("food", 6)
    rows[2]["rationale"] = [[0, 99]]
    rows[4]["rationale"] = None
    path = tiny.save_rows(tmp_path / "food.jsonl", rows)
    source = {"kind": "jsonl", "path": str(path), "split": {"by": "field"}}
    task = TaskConfig.model_validate({"id": "food", "row_id": "id", "rationale": "rationale", "source": source})
    checked = check_task(task, DataConfig())
    (fault,) = checked.faults
    assert (fault.line, fault.field) == (3, "rationale")
    assert "is not a span of a text with" in str(fault)
    assert {row.id: row.rationale for row in checked.data.train}["food-4"] == ()


def test_rationales_enter_the_digests_of_tasks_that_have_them(tmp_path: Path) -> None:
    rows = tiny.rows("food", 6)
    found = []
    for change in (False, True):
        if change:
            rows[0]["rationale"] = [[0, 1]]
        path = tiny.save_rows(tmp_path / f"{change}.jsonl", rows)
        source = {"kind": "jsonl", "path": str(path), "split": {"by": "field"}}
        task = TaskConfig.model_validate({"id": "food", "row_id": "id", "rationale": "rationale", "source": source})
        found.append(check_task(task, DataConfig()).data.digests)
    assert found[0]["train"] == found[1]["train"]
    assert found[0]["rationales"] != found[1]["rationales"]
