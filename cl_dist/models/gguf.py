"""Conversion of a gguf file to a folder for `from_pretrained`, cached by the digest of the file.

Reading a quantised file takes seconds to a minute in every process and stage; its float32 copy takes one second.
"""

import os
import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cl_dist.errors import ConfigError
from cl_dist.ledger import sha256

CACHE = "CL_DIST_CACHE"
"""Environment variable with the folder for unpacked models; default: ~/.cache/cl-dist."""


def unpacked(path: Path) -> Path:
    """Return a folder with the float32 weights, config and tokenizer of a gguf file.

    Raises:
        ConfigError: If the file cannot be read, or the package `gguf` is missing.
    """
    cache = Path(os.environ.get(CACHE, Path.home() / ".cache" / "cl-dist"))
    folder = cache / f"{path.stem}-{sha256(path)[:16]}"
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    part = Path(mkdtemp(prefix=".unpacking-", dir=cache))
    try:
        _unpack(path, part)
        part.rename(folder)
    except ImportError as error:
        raise ConfigError(f"{path.name}: {error}; pip install 'cl-dist[text]'") from error
    except OSError:
        if not folder.exists():  # another process finished first
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return folder


def _unpack(path: Path, folder: Path) -> None:
    """Write the files for `from_pretrained`. Models read from gguf cannot be saved, so the weights are copied."""
    kind: Any = AutoModelForCausalLM
    try:
        packed = kind.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, trust_remote_code=False)
        tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{path}: cannot be read as gguf: {error}") from error
    known = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        known.pop(key, None)
    config = AutoConfig.for_model(known.pop("model_type"), **known)
    model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.load_state_dict(packed.state_dict())
    model.tie_weights()
    # Without save_pretrained, which writes on rank 0 only: the ranks' disks may differ.
    shared = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in shared}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = [type(model).__name__]
    config.to_json_file(folder / "config.json")
    tokenizer.save_pretrained(folder)
