"""Fingerprint inputs of a backbone: the digest of its files, and its settings. Torch-free."""

from functools import lru_cache
from typing import Any

from cl_dist.errors import ConfigError
from cl_dist.ledger import sha256
from cl_dist.models.config import ModelConfig, absent, is_local
from cl_dist.paths import resolve
from cl_dist.stage import digest_of

ON_HUB = "@"
"""Separates name and commit of a hub model, which replace the digest."""


def model_facts(model: ModelConfig) -> dict[str, Any]:
    """Return the fingerprint inputs of a backbone.

    Raises:
        ConfigError: If a folder has no weights.
        DataError: If the folder does not exist.
    """
    used = {name: value for name, value in model.changed().items() if name not in ("source", "revision")}
    return used | {"digest": model_digest(model.source, model.revision, model.config is not None)}


@lru_cache(maxsize=8)
def model_digest(source: str, revision: str | None, drawn: bool = False) -> str:
    """Return the digest of a backbone's files, or the name and commit of a hub model.

    Args:
        source: A folder, a gguf file, or a name on the hub.
        revision: The commit of a hub model.
        drawn: Whether the weights are random, so that only the tokenizer's files count.

    Raises:
        ConfigError: If a folder has no weights.
        DataError: If the folder does not exist.
    """
    if not is_local(source):
        return f"{source}{ON_HUB}{revision}"
    folder = resolve(source)
    try:
        if folder.suffix == ".gguf" and folder.is_file():
            return sha256(folder)
        if not folder.is_dir():
            raise absent(source)
        patterns = ("tokenizer*", "vocab*", *(() if drawn else ("config.json", "*.safetensors")))
        files = [p for p in folder.iterdir() if any(p.match(pattern) for pattern in patterns)]
        if not drawn and not any(p.suffix == ".safetensors" for p in files):
            raise ConfigError(f"science.model.source={source!r}: expected a folder with config.json and *.safetensors")
        return digest_of({p.name: sha256(p) for p in sorted(files)})
    except PermissionError as error:
        raise ConfigError(f"science.model.source={source!r}: {error}; make it readable for this user") from error
