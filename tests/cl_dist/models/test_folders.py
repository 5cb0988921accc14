"""Folders that hold no model, or something in place of its files, are named for what they are."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist import session
from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.errors import ClDistError, ConfigError, DataError
from cl_dist.models.backbone import load_backbone, load_config, load_tokenizer
from cl_dist.models.config import ModelConfig
from cl_dist.models.digest import model_digest
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_folder import reopen, save

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.save_model(tmp_path / "model")


def said(source: object, load: Any = load_config) -> str:
    with pytest.raises(ClDistError) as caught:
        load(ModelConfig(source=str(source)))
    assert isinstance(caught.value, ConfigError | DataError)
    return str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (POINTER, "a Git LFS pointer, not the file itself; get the file with `git lfs pull`"),
        (b"<!doctype html>\n<html>", "a web page"),
        (b"PK\x03\x04\x14\x00\x00\x00data.pkl", "a zip archive"),
    ],
)
def test_what_lies_in_the_place_of_a_file_is_named(model: Path, name: str, content: bytes, what: str) -> None:
    (model / name).write_bytes(content)
    for load in (load_config, load_backbone, load_tokenizer):
        assert f"{name} is {what}" in said(model, load)


def test_a_pointer_in_place_of_a_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(POINTER)
    assert "this is a Git LFS pointer" in said(tmp_path / "a.gguf")


@pytest.mark.parametrize("is_whole", [True, False])
def test_an_adapter_of_peft_is_named(model: Path, is_whole: bool) -> None:
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "gpt2", "peft_type": "LORA"}))
    if not is_whole:
        (model / "config.json").unlink()
    assert "this is a peft adapter, not a full model" in said(model)


def test_a_folder_without_config_json_names_the_one_inside_that_has_it(tmp_path: Path, model: Path) -> None:
    outer = tmp_path / "outer"
    outer.mkdir()
    assert "this folder has no config.json, so it is not a model" in said(outer)
    shutil.copytree(model, outer / "0_Transformer")
    assert said(outer).endswith("outer/0_Transformer?")


def test_a_file_in_place_of_its_folder_is_named(model: Path) -> None:
    assert "this is a file; expected its folder" in said(model / "model.safetensors")


def test_whatever_a_safetensors_file_begins_with_its_weights_are_read(model: Path) -> None:
    whole = (model / "model.safetensors").read_bytes()
    size = int.from_bytes(whole[:8], "little")
    loaded, tried = load_backbone(ModelConfig(source=str(model))).state_dict(), 0
    expected = {name: value.clone() for name, value in loaded.items()}  # which may be a map of the file written below
    for length in (0x0280, 0x0480, 0xFEFF):  # as a pickle, and UTF-16, begin
        if length >= size:
            header = whole[8 : 8 + size].ljust(length)
            (model / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + whole[8 + size :])
            found = load_backbone(ModelConfig(source=str(model))).state_dict()
            assert all(torch.equal(found[name], value) for name, value in expected.items())
            tried += 1
    assert tried


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run with one finished stage whose model and data are relative, seen from another folder with the data."""
    tree = tiny.tree(tmp_path)
    tree["science"]["model"]["source"] = "model"
    for task in tree["science"]["tasks"]:
        task["source"]["path"] = Path(task["source"]["path"]).name
    monkeypatch.chdir(tmp_path)
    model_digest.cache_clear()
    run = Run(parse(RunConfig, tree))
    with run.ledger.publish(run.plan(0)[0]) as out:
        (out / "train.json").write_text("{}")
    save(run.config)
    (tmp_path / "sub").mkdir()
    for path in tmp_path.glob("*.jsonl"):
        shutil.copy(path, tmp_path / "sub")
    monkeypatch.chdir(tmp_path / "sub")
    model_digest.cache_clear()
    return reopen(Path("../runs/tiny"))


def test_a_relative_model_that_is_not_here_is_named_and_not_a_conflict(
    begun: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run = Run(begun)
    with pytest.raises(DataError, match=r"science.model.source='model': no such folder here"):
        run.ledger.is_done(run.plan(0)[0])
    with pytest.raises(DataError, match=r"no such folder here"):
        session.train(begun)
    hub = ModelConfig(source="model")
    assert "science.model.source='model': cannot be loaded: not a local folder, and on the hub: " in said(hub.source)


@pytest.mark.parametrize("source", ["./gone", "/nowhere/gone", "~/gone.of.nobody", "./gone.gguf"])
@pytest.mark.parametrize("drawn", [False, True])
def test_a_folder_that_is_gone_has_no_digest(source: str, drawn: bool) -> None:
    with pytest.raises(DataError, match=r"no such folder here"):
        model_digest(source, None, drawn)


def test_a_run_folder_whose_name_is_no_utf8_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = tiny.tree(tmp_path) | {"run": {"name": "tiny", "dir": "runs"}}
    odd = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(odd)
    monkeypatch.chdir(os.fsdecode(odd))
    with pytest.raises(ConfigError, match=r"is not valid UTF-8") as caught:
        parse(RunConfig, tree)
    assert str(caught.value).isascii()
    assert parse(RunConfig, tree | {"run": {"name": "tiny", "dir": str(tmp_path)}})
