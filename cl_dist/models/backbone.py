"""Backbones: loading them from a folder, a package or the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
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

from cl_dist.errors import ClDistError, ConfigError
from cl_dist.formats import head_of, stand_in
from cl_dist.models.architectures import ARCHITECTURES
from cl_dist.models.config import ModelConfig, absent, is_local
from cl_dist.paths import resolve
from cl_dist.tokens import num_ids

M = TypeVar("M", bound=nn.Module)
_DROPOUTS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    *("hidden_dropout", "embedding_dropout", "mlp_dropout", "pooler_dropout"),
)
_REASONS = {
    "trust_remote_code": "it needs custom code (auto_map), which is not run; choose a model whose architecture is part "
    "of transformers",
    "no file named model.safetensors": "its weights are not in safetensors format; load it with transformers and save "
    "it again with save_pretrained",
    "ignore_mismatched_sizes": "the shapes of its weights do not match config.json",
}
"""Replacements for errors of transformers that contain these words, whose own advice does not apply here."""


def location(config: ModelConfig) -> str:
    """Return the argument for `from_pretrained`: a local folder, or the name on the hub.

    Raises:
        DataError: If the source names a package or a folder that does not exist.
    """
    if is_local(config.source):
        folder = resolve(config.source)
        if folder.suffix == ".gguf" and folder.is_file():
            from cl_dist.models.gguf import unpacked

            if (name := stand_in(head_of(folder))) is not None:
                raise ConfigError(f"science.model.source={config.source!r}: this is {name}")
            folder = unpacked(folder)
        if not folder.is_dir():  # otherwise transformers would look up `./name` on the hub, as `name`
            raise absent(config.source)
        _check_folder(folder, config)
        return str(folder)
    return config.source


def _check_folder(folder: Path, config: ModelConfig) -> None:
    """Raise ConfigError if a folder holds an adapter, or placeholders instead of its files."""
    where = f"science.model.source={config.source!r}"
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{where}: this is a peft adapter, not a full model; load it on its base model, merge it "
            "(merge_and_unload), and save the result with its tokenizer"
        )
    for path in sorted(folder.glob("*")):
        is_read = path.suffix in (".safetensors", ".json", ".txt", ".model") and path.is_file()
        if is_read and (name := stand_in(head_of(path))) is not None:
            raise ConfigError(f"{where}: {path.name} is {name}")


def _check_is_model(folder: Path, config: ModelConfig) -> None:
    if not (folder / "config.json").is_file():
        inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
        packed = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; did you mean {config.source.rstrip('/')}/{(inner or packed)[0]}?" if inner or packed else ""
        raise ConfigError(
            f"science.model.source={config.source!r}: cannot be loaded: this folder has no config.json, so it is not a "
            f"model{hint}"
        )


def load_backbone(config: ModelConfig, *, causal: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a backbone with every dropout rate replaced by `dropout`; the engine lowers the precision later.

    With `config.config` nothing is loaded: the weights are random with a fixed seed, in float32.

    Args:
        config: The model settings.
        causal: Whether to load the language modelling head as well.
        dtype: Precision of the weights; weights to be quantized are loaded in float32.

    Raises:
        ConfigError: If transformers cannot load the source, its weights are quantized already, it is an encoder but a
            causal model is needed, or bitsandbytes is needed but not installed.
    """
    if config.weight_bits is None:
        return _load(config, causal, dtype)
    from cl_dist.models.quantized import quantize_layers

    backbone = _load(config, causal, torch.float32)
    quantize_layers(backbone, config.weight_bits)
    return backbone


def _load(config: ModelConfig, causal: bool, dtype: torch.dtype) -> PreTrainedModel:
    kind = AutoModelForCausalLM if causal else AutoModel
    hf = load_config(config)
    _check(hf, config, causal)
    _set_dropout(hf, config.dropout)
    if config.config is not None and not causal and torch.get_default_device().type != "meta":
        try:  # causal models are extended to the vocabulary, and meta models read no tokens
            tokenizer = load_tokenizer(config)
        except ClDistError:  # optional here; a run fails with this error when it encodes its rows
            pass
        else:
            check_vocabulary(config, tokenizer)
    with torch.random.fork_rng(), _source_errors(config):
        if config.config is not None:
            torch.manual_seed(0)
            drawn: PreTrainedModel = kind.from_config(  # type: ignore[no-untyped-call]
                hf, dtype=torch.float32, trust_remote_code=False
            )
            return drawn
        where = location(config)
        loaded: PreTrainedModel = (
            kind.from_pretrained(  # weights missing from the file are drawn from the forked generator
                where,
                revision=config.revision,
                config=hf,
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True
                if Path(where).is_dir()
                else None,  # the files that model_digest covers; no pickles
            )
        )
    return loaded


def load_config(config: ModelConfig) -> PretrainedConfig:
    """Return the transformers configuration of a backbone, without reading its weights.

    Raises:
        ConfigError: If transformers does not know the model, or the model needs custom code.
    """
    with _source_errors(config):
        if config.config is None:
            where = location(config)
            if is_local(config.source):
                _check_is_model(Path(where), config)
            found: PretrainedConfig = AutoConfig.from_pretrained(
                where, revision=config.revision, trust_remote_code=False
            )
        else:
            sizes = {name: value for name, value in config.config.items() if name != "model_type"}
            found = AutoConfig.for_model(config.config.get("model_type", ""), **sizes)
    if (layers := getattr(found, "num_hidden_layers", 1)) < 1:
        raise ConfigError(f"science.model: {layers} layers (num_hidden_layers, n_layer): expected 1 or more")
    if "/" in str(getattr(found, "_attn_implementation", "")):  # transformers would download and run it
        raise ConfigError(
            f"science.model.source={config.source!r}: its attn_implementation is custom code, which is not run; remove "
            "that key from config.json"
        )
    return found


