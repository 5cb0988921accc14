"""Lookup of methods by name: those of this package, entry points of other packages, and 'package.module:METHOD'."""

from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from cl_dist.config import did_you_mean
from cl_dist.errors import ConfigError
from cl_dist.methods import ctr, ewc, finetune, hat, houlsby, lamol, lifelong_embedding, lora, rational_lamol, replay
from cl_dist.methods.base import Capabilities, Method, MethodConfig
from cl_dist.models.config import ModelConfig

GROUP = "cl_dist.methods"
"""Entry-point group in which another package names its methods."""
METHODS: dict[str, Method] = {
    "ctr": ctr.METHOD,
    "lamol": lamol.LAMOL,
    "lamol_real": lamol.LAMOL_REAL,
    "rational_lamol": rational_lamol.METHOD,
    "hat": hat.METHOD,
    "adapter": houlsby.METHOD,
    "lora": lora.METHOD,
    "ewc": ewc.METHOD,
    "replay": replay.METHOD,
    "lifelong_embedding": lifelong_embedding.METHOD,
    "sequential": finetune.SEQUENTIAL,
    "individual": finetune.INDIVIDUAL,
    "joint": finetune.JOINT,
}
"""The methods of this package. Use `get_method` to look one up by the name in a run file."""


def get_method(name: str) -> Method:
    """Return the method that `method.name` of a run file names.

    Raises:
        ConfigError: If there is no such method, or it cannot be imported.
    """
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        return _imported(name)
    found = installed()
    if name in found:
        return _loaded(found[name])
    hint = did_you_mean(name, [*METHODS, *found])
    other = "" if hint.endswith("?") else ", or 'package.module:METHOD' of another package"
    raise ConfigError(f"name={name!r} is not a method{hint}{other}")


def method_config(name: str, settings: object) -> MethodConfig:
    """Return a method's settings.

    Raises:
        ConfigError: If there is no such method, or its settings class gives it another name.
        pydantic.ValidationError: If the settings do not fit.
    """
    config = get_method(name).config.model_validate(settings)
    if config.name != name:
        raise ConfigError(
            f"name={name!r}: the settings class {type(config).__name__} changes the name to {config.name!r}; it has to "
            "keep the name of the run file: leave `name` as MethodConfig declares it"
        )
    return config


def descriptions() -> dict[str, str]:
    """Return one line about each method of this package and of installed ones."""
    found = {name: method.about for name, method in METHODS.items()}
    for name, point in installed().items():
        try:
            found[name] = _loaded(point).about
        except ConfigError as error:
            found[name] = f"cannot be loaded: {error}"
    return found


def capabilities_of(config: MethodConfig, model: ModelConfig, learner: str | None = None) -> Capabilities:
    """Return the capabilities of the learner that a run uses, or of another one that a stage names."""
    return get_method(config.name).capabilities_of(config, model, learner)


def installed() -> dict[str, EntryPoint]:
    """Return the entry points of installed packages by name; a name of this package cannot be taken."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in METHODS}


@lru_cache
def _imported(name: str) -> Method:
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"name={name!r}: no module {error.name!r} on this machine; install its package, or put its folder on "
            "PYTHONPATH, on every machine of the run"
        ) from None
    except AttributeError as error:
        raise ConfigError(f"name={name!r}: {error}; expected 'package.module:METHOD'") from None
    except Exception as error:
        raise ConfigError(f"name={name!r}: importing {module!r} failed: {type(error).__name__}: {error}") from error
    return _checked(name, found)


def _loaded(point: EntryPoint) -> Method:
    try:
        found = point.load()
    except Exception as error:
        raise ConfigError(
            f"name={point.name!r}: the entry point {point.value!r} of group {GROUP!r} cannot be loaded: "
            f"{type(error).__name__}: {error}"
        ) from error
    return _checked(point.name, found)


def _checked(name: str, found: object) -> Method:
    if not isinstance(found, Method):
        raise ConfigError(
            f"name={name!r}: this is a {type(found).__name__}; expected an instance of cl_dist.methods.base.Method"
        )
    return found
