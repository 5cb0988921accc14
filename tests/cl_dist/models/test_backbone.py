from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from cl_dist.config import parse
from cl_dist.errors import ConfigError, DataError
from cl_dist.models.backbone import load_backbone, load_tokenizer, replace
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


def test_replace_puts_a_module_at_any_depth() -> None:
    root = nn.Sequential(nn.Sequential(nn.Identity(), nn.Identity()), nn.Identity())
    deep, shallow = nn.ReLU(), nn.GELU()
    replace(root, "0.1", deep)
    replace(root, "1", shallow)
    assert root.get_submodule("0.1") is deep
    assert root.get_submodule("1") is shallow