@contextmanager
def _source_errors(config: ModelConfig, fault: str = "cannot be loaded") -> Iterator[None]:
    """Convert errors of transformers, which can be of any type for invalid sizes or files, to errors with the source.

    Raises:
        ConfigError: In place of the original error.
    """
    try:
        yield
    except (ClDistError, MemoryError):
        raise
    except Exception as error:
        why = next((reason for words, reason in _REASONS.items() if words in str(error)), None)
        if why is None and isinstance(error, RuntimeError) and torch.distributed.is_initialized():
            raise  # possibly a rank that lost its peers: the gang restarts
        if why is None and isinstance(error, ImportError | OSError | ValueError):
            why = str(error)
        if why is not None and not is_local(config.source):
            why = f"not a local folder, and on the hub: {why}"
        where = f"science.model.source={config.source!r}"
        if why is None:  # an internal error of transformers
            sizes = f"the files in {where}" if config.config is None else "the sizes in science.model.config"
            why = f"{type(error).__name__}: {error}; correct {sizes}"
        raise ConfigError(f"{where}: {fault}: {why}") from error


def _check(hf: PretrainedConfig, config: ModelConfig, causal: bool) -> None:
    """Raise ConfigError unless the backbone is supported."""
    if getattr(hf, "quantization_config", None) is not None:
        raise ConfigError(
            f"science.model.source={config.source!r}: config.json has a quantization_config, but backbones are loaded "
            "unquantized; use the unquantized weights and set science.model.weight_bits"
        )
    row = ARCHITECTURES.get(hf.model_type)
    if causal and row is not None and not row.is_causal:
        decoders = ", ".join(kind for kind, each in ARCHITECTURES.items() if each.is_causal)
        raise ConfigError(
            f"science.model.source={config.source!r}: model_type={hf.model_type!r} is an encoder, which cannot "
            f"generate text; LAMOL, Rational LAMOL and science.model.output='lm' need one of {decoders}"
        )


def recompute_activations(model: nn.Module) -> None:
    """Enable activation checkpointing in the backbone of a model.

    Raises:
        ConfigError: If its architecture does not support it.
    """
    backbone = next(part for part in model.modules() if isinstance(part, PreTrainedModel))
    if not backbone.supports_gradient_checkpointing:
        raise ConfigError(
            f"cluster.activation_checkpointing: model_type={backbone.config.model_type!r} does not support it"
        )
    enable: Any = getattr(backbone, "activation_checkpointing_enable", None) or backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _set_dropout(hf: PretrainedConfig, rate: float) -> None:
    for name in _DROPOUTS:
        if hasattr(hf, name):
            setattr(hf, name, rate)


def lower(model: M) -> M:
    """Convert a model's parameters to bfloat16, as the engine does in training; buffers keep their precision.

    The frequencies of rotary positions are buffers: with 8 significant bits, the relative angle of tokens a thousand
    positions apart would be wrong by up to radians.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's inputs: its first device, or the CPU if all weights are offloaded.

    Weights that accelerate offloads (parallel/device_map.py) are on the meta device between uses.
    """
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer stored with the weights.

    Raises:
        ConfigError: If transformers cannot load it.
    """
    with _source_errors(config, "no tokenizer"):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location(config), revision=config.revision, trust_remote_code=False
        )
    if (
        not found.get_vocab().keys() - found.added_tokens_encoder.keys()
    ):  # transformers creates one if files are missing
        raise ConfigError(
            f"science.model.source={config.source!r}: no tokenizer: its vocabulary has special tokens only, which "
            "means that the tokenizer's files are missing (tokenizer.json, vocab.txt or the like); copy them next to "
            "config.json"
        )
    return found


def num_embeddings(config: ModelConfig) -> int | None:
    """Return the vocabulary size of a backbone, or None if its configuration does not state it."""
    known = getattr(load_config(config).get_text_config(), "vocab_size", None)
    return known if isinstance(known, int) else None


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, is_whole: bool = False) -> None:
    """Check that a backbone has an embedding for every token that a tokenizer produces.

    Special tokens that do not occur in texts, such as image placeholders, may lack one, unless is_whole.

    Raises:
        ConfigError: If an embedding is missing.
    """
    known = num_embeddings(config)
    if known is None or num_ids(tokenizer) <= known:
        return
    names = ("pad", "unk", "cls", "sep", "mask", "bos", "eos")
    added = {getattr(tokenizer, f"{name}_token_id", None) for name in names}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]):
        entry = tokenizer.added_tokens_decoder.get(number)
        is_idle = entry is not None and entry.special and number not in added
        if number >= known and (is_whole or not is_idle):
            setting = "source" if config.config is None else "config"
            remedy = (
                "use the tokenizer that belongs to the weights, or resize_token_embeddings and save the model again"
                if config.config is None
                else f"set vocab_size to {num_ids(tokenizer)} or more"
            )
            raise ConfigError(
                f"science.model.{setting}: vocab_size={known}, but the tokenizer of {config.source!r} has "
                f"{num_ids(tokenizer)} tokens, counted up to its largest id: {token!a} has id {number}, but the "
                f"embedding has {known} rows; {remedy}"
            )


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path below root."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
