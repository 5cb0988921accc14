"""Rows as a language model reads them, checked against sequences written out by hand."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from cl_dist.contract import tiny
from cl_dist.data.language import LM, QA, LanguageRows, TextCodec, encode_row
from cl_dist.data.rows import Row, TaskData
from cl_dist.data.text_metrics import TEXT_METRICS, exact_match, joint_state, token_f1, turn_state
from cl_dist.errors import ConfigError, DataError

DATA = TaskData("t", ("good", "bad"), "which one ?", (), (), (), {}, 0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(tiny.save_tokenizer(tmp_path_factory.mktemp("words"), tiny.SPOKEN))


def number(*words: str) -> list[int]:
    return [tiny.SPOKEN.index(word) for word in words]


def row(text: str, label: str, pair: str | None = None) -> Row:
    return Row("r", text, pair, label)


def test_a_row_is_a_question_and_a_sample(tokenizer: Any) -> None:
    rows = LanguageRows(tokenizer, 16, samples=True, ans_weight=5.0)
    rows.add(1, DATA, [row("the cake", "good")])
    known = rows.special
    batch = rows.batch([0])
    content = number("the", "cake", "which", "one", "?")
    question, sample = batch["input_ids"].tolist()
    assert question == [*content, known.ans, *number("good"), known.pad]
    assert sample == [known.task(1), *content, known.ans, *number("good")]
    labels: list[dict[int, int]] = [{}, {}]
    for place, target, part in zip(*(batch[key].tolist() for key in ("place", "target", "part")), strict=True):
        labels[part][place % 8] = target
    assert labels[QA] == {5: number("good")[0], 6: known.eos}
    assert labels[LM] == dict(enumerate([*content, known.ans, *number("good"), known.eos]))
    assert batch["unit"].tolist() == [1.0] * 7 + [5.0, 1.0, 1.0]
    assert rows.normalizers([0]) == {"qa_loss": 2.0, "lm_loss": 12.0}


def test_only_the_context_is_cut(tokenizer: Any) -> None:
    codec = TextCodec(tokenizer)
    context, asked, answer = encode_row(codec, row("the cake is the table", "good", "soup"), "which one ?", 9)
    assert context == number("the", "cake")
    assert asked == number("soup", "which", "one", "?")
    assert answer == number("good")
    with pytest.raises(DataError, match="row r: question and answer have 4 tokens"):
        encode_row(codec, row("the cake", "good"), "which one ?", 5)


def test_the_token_that_asks_may_be_shared(tokenizer: Any) -> None:
    rows = LanguageRows(tokenizer, 16, samples=True, per_task=False)
    rows.add(0, DATA, [row("the cake", "good")])
    rows.add_tokens(1, number("table"), number("bad"))
    assert rows.batch([0, 1])["input_ids"][2:, 0].tolist() == [rows.special.gen] * 2
    assert rows.batch([0, 1])["replayed"].tolist() == [0.0, 1.0]


def test_a_dummy_has_no_weight(tokenizer: Any) -> None:
    rows = LanguageRows(tokenizer, 16)
    rows.add(0, DATA, [row("the cake", "good"), row("the", "bad")])
    assert rows.batch([1, -1])["weight"].tolist() == [1.0, 0.0]
    assert rows.by_length() == [0, 1]


def test_special_tokens_grow_by_whole_blocks(tokenizer: Any) -> None:
    known = TextCodec(tokenizer).special
    assert known.base == len(tiny.SPOKEN)
    assert [known.size(tasks, 4) - known.base for tasks in (0, 1, 4, 5)] == [8, 8, 8, 12]
    assert known.size(4, 4) > known.task(3)


@pytest.mark.parametrize(
    ("truth", "answer", "match", "f1"),
    [
        ("The cat.", "cat", 1.0, 1.0),
        ("red wine", "red house wine", 0.0, 0.8),
        ("red", "blue", 0.0, 0.0),
        ("", "", 1.0, 1.0),
        ("red", "", 0.0, 0.0),
        ("The Beatles", "beatles", 1.0, 1.0),
        ("A", "", 0.0, 0.0),  # what SQuAD's normalising takes away whole is compared as it is
        ("A", "the", 0.0, 0.0),
        ("A.", "(a)", 1.0, 1.0),
        ("+", "-", 0.0, 0.0),
        ("+", "+ ", 1.0, 1.0),
        ("?!", "", 0.0, 0.0),
        ("-1", "1", 0.0, 0.0),
        ("-$5", "$5", 0.0, 0.0),
        ("x = -1", "x = 1", 0.0, 0.5),
        ("1.5", "15", 0.0, 0.0),
        ("0.5", ".5", 1.0, 1.0),
        (".5", "5", 0.0, 0.0),
        ("1e-5", "1e5", 0.0, 0.0),
        ("10:30", "1030", 0.0, 0.0),
        ("1/2", "12", 0.0, 0.0),
        ("3-4", "34", 0.0, 0.0),
        ("1,5", "15", 0.0, 0.0),
        ("1,000.5 km", "1000.5 km", 1.0, 1.0),
        ("$1,234,567.", "1234567", 1.0, 1.0),
        ("42", "(42).", 1.0, 1.0),
        ("COVID-19", "covid19", 1.0, 1.0),
    ],
)
def test_answers_are_compared_as_in_squad(truth: str, answer: str, match: float, f1: float) -> None:
    assert exact_match(truth, answer) == match
    assert token_f1(truth, answer) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("food: thai, area: east; phone, address", "area: east, food: thai; address, phone", 1.0),
        ("food: thai;", "food: thai", 1.0),
        (";", "", 1.0),
        ("food: thai;", "food: thai; phone", 0.0),
        ("food: thai;", "food: italian;", 0.0),
        ("food: thai, area: east;", "food: thai;", 0.0),
    ],
)
def test_a_turn_is_right_where_all_slots_and_requests_are(truth: str, answer: str, right: float) -> None:
    assert turn_state(truth, answer) == right


def test_a_metric_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_dist.data.text_metrics.import_module", _absent)
    for name in ("rouge_l", "bleu"):
        with pytest.raises(ConfigError, match=r"pip install 'cl-dist\[text\]'"):
            TEXT_METRICS[name](["a"], ["a"])


@pytest.mark.parametrize("name", ["rouge_l", "bleu"])
def test_metrics_of_libraries_know_equal_and_other_texts(name: str) -> None:
    for library in ("rouge_score", "sacrebleu"):
        pytest.importorskip(library, reason="rouge-score and sacrebleu are not installed")
    truths = ["the cat sat on the mat today", "a dog ran over the green hill"]
    assert TEXT_METRICS[name](truths, truths) == pytest.approx(1.0)
    other = TEXT_METRICS[name](truths, ["the cat sat on the mat", "we bought some bread"])
    assert 0 < other < 0.8


def _absent(name: str) -> None:
    raise ImportError(name)


def test_a_byte_level_vocabulary_gets_its_leading_space(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: place for place, word in enumerate(["a", "\u0120a", "\u0120", "b", "\u0120b", "<end>"])}
    bpe = Tokenizer(models.BPE(vocab, merges=[("\u0120", "a"), ("\u0120", "b")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    codec = TextCodec(fast(tokenizer_object=bpe, eos_token="<end>"))
    assert codec.special.eos == 5
    assert codec.encode("a b") == [1, 4]
    assert codec.decode([1, 4, 5, codec.special.ans]) == "a b"


def test_joint_state_follows_each_dialogue() -> None:
    dialogues = ["a", "b", "a", "a", "b"]
    truths = ["food: thai;", "area: west;", "area: east;", ";phone", "area: north;"]
    right = ["food: thai;", "area: west;", "area: east;", ";", "area: north;"]
    assert joint_state(dialogues, truths, right) == 1.0  # a request does not last
    late = ["food: thai;", "area: east;", ";", ";phone", "area: north;"]
    # b is wrong until its slot is named again; a is wrong from the turn on at which it missed one.
    assert joint_state(dialogues, truths, late) == 2 / 5
    assert joint_state(["a", "b"], ["food: thai;", ";"], ["food: thai;", "food: thai;"]) == 0.5


def gappy() -> Any:
    """Return a tokenizer that uses the ids 0 to 3 and 5."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1, "a": 2, "b": 3, "tasty": 5}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = PreTrainedTokenizerFast
    return fast(tokenizer_object=words, unk_token="[UNK]")


def test_special_tokens_stand_behind_the_largest_id_in_use() -> None:
    assert len(gappy()) == 5
    codec = TextCodec(gappy())
    assert codec.special.base == 6
    assert codec.decode(codec.encode("the tasty")) == "the tasty"
