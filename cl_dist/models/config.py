"""Settings of backbones and of the modules that methods add to them; torch-free."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cl_dist.config import Section
from cl_dist.errors import ConfigError, DataError
from cl_dist.paths import ConfigPath, resolve


class ModelConfig(Section):
    """The pretrained backbone."""

    source: ConfigPath
    """Folder or .gguf file, `package:NAME/inner/path` (inside an installed package), or a name on the model hub."""
    revision: str | None = None
    """Commit on the hub. Set it, so that the weights cannot change between runs."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward pass; bfloat16 keeps float32 masters in the optimizer (ZeRO stages 1-3)."""
    weight_bits: Literal[4, 8] | None = None
    """Quantize the weights of a frozen backbone's linear layers to 4 (NF4) or 8 bits with bitsandbytes, for methods
    that insert modules of their own. Activations, embeddings and norms are not quantized."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Replaces every dropout rate of the backbone. Above 0, results depend on the assignment of rows to ranks."""
    pooling: Literal["mean", "cls", "pooler", "last"] | None = None
    """Sentence vector: mean over tokens, an encoder's first token, its pretrained tanh pooler, or the last token. None
    uses the mean in an encoder and the last token in a decoder, the only one that attends to the whole row."""
    output: Literal["classifier", "lm"] | None = None
    """classifier: a head per task predicts a label; lm: a causal language model generates the answer. None uses the
    default of the method."""
    spare_task_tokens: int = Field(64, gt=0)
    """Rows of the vocabulary reserved for task tokens (output: lm), so that tensors keep their shapes when tasks are
    appended; when they are used up, the same number is added."""
    config: dict[str, Any] | None = None
    """Builds a model with random weights instead of loading one: a `model_type` of transformers and its sizes; `source`
    is then used for the tokenizer only."""


def is_local(source: str) -> bool:
    """Return whether a source is a folder or file, not a model on the hub: by its prefix, or because it exists."""
    return source.startswith(("package:", ".", "/", "~")) or Path(source).exists()


def absent(source: str) -> DataError:
    """Return the error for a source that does not exist."""
    path = resolve(source)
    where = f"science.model.source={source!r}"
    if path.is_file():
        return DataError(f"{where}: this is a file; expected its folder, or a .gguf file")
    relative = "" if path.is_absolute() else "; a relative path starts at the working directory"
    return DataError(f"{where}: no such folder here (there is no folder {path}){relative}")


def known_sizes(model: ModelConfig) -> Mapping[str, Any]:
    """Return a backbone's configuration from the run file or a local config.json; empty if neither is available."""
    if model.config is not None:
        return model.config
    try:
        found = json.loads((resolve(model.source) / "config.json").read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError, DataError):  # a name on the hub; a damaged file fails on loading
        return {}
    return found if isinstance(found, dict) else {}


def max_positions(sizes: Mapping[str, Any]) -> int | None:
    """Return the maximum number of tokens of a model with absolute positions, from its config.json.

    None if config.json does not state it, and for rotary and relative positions, which have no limit.
    """
    kind = sizes.get("model_type")
    known = sizes.get("n_positions" if kind == "gpt2" else "max_position_embeddings")
    if not isinstance(known, int) or kind not in ("bert", "roberta", "distilbert", "deberta-v2", "gpt2"):
        return None
    if kind == "roberta":  # positions start after the padding index
        padding = sizes.get("pad_token_id")
        return known - (padding if isinstance(padding, int) else 1) - 1
    return None if kind == "deberta-v2" and not sizes.get("position_biased_input", True) else known


def check_length(max_length: int, positions: int | None) -> None:
    """Check that rows fit a model's maximum number of positions.

    Raises:
        ConfigError: If they do not.
    """
    if positions is not None and max_length > positions:
        raise ConfigError(f"train.max_length={max_length}: this model reads at most {positions} tokens; lower it")


class LoraShape(Section):
    """Low-rank updates, named as in peft."""

    r: int = Field(8, gt=0)
    """Rank of the updates."""
    alpha: int = Field(16, gt=0)
    """The update is scaled by alpha / r."""
    target_modules: tuple[str, ...] | None = None
    """Name suffixes of the layers that get an update; None uses query and value of every attention."""


class SharingShape(Section):
    """Sizes of the knowledge-sharing part of a CTR plugin; defaults as in the CTR release."""

    capsule_layers: Literal[1, 2] = 2
    """A task capsule is one linear map H -> d, or two, H -> capsule_mid -> d, without a nonlinearity in between."""
    capsule_mid: int = Field(100, gt=0)
    """Width between the two layers of a task capsule (capsule_layers: 2)."""
    capsule_size: int = Field(3, gt=0)
    """Dimensions d of a capsule."""
    transfer_capsules: int = Field(3, gt=0)
    """Number of transfer capsules."""
    filters: int = Field(100, gt=0)
    """Filters per kernel size of the text CNNs in the router."""
    kernels: tuple[int, ...] = (3, 4, 5)
    """Kernel sizes of these CNNs, in tokens."""
    routing: Literal["transfer", "dynamic", "none"] = "transfer"
    """transfer: estimator and router of CTR; dynamic: three rounds of routing by agreement, as in B-CL; none: the plain
    sum over the seen tasks, an ablation."""
    routing_scope: Literal["task", "shared"] = "task"
    """task: each task has a router, a routing row and an up-projection of its own, which no later task changes. shared:
    one for all tasks, trained by each of them, as in the CTR release for similar tasks; earlier tasks then change."""
    up_init: Literal["normal", "zero"] = "normal"
    """Initial up-projection: N(0, 0.02), or zero, so that an untrained module changes nothing."""


class MaskShape(Section):
    """Sizes of the task-specific module of a plugin, and its gates."""

    tsm_size: int = Field(2000, gt=0)
    """Gated units between the two layers of the task-specific module."""
    s_max: float = Field(400.0, gt=1)
    """Gate slope at the end of each annealing cycle."""
    mask_mean: float = 0.0
    """Mean of a new task's gate embeddings."""
    mask_std: float = Field(1.0, ge=0)
    """A new task's gate embeddings are drawn from N(mask_mean, mask_std); units with e > 0 are open."""
    inherit: Literal["none", "previous", "nearest"] = "none"
    """Earlier task whose masks, norms, head, router, up-projection and routing row initialize a task's: none (random
    values, the backbone's norms), the previous one, or the nearest one. nearest measures, before any training step, how
    well the sentence vectors of the backbone with each earlier task's parts, and of the backbone alone, predict the
    labels of the task's train rows (LogME), and takes the best; if that is the backbone alone, nothing is inherited. A
    head is inherited if the numbers of labels are equal."""


class PluginShape(MaskShape, SharingShape):
    """Sizes of a CTR plugin."""

    share: bool = True
    """Knowledge sharing (KSM); False is the ablation that leaves masks only, which is HAT on adapters."""
