import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.errors import ConfigError, DataError
from cl_dist.models.backbone import load_backbone, load_config, load_tokenizer, lower, replace
from cl_dist.models.config import ModelConfig
from tests.encoders import KINDS, batch_of, encoder


def config_of(source: Path | str, **settings: Any) -> ModelConfig:
    return parse(ModelConfig, {"source": str(source), **settings})


def rates(model: PreTrainedModel) -> set[float]:
    """Every dropout rate that the model uses: of its modules, and those that attention reads from the configuration."""
    found = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    names = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout")
    return found | {getattr(model.config, name) for name in names if hasattr(model.config, name)}


@pytest.fixture
def folder(tmp_path: Path, kind: str) -> Path:
    """A saved encoder, its configuration asking for dropout as published ones do."""
    model = encoder(kind)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.1)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_is_loaded_with_its_weights_in_float32(folder: Path, kind: str) -> None:
    model, batch = load_backbone(config_of(folder)), batch_of()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.model_type == kind
    with torch.no_grad():
        found, expected = (m(batch["input_ids"], batch["attention_mask"])[0] for m in (model, encoder(kind)))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_stored_in_bfloat16_are_loaded_in_float32(folder: Path, kind: str) -> None:
    half: Any = encoder(kind)
    half.to(torch.bfloat16).save_pretrained(folder)
    assert {parameter.dtype for parameter in load_backbone(config_of(folder)).parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_every_dropout_rate_is_replaced(folder: Path, rate: float) -> None:
    assert rates(load_backbone(config_of(folder, dropout=rate))) == {rate}


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_training_is_deterministic(folder: Path) -> None:
    model, batch = load_backbone(config_of(folder)).train(), batch_of()
    with torch.no_grad():
        first, second = (model(batch["input_ids"], batch["attention_mask"])[0] for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_name_that_the_hub_does_not_give_is_an_error_of_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"science\.model\.source='nobody/nothing': cannot be loaded"):
        load_backbone(config_of("nobody/nothing"))


def test_a_folder_that_holds_no_model_is_an_error_of_the_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"science\.model\.source=.*: cannot be loaded"):
        load_backbone(config_of(tmp_path))


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "package:no_such_package/model"])
def test_a_folder_or_package_that_is_not_there_is_named_and_not_looked_for_on_the_hub(source: str) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*nowhere|no_such_package"):
        load_backbone(config_of(source))


@pytest.mark.parametrize("kind", ["bert"])
def test_a_folder_without_a_tokenizer_says_so(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"science\.model\.source=.*: no tokenizer"):
        load_tokenizer(config_of(folder))


@pytest.mark.parametrize("kind", ["bert"])
def test_weights_that_are_quantized_already_are_refused(folder: Path) -> None:
    path = folder / "config.json"
    sizes = json.loads(path.read_text("utf8")) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    path.write_text(json.dumps(sizes), "utf8")
    for config in (config_of(folder), config_of("nowhere", config=sizes)):  # the latter as a plan reads it
        with pytest.raises(ConfigError, match=r"use the unquantized weights and set science\.model\.weight_bits"):
            load_backbone(config)


@pytest.mark.parametrize("kind", ["bert"])
def test_a_package_that_is_missing_is_an_error_of_the_setting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lack(*args: Any, **kwargs: Any) -> None:
        raise ImportError("install it")

    for name, load in (("AutoModel", load_backbone), ("AutoTokenizer", load_tokenizer)):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", lack)
        with pytest.raises(ConfigError, match=r"science\.model\.source=.*: install it"):
            load(config_of(folder))


CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel, BertTokenizer
Path(__file__).with_name("EXECUTED").touch()
class C(BertConfig): model_type = "own"
class M(BertModel): config_class = C
class T(BertTokenizer): pass
"""


@pytest.mark.parametrize("kind", ["bert"])
def test_code_in_a_model_folder_is_never_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers would ask, where it is not told
    (folder / "own.py").write_text(CODE.replace("__file__", repr(str(folder / "own.py"))))
    path, known = folder / "config.json", json.loads((folder / "config.json").read_text("utf8"))
    code = {"AutoConfig": "own.C", "AutoModel": "own.M", "AutoTokenizer": ["own.T", None]}
    path.write_text(json.dumps(known | {"model_type": "own", "auto_map": code}), "utf8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T", "auto_map": code}), "utf8")
    for load in (load_config, load_backbone, load_tokenizer):
        with pytest.raises(ConfigError, match=r"source='.*model': .*which is not run; choose a model"):
            load(config_of(folder))
    path.write_text(json.dumps(known | {"attn_implementation": "someone/kernel:attend"}), "utf8")
    with pytest.raises(ConfigError, match=r"attn_implementation is custom code, which is not run"):
        load_backbone(config_of(folder))  # where `kernels` is installed, it would be fetched from the hub and run
    assert not (folder / "EXECUTED").exists()


@pytest.mark.parametrize("kind", ["bert"])
def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")  # what the digest is of
    torch.save(encoder("bert").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match=r"its weights are not in safetensors format.*save it again with save_pretrained"
    ):
        load_backbone(config_of(folder))


@pytest.mark.parametrize("kind", ["bert"])
@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"hidden_size": 0}, "ZeroDivisionError"),
        ({"hidden_size": "abc"}, "expected int, got str"),
        ({"hidden_act": "nope"}, "KeyError: 'nope'"),
        ({"num_attention_heads": 0}, "ZeroDivisionError"),
        ({"num_hidden_layers": -1}, "-1 layers .*: expected 1 or more"),
        ({"model_type": 5}, "cannot be loaded"),
    ],
)
def test_sizes_that_make_no_model_are_errors_of_the_setting(folder: Path, over: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    sizes = json.loads(path.read_text("utf8")) | over
    path.write_text(json.dumps(sizes), "utf8")
    for config in (config_of(folder), config_of("nowhere", config=sizes)):
        with pytest.raises(ConfigError, match=rf"(?s)science\.model.*{message}"):
            load_backbone(config)


@pytest.mark.parametrize("kind", ["bert"])
def test_files_of_other_sizes_or_cut_off_are_errors_of_the_setting(folder: Path) -> None:
    path, weights = folder / "config.json", folder / "model.safetensors"
    known = path.read_text("utf8")
    path.write_text(json.dumps(json.loads(known) | {"intermediate_size": 50}), "utf8")
    with pytest.raises(ConfigError, match="the shapes of its weights do not match"):
        load_backbone(config_of(folder))
    path.write_text(known, "utf8")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot be loaded: SafetensorError"):
        load_backbone(config_of(folder))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="no tokenizer: KeyError"):
        load_tokenizer(config_of(folder))


def test_a_drawn_model_knows_the_tokens_of_its_tokenizer(tmp_path: Path) -> None:
    sizes = {"model_type": "bert", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    source = tiny.save_tokenizer(tmp_path, tiny.WORDS)
    assert load_backbone(config_of(source, config=sizes | {"vocab_size": len(tiny.WORDS)}))
    with pytest.raises(ConfigError, match=rf"vocab_size=3, but the tokenizer of .* has {len(tiny.WORDS)} tokens"):
        load_backbone(config_of(source, config=sizes | {"vocab_size": 3}))


def test_whole_numbers_are_not_lowered() -> None:
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.tensor([1, 255], dtype=torch.uint8), requires_grad=False)
    assert [p.dtype for p in lower(model).parameters()] == [torch.bfloat16, torch.bfloat16, torch.uint8]


def test_replace_puts_a_module_at_any_depth() -> None:
    root = nn.Sequential(nn.Sequential(nn.Identity(), nn.Identity()), nn.Identity())
    deep, shallow = nn.ReLU(), nn.GELU()
    replace(root, "0.1", deep)
    replace(root, "1", shallow)
    assert root.get_submodule("0.1") is deep
    assert root.get_submodule("1") is shallow
