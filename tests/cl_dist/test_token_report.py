"""Tokenizers that do not fit their model or the rows are told before the first stage."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from cl_dist import session
from cl_dist.checks import check_tokens
from cl_dist.contract import tiny
from cl_dist.errors import ConfigError, DataError
from cl_dist.models.backbone import check_vocabulary, load_tokenizer, num_embeddings
from cl_dist.models.config import ModelConfig
from cl_dist.run import Run
from cl_dist.run_config import RunConfig


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "model")


def make_run(folder: Path, method: str = "sequential", **over: Any) -> Run:
    return tiny.make_run(folder, {"science": {"method": dict(tiny.METHODS[method]), **over}})


def append(folder: Path, text: str, split: str = "test") -> None:
    with (folder / "food.jsonl").open("a", encoding="utf8") as file:
        file.write(json.dumps({"id": "last", "text": text, "label": "good", "split": split}) + "\n")


def refused(found: Run, kind: type[Exception]) -> str:
    """Return why a run is refused; nothing of it has been written."""
    with pytest.raises(kind) as caught:
        session.train(found.config)
    assert not found.config.folder.exists()
    return str(caught.value)


def add_tokens(folder: Path, *tokens: str, special: bool = False) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize(
    "kind",
    [
        "bert",
        "roberta",
        "distilbert",
        "deberta-v2",
        "modernbert",
        "gpt2",
        "gpt_neox",
        "llama",
        "qwen3",
        "gemma2",
        "phi3",
    ],
)
def test_a_folder_without_the_files_of_a_tokenizer_has_none(tmp_path: Path, kind: str) -> None:
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_tokenizer(ModelConfig(source=str(tmp_path)))


@pytest.mark.parametrize("left", ["nothing", "tokenizer_config.json", "added tokens"])
def test_a_run_without_a_tokenizer_is_refused(tmp_path: Path, model: Path, left: str) -> None:
    if left == "added tokens":
        add_tokens(model, "espresso")
    for path in model.glob("tokenizer*"):
        if left == "nothing" or path.name != "tokenizer_config.json":
            path.unlink()
    assert "no tokenizer" in refused(make_run(tmp_path), ConfigError)


@pytest.mark.parametrize("method", ["sequential", "ctr", "adapter", "lora"])
def test_a_token_without_an_embedding_is_refused_whatever_the_rows_hold(
    tmp_path: Path, model: Path, method: str
) -> None:
    add_tokens(model, "espresso")
    said = refused(make_run(tmp_path, method), ConfigError)
    last = len(tiny.WORDS)
    assert f"'espresso' has id {last}, but the embedding has {last} rows" in said


def test_a_pad_token_without_an_embedding_is_refused(tmp_path: Path, model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"pad_token": "<more>"})
    tokenizer.save_pretrained(model)
    assert "'<more>' has id" in refused(make_run(tmp_path), ConfigError)


def test_a_gap_in_the_numbers_is_seen_in_a_model_that_is_drawn_too(tmp_path: Path, model: Path) -> None:
    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf8"))
    tokenizer["model"]["vocab"]["tree"] += 5
    path.write_text(json.dumps(tokenizer), "utf8")
    sizes = json.loads((model / "config.json").read_text("utf8")) | {"vocab_size": len(tiny.WORDS)}
    for config in (None, {k: v for k, v in sizes.items() if k != "architectures"}):
        given = ModelConfig(source=str(model), config=config)
        with pytest.raises(ConfigError, match=f"'tree' has id {len(tiny.WORDS) + 4}"):
            check_vocabulary(given, load_tokenizer(given))


def test_a_special_token_that_no_row_holds_needs_no_embedding_and_a_row_that_holds_it_is_a_fault(
    tmp_path: Path, model: Path
) -> None:
    add_tokens(model, "<image>", special=True)
    given = ModelConfig(source=str(model))
    check_vocabulary(given, load_tokenizer(given))
    with pytest.raises(ConfigError, match="<image>"):
        check_vocabulary(given, load_tokenizer(given), is_whole=True)
    found = make_run(tmp_path)
    check_tokens(found)
    append(tmp_path, "the soup <image>")
    again = make_run(tmp_path, seed=1, data={"overlap": "drop"})
    known = num_embeddings(given)
    said = refused(again, DataError)
    assert f"food.jsonl, line 37, field text: contains '<image>', token {known} of the tokenizer" in said


def test_a_model_that_writes_gets_what_it_lacks_unless_its_backbone_is_frozen(tmp_path: Path) -> None:
    grows = make_run(tmp_path, "lamol")
    frozen = tiny.make_run(tmp_path, {"science": {"method": {"name": "lamol", "gamma": 0.5, "lora": {"r": 2}}}})
    add_tokens(tmp_path / "decoder", "espresso")
    check_tokens(grows)
    said = refused(frozen, ConfigError)
    assert "'espresso' has id" in said
    assert "set vocab_size to" in said


@pytest.mark.parametrize("split", ["train", "dev", "test"])
@pytest.mark.parametrize("method", ["sequential", "lamol"])
def test_a_text_of_no_token_is_a_fault_with_file_and_line(tmp_path: Path, split: str, method: str) -> None:
    found = make_run(tmp_path, method)
    folder = tmp_path / ("decoder" if method == "lamol" else "model")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf8"))
    clean = {"type": "Replace", "pattern": {"Regex": "[\\u200b\\u2603]"}, "content": ""}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [tokenizer["normalizer"], clean]}
    path.write_text(json.dumps(tokenizer), "utf8")
    append(tmp_path, "\u2603", split)
    said = refused(found, DataError)
    assert "food.jsonl, line 37, field text: the tokenizer encodes '\\u2603'" in said
    assert said.count("as no token") == 1


def test_mostly_unknown_words_are_a_warning(tmp_path: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = make_run(tmp_path)
    check_tokens(found)
    assert "unknown to the tokenizer" not in caplog.text
    shutil.copytree(model, tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf8"))
    tokenizer["model"]["vocab"] = {f"x{n}" if n > 4 else word: n for word, n in tokenizer["model"]["vocab"].items()}
    path.write_text(json.dumps(tokenizer), "utf8")
    third = make_run(tmp_path, model={"source": str(tmp_path / "other")})
    check_tokens(third)
    assert "100% of the tokens of the train rows are unknown to the tokenizer of" in caplog.text


def test_rows_of_baselines_are_read_by_their_own_tokenizers(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "other")
    add_tokens(tmp_path / "other", "espresso")
    baselines = {"other": {"model": {"source": str(tmp_path / "other")}}}
    config = make_run(tmp_path).config.tree() | {"baselines": baselines}
    with pytest.raises(ConfigError, match="espresso"):
        session.train(RunConfig.model_validate(config))
