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
    "trust_remote_code": "it needs code of its own (auto_map), and custom code is not run; name a model whose "
    "architecture transformers knows",
    "no file named model.safetensors": "its weights are no safetensors, and others are not read; load it with "
    "transformers and write it again with save_pretrained",
    "ignore_mismatched_sizes": "its weights are of other sizes than config.json says",
}
"""What stands for an error of transformers with these words in it, where its own advice cannot be followed."""


def location(config: ModelConfig) -> str:
    """Return what transformers should load: a folder on this machine, or the name on the hub.

    Raises:
        DataError: If the source names a package or a folder that is not there.
    """
    if is_local(config.source):
        folder = resolve(config.source)
        if folder.suffix == ".gguf" and folder.is_file():
            from cl_dist.models.gguf import unpacked

            if (name := stand_in(head_of(folder))) is not None:
                raise ConfigError(f"science.model.source={config.source!r}: this is {name}")
            folder = unpacked(folder)
        if not folder.is_dir():  # `./name` would else be asked for on the hub, as `name`
            raise absent(config.source)
        _check_folder(folder, config)
        return str(folder)
    return config.source


def _check_folder(folder: Path, config: ModelConfig) -> None:
    """Raise ConfigError where a folder holds something else than a model, or something else in place of its files."""
    where = f"science.model.source={config.source!r}"
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{where}: this is an adapter of peft, and no whole model; load it on its base model, merge it "
            "(merge_and_unload), and save that with its tokenizer"
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
            f"science.model.source={config.source!r}: cannot be loaded: there is no config.json in this folder, so it "
            f"is no model{hint}"
        )


def load_backbone(config: ModelConfig, *, causal: bool = False, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a backbone with every dropout rate replaced by `dropout`; the engine lowers the precision later.

    causal: whether its language modelling head is wanted too. With `config.config` nothing is loaded: the weights are
    drawn, always the same ones, in float32. Weights that are quantized are loaded in float32 whatever dtype says.

    Raises:
        ConfigError: If transformers cannot load the source, its weights are quantized already, it is an encoder where
            a causal model is wanted, or bitsandbytes is wanted and not there.
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
        try:  # a causal model gets rows for tokens that it lacks, one without data reads none
            tokenizer = load_tokenizer(config)
        except ClDistError:  # one who only wants the model needs none, and a run is told when it reads its rows
            pass
        else:
            check_vocabulary(config, tokenizer)
    with torch.random.fork_rng(), _named(config):
        if config.config is not None:
            torch.manual_seed(0)
            drawn: PreTrainedModel = kind.from_config(  # type: ignore[no-untyped-call]
                hf, dtype=torch.float32, trust_remote_code=False
            )
            return drawn
        where = location(config)
        loaded: PreTrainedModel = kind.from_pretrained(  # what the file lacks is drawn, more of it where it is cut up
            where,
            revision=config.revision,
            config=hf,
            dtype=dtype,
            trust_remote_code=False,
            use_safetensors=True if Path(where).is_dir() else None,  # what model_digest has looked at, no pickles
        )
    return loaded


def load_config(config: ModelConfig) -> PretrainedConfig:
    """Return the sizes of a backbone; its weights are not looked at.

    Raises:
        ConfigError: If transformers has no such model, or would have to run code that comes with it.
    """
    with _named(config):
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
    if "/" in str(getattr(found, "_attn_implementation", "")):  # transformers would fetch it from the hub, and run it
        raise ConfigError(
            f"science.model.source={config.source!r}: its attn_implementation is custom code, which is not run; take "
            "that key out of config.json"
        )
    return found


@contextmanager
def _named(config: ModelConfig, fault: str = "cannot be loaded") -> Iterator[None]:
    """Name the model in an error of transformers, which can be of any type where sizes or files make no sense.

    Raises:
        ConfigError: Instead of it.
    """
    try:
        yield
    except (ClDistError, MemoryError):
        raise
    except Exception as error:
        why = next((reason for words, reason in _REASONS.items() if words in str(error)), None)
        if why is None and isinstance(error, RuntimeError) and torch.distributed.is_initialized():
            raise  # perhaps of a rank that has lost its peers: the gang starts again
        if why is None and isinstance(error, ImportError | OSError | ValueError):
            why = str(error)
        if why is not None and not is_local(config.source):
            why = f"no such folder here, and on the hub: {why}"
        where = f"science.model.source={config.source!r}"
        if why is None:  # of the inside of transformers
            sizes = f"the files in {where}" if config.config is None else "the sizes in science.model.config"
            why = f"{type(error).__name__}: {error}; mend {sizes}"
        raise ConfigError(f"{where}: {fault}: {why}") from error


def _check(hf: PretrainedConfig, config: ModelConfig, causal: bool) -> None:
    """Raise ConfigError unless every part of this project can work with such a backbone."""
    if getattr(hf, "quantization_config", None) is not None:
        raise ConfigError(
            f"science.model.source={config.source!r}: config.json has a quantization_config, and a backbone is loaded "
            "whole; name the unquantized weights and set science.model.weight_bits"
        )
    row = ARCHITECTURES.get(hf.model_type)
    if causal and row is not None and not row.is_causal:
        decoders = ", ".join(kind for kind, each in ARCHITECTURES.items() if each.is_causal)
        raise ConfigError(
            f"science.model.source={config.source!r}: model_type={hf.model_type!r} is an encoder, which writes no "
            f"answers; LAMOL, Rational LAMOL and science.model.output='lm' need one of {decoders}"
        )


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
        if parameter.is_floating_point():
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
    with _named(config, "no tokenizer"):
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            location(config), revision=config.revision, trust_remote_code=False
        )
    if not found.get_vocab().keys() - found.added_tokens_encoder.keys():  # transformers makes one where files lack
        raise ConfigError(
            f"science.model.source={config.source!r}: no tokenizer: its vocabulary holds special tokens alone, which "
            "is what transformers makes where the files of a tokenizer are missing (tokenizer.json, vocab.txt, or "
            "those of its kind); put them beside config.json"
        )
    return found


def num_embeddings(config: ModelConfig) -> int | None:
    """Return how many tokens a backbone knows, if its configuration says so."""
    known = getattr(load_config(config).get_text_config(), "vocab_size", None)
    return known if isinstance(known, int) else None


def check_vocabulary(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, *, is_whole: bool = False) -> None:
    """Check that a backbone has an embedding for every token that a tokenizer makes of texts, or adds to them.

    Special tokens that texts hardly contain, such as places of pictures, may lack one, unless is_whole.

    Raises:
        ConfigError: If it has none for one of them.
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
                "take the tokenizer that belongs to the weights, or resize_token_embeddings and save the model again"
                if config.config is None
                else f"set vocab_size to {num_ids(tokenizer)} or more"
            )
            raise ConfigError(
                f"science.model.{setting}: vocab_size={known}, but the tokenizer of {config.source!r} has "
                f"{num_ids(tokenizer)} tokens, counted up to its largest id: {token!a} has the number {number}, and "
                f"the embedding {known} rows; {remedy}"
            )


def replace(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path below root."""
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
