"""A model that writes, exported and asked through its chat template: the numbers are those of training, whatever its
tokenizer is, and generation ends where the run's answers end."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from cl_dist.contract import tiny
from cl_dist.data.language import QA, LanguageRows, TextCodec
from cl_dist.data.rows import Row, TaskData
from cl_dist.models.backbone import load_tokenizer
from cl_dist.run import Run
from cl_dist.stage import Evaluate
from cl_dist.stages.export import README, export
from cl_dist.stages.export_text import Example, count_mismatches, text_tokenizer
from cl_dist.stages.predict import Predictor

QUESTION = "which one ?"
OLD = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant]"
CORPUS = [row["text"] for task in tiny.TASKS for row in tiny.rows(task, 20)] + ["good", "bad", QUESTION, "It's 42."]


def trained(model: Any, trainer: Any, *, splits: Any = None, normalizer: Any = None, decoder: Any = None) -> Tokenizer:
    made = Tokenizer(model)
    if splits is not None:
        made.pre_tokenizer = splits
    if normalizer is not None:
        made.normalizer = normalizer
    if decoder is not None:
        made.decoder = decoder
    made.train_from_iterator([f" {text}" for text in CORPUS], trainer)
    return made


def saved(folder: Path, inner: Tokenizer, kind: str = "PreTrainedTokenizerFast", **settings: Any) -> Path:
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=inner, **settings).save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    known = json.loads(path.read_text("utf8")) | {"tokenizer_class": kind, "chat_template": OLD}
    path.write_text(json.dumps(known | {k: v for k, v in settings.items() if k.startswith("add_")}), "utf8")
    return folder


def byte_level(folder: Path) -> Path:
    """As GPT-2 and Llama 3: spaces belong to the word behind them, a start of text is added, and an old template."""
    special = ["<|start|>", "<|stop|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    splits = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner = trained(models.BPE(), trainer, splits=splits, decoder=decoders.ByteLevel())
    inner.post_processor = processors.TemplateProcessing(
        single="<|start|> $A", pair="<|start|> $A $B", special_tokens=[("<|start|>", 0)]
    )
    return saved(folder, inner, bos_token="<|start|>", eos_token="<|stop|>")


def llama(folder: Path) -> Path:
    """As Llama 2: a class of its own that puts a start of text in front, and words that begin with a mark."""
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"])
    splits = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner = trained(models.BPE(unk_token="<unk>"), trainer, splits=splits, decoder=decoders.Metaspace())
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    return saved(folder, inner, "LlamaTokenizer", **names, add_bos_token=True, add_eos_token=False)


def prepending(folder: Path) -> Path:
    """As converted sentencepiece models: the mark is put in front of each part by a normalizer."""
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<s>"])
    marks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    splits = pre_tokenizers.Split(Regex("▁[^▁]*"), "isolated")
    back = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner = trained(models.BPE(unk_token="<unk>"), trainer, splits=splits, normalizer=marks, decoder=back)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return saved(folder, inner, unk_token="<unk>", bos_token="<s>")


def unigram(folder: Path) -> Path:
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>")
    splits = pre_tokenizers.Metaspace(prepend_scheme="always")
    inner = trained(models.Unigram(), trainer, splits=splits, decoder=decoders.Metaspace())
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return saved(folder, inner, unk_token="<unk>", eos_token="</s>")


def word_piece(folder: Path) -> Path:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    inner = trained(
        models.WordPiece(unk_token="[UNK]"),
        trainer,
        splits=pre_tokenizers.BertPreTokenizer(),
        normalizer=normalizers.BertNormalizer(lowercase=True),
        decoder=decoders.WordPiece(),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return saved(folder, inner, **names)


def words(folder: Path) -> Path:
    return tiny.save_tokenizer(folder, tiny.SPOKEN)


def words_with_gaps(folder: Path) -> Path:
    """Ids with gaps, and words that are called like special tokens of ours."""
    ids = {word: 2 * number for number, word in enumerate((*tiny.SPOKEN, "<ans>", "<end>"))}
    inner = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return saved(folder, inner, unk_token="[UNK]")


def characters(folder: Path) -> Path:
    """Each character a token, spaces too: between the parts of a row there is none."""
    ids = {letter: number for number, letter in enumerate(sorted(set("".join(CORPUS))))}
    inner = Tokenizer(models.WordLevel(ids | {"<unk>": len(ids)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    return saved(folder, inner, unk_token="<unk>")


KINDS = [byte_level, llama, prepending, unigram, word_piece, words, words_with_gaps, characters]


def in_training(spelling: Any, row: Row, question: str = QUESTION) -> tuple[list[int], list[int]]:
    """Return the numbers of a row's prompt, and of the whole row with its end, as a batch of training has them."""
    data = TaskData("t", ("good", "bad"), question, (), (), (), {}, 0)
    rows = LanguageRows(spelling, 200)
    rows.add(0, data, [row])
    batch = rows.batch([0])
    first = int(batch["place"][batch["part"] == QA][0])
    prompt = batch["input_ids"][0, : first + 1].tolist()
    return prompt, [*prompt, *batch["target"].tolist()]


