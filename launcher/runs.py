"""Run files by path or recipe name."""

from importlib.resources import files
from pathlib import Path

from cl_dist.config import did_you_mean
from cl_dist.errors import ConfigError
from cl_dist.run_config import RunConfig, read_run_file

RECIPES = files("launcher") / "recipes"


def recipes() -> dict[str, Path]:
    """Return the run files that come with the package, by name."""
    return {
        Path(str(entry)).stem: Path(str(entry))
        for entry in sorted(RECIPES.iterdir(), key=str)
        if entry.name.endswith(".yaml")
    }


def run_file(name: str) -> Path:
    """Return the run file of a path or recipe name.

    Raises:
        ConfigError: If it is neither.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipes()
    if name not in known:
        raise ConfigError(
            f"CONFIG={name!r}: expected a run file or the name of a recipe{did_you_mean(name, list(known))}"
        )
    return known[name]


def read(name: str, overrides: list[str] | None) -> RunConfig:
    """Read the run file of a path or recipe name, and apply overrides."""
    return read_run_file(run_file(name), overrides or [])
