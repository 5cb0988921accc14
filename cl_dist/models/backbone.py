"""Backbones: loading them from a folder, a package or the hub."""

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

M = TypeVar("M", bound=nn.Module)
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    *("hidden_dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout"),
)


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


def load_backbone(config: ModelConfig, *, causal: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a backbone with every dropout rate replaced by `dropout`; the engine lowers the precision later.

    causal: whether its language modelling head is wanted too. With `config.config` nothing is loaded: the weights are
    drawn, always the same ones, in float32. Weights that are quantized are loaded in float32 whatever dtype says.

    Raises:
        ConfigError: If transformers cannot load the source, or bitsandbytes is wanted and not there.
    """
    if config.weight_bits is None:
        return _load(config, causal, dtype)
    from cl_dist.models.quantized import quantize_layers

    backbone = _load(config, causal, torch.float32)
    quantize_layers(backbone, config.weight_bits)
    return backbone


def _load(config: ModelConfig, causal: bool, dtype: torch.dtype) -> PreTrainedModel:
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
        with torch.random.fork_rng():  # what the file lacks is drawn, more of it where the model is cut up over ranks
            loaded: PreTrainedModel = kind.from_pretrained(where, revision=config.revision, config=hf, dtype=dtype)
        return loaded
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


def lower(model: M) -> M:
    """Bring a model's parameters to bfloat16, as the engine does in training; buffers stay as they are.

    The frequencies of rotary positions are buffers: rounded to 8 bits, they would turn tokens a thousand places apart
    by angles that are off by up to radians.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return model


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs: its first device, and the host where all weights are brought from there.

    Weights that accelerate brings to a device when they are used (parallel/spread.py) are on none in between.
    """
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


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