def messages(*users: str, system: str | None = None, answer: str | None = None) -> list[dict[str, str]]:
    asked = [] if system is None else [{"role": "system", "content": system}]
    answered = [] if answer is None else [{"role": "assistant", "content": answer}]
    return [*asked, *({"role": "user", "content": text} for text in users), *answered]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_numbers_of_training(tmp_path: Path, kind: Any) -> None:
    spelling = AutoTokenizer.from_pretrained(kind(tmp_path / "from"))
    rows = [Row(str(n), text, None, label) for n, text in enumerate(CORPUS) for label in ("good", "bad")]
    made = text_tokenizer(spelling, 3, 4, QUESTION, [Example(row, QUESTION) for row in rows])
    made.save_pretrained(tmp_path / "to")
    stored: Any = AutoTokenizer.from_pretrained(tmp_path / "to")
    special = TextCodec(spelling).special
    assert stored.eos_token_id == special.eos
    assert stored.pad_token_id == special.pad
    assert len(stored) == special.size(3, 4)
    assert count_mismatches(stored, TextCodec(spelling), [Example(row, QUESTION) for row in rows]) == 0
    for row in (*rows[:6], Row("x", " It's 42. \n", "the  soup", "bad"), Row("x", "the cake", " ", "good")):
        prompt, whole = in_training(spelling, row)
        users = [row.text, *([row.text_pair] if row.text_pair else [])]
        plain = stored.apply_chat_template(messages(*users), tokenize=False)
        for found in (
            stored.apply_chat_template(messages(*users), return_dict=False),
            stored.apply_chat_template(messages(*users), return_dict=False, add_generation_prompt=True),
            stored.apply_chat_template([{"role": "user", "content": [{"type": "text", "text": u}]} for u in users])[
                "input_ids"
            ],
            stored(plain)["input_ids"],  # as servers do with the text of a chat, special tokens and all
            stored.apply_chat_template(messages(f"{row.text.strip()} {QUESTION}"), return_dict=False)
            if len(users) == 1
            else prompt,
        ):
            assert found == prompt
        answered = messages(*users, system=QUESTION, answer=row.label)
        assert stored.apply_chat_template(answered, return_dict=False) == whole
    other, _ = in_training(spelling, rows[0], "It's the plot ?")
    asked = messages(rows[0].text, system="It's the plot ?")
    assert stored.apply_chat_template(asked, return_dict=False) == other


def test_what_is_no_single_question_is_refused(tmp_path: Path) -> None:
    made: Any = text_tokenizer(AutoTokenizer.from_pretrained(words(tmp_path)), 1, 4, 'a "quoted" ? {{ ANS }}', [])
    for chat in (
        messages("a", "b", "c"),
        [*messages("a", answer="good"), *messages("b")],
        [{"role": "tool", "content": "x"}],
    ):
        with pytest.raises(Exception, match="answers one question about one text"):
            made.apply_chat_template(chat)
    assert made.apply_chat_template(messages("soup"), tokenize=False) == ' soup a "quoted" ? {{ ANS }}<ans>'


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_model_answers_as_its_run_and_ends(tmp_path: Path, kind: Any) -> None:
    source = kind(tmp_path / "from")
    size = len(AutoTokenizer.from_pretrained(source))
    config = {"vocab_size": size, "n_positions": 96, "bos_token_id": 0, "eos_token_id": 0}  # not those of the tokenizer
    science = {
        "method": dict(tiny.METHODS["lamol"]),
        "model": {"source": str(source), "config": config},
        "train": {"max_length": 90, "epochs": 6, "lr": 0.02},
    }
    run: Run = tiny.compute(tiny.make_run(tmp_path / "run", {"science": science}, tasks=("food",)))
    last = run.plan(0)[-1]
    assert isinstance(last, Evaluate)
    folder = tmp_path / "exported"
    export(run.job(last), 0, folder, "print")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    stored: Any = AutoTokenizer.from_pretrained(folder)
    spelling = load_tokenizer(run.config.science.model)
    special, rows = TextCodec(spelling).special, run.data(0).test
    expected = Predictor(run.job(last)).answers(0, rows)
    for settings in (model.config, model.generation_config):
        assert (settings.eos_token_id, settings.pad_token_id) == (special.eos, special.pad)

    chats = [messages(row.text) for row in rows]
    batch = stored.apply_chat_template(chats, return_tensors="pt", return_dict=True, padding=True)
    written = model.generate(**batch)[:, batch["input_ids"].shape[1] :]
    assert [stored.decode(line, skip_special_tokens=True).strip() for line in written] == expected
    for row, line in zip(rows, written, strict=True):
        prompt, whole = in_training(spelling, row)
        asked = stored.apply_chat_template(messages(row.text), return_tensors="pt", return_dict=True)
        assert asked["input_ids"][0].tolist() == prompt
        alone = model.generate(**asked)[0].tolist()
        ends = special.eos in alone[len(prompt) :]
        assert alone[len(prompt) :] == line.tolist()[: len(alone) - len(prompt)]
        assert alone[-1] == special.eos or not ends
        if expected[rows.index(row)] == row.label:
            assert alone == whole  # with its end, and nothing behind it
    assert any(special.eos in line for line in written)
    assert not (folder / "chat_template.jinja").read_text("utf8").startswith(OLD[:10])
    card = (folder / README).read_text("utf8")
    assert "does not always have the tokens of training" not in card

    names: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(str(block).replace("DIR", str(folder)).replace("a text", rows[0].text), names)
    assert names["answer"] == expected[0]
