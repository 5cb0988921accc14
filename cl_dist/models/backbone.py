"""Backbones: loading them from a folder, a package or the hub, and where an architecture has its sub-blocks."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from cl_dist.errors import ConfigError, DataError
from cl_dist.models.config import ModelConfig
from cl_dist.places import resolve

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SubBlock:
    """A sub-block of a transformer layer: what computes its output, and the norm after the residual sum."""

    name: str
    output: str
    """Module whose output is about to be added to the residual stream; a plugin goes behind it."""
    norm: str


@dataclass(frozen=True, slots=True)
class Places:
    """Where the parts of an architecture are, as module paths."""

    layers: str
    sub_blocks: tuple[SubBlock, ...]
    query_value: tuple[str, str]
    """Names of the query and value projections of an attention: where LoRA sits unless it is told otherwise."""


_BERT = Places(
    layers="encoder.layer",
    sub_blocks=(
        SubBlock("attention", "attention.output.dropout", "attention.output.LayerNorm"),
        SubBlock("ffn", "output.dropout", "output.LayerNorm"),
    ),
    query_value=("query", "value"),
)
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop"),
)
PLACES: dict[str, Places] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": Places(
        layers="transformer.layer",
        sub_blocks=(
            SubBlock("attention", "attention.out_lin", "sa_layer_norm"),
            SubBlock("ffn", "ffn.dropout", "output_layer_norm"),
        ),
        query_value=("q_lin", "v_lin"),
    ),
}
"""One row per `model_type` of transformers: to support an architecture, add its row here."""


def places(backbone: PreTrainedModel) -> Places:
    """Return the row of PLACES for a backbone.

    Raises:
        ConfigError: If the architecture has no row.
    """
    return row_for(backbone, PLACES, "cl_dist/models/backbone.py")


def row_for(model: PreTrainedModel, table: Mapping[str, T], file: str) -> T:
    """Return the row of a model's architecture in a table; file is where the table is.

    Raises:
        ConfigError: If the architecture has no row.
    """
    kind = model.config.model_type
    if kind not in table:
        raise ConfigError(
            f"model_type={kind!r}: expected one of {', '.join(table)}; to support it, add a row to PLACES in {file}"
        )
    return table[kind]


def location(config: ModelConfig) -> str:
    """Return what transformers should load: a folder on this machine, or the name on the hub.

    Raises:
        DataError: If the source names a package or a folder that is not there.
    """
    if config.source.startswith(("package:", ".", "/", "~")) or Path(config.source).is_dir():
        folder = resolve(config.source)
        if folder.suffix == ".gguf" and folder.is_file():
            from cl_dist.models.gguf import unpacked

            folder = unpacked(folder)
        if not folder.is_dir():  # `./name` would else be asked for on the hub, as `name`
            raise DataError(f"science.model.source={config.source!r}: there is no folder {folder}")
        return str(folder)
    return config.source


def load_backbone(config: ModelConfig, *, causal: bool = False) -> PreTrainedModel:
    """Load a backbone in float32 with every dropout rate replaced by `dropout`; the engine lowers the precision later.

    causal: whether its language modelling head is wanted too. With `config.config` nothing is loaded: the weights are
    drawn, always the same ones.

    Raises:
        ConfigError: If transformers cannot load the source.
    """
    kind = AutoModelForCausalLM if causal else AutoModel
    try:
        if config.config is not None:
            sizes = {name: value for name, value in config.config.items() if name != "model_type"}
            hf = AutoConfig.for_model(config.config.get("model_type", ""), **sizes)
            _set_dropout(hf, config.dropout)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                drawn: PreTrainedModel = kind.from_config(hf, dtype=torch.float32)  # type: ignore[no-untyped-call]
                return drawn
        where = location(config)
        hf = AutoConfig.from_pretrained(where, revision=config.revision)
        _set_dropout(hf, config.dropout)
        return kind.from_pretrained(where, revision=config.revision, config=hf, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"science.model.source={config.source!r}: cannot be loaded: {error}") from error


def recompute_activations(model: nn.Module) -> None:
    """Have the backbone inside a model compute its layers' activations again in the backward pass.

    Raises:
        ConfigError: If its architecture cannot.
    """
    backbone = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    if not backbone.supports_gradient_checkpointing:
        raise ConfigError(
            f"cluster.activation_checkpointing: model_type={backbone.config.model_type!r} does not know it"
        )
    enable: Any = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _set_dropout(hf: PretrainedConfig, rate: float) -> None:
    for name in _DROPOUTS:
        if hasattr(hf, name):
            setattr(hf, name, rate)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside the weights.

    Raises:
        ConfigError: If transformers cannot load it.
    """
    try:
        return AutoTokenizer.from_pretrained(location(config), revision=config.revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"science.model.source={config.source!r}: no tokenizer: {error}") from error


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path below root."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
