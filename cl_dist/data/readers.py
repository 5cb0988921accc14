"""Readers of other packages: functions that yield the rows of a source."""

from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from cl_dist.config import did_you_mean
from cl_dist.errors import DataError

GROUP = "cl_dist.sources"
"""Entry-point group in which another package names its readers."""


def read_with(name: str, path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows that a reader finds at a path.

    Args:
        name: `package.module:FUNCTION`, or the name of an entry point.
        path: `source.path` of the run file, as it is written there.

    Raises:
        DataError: If the reader cannot be imported, fails, or yields something other than mappings with text keys.
    """
    try:
        for number, values in enumerate(_reader(name)(path)):
            if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
                raise DataError(
                    f"reader {name!r}: row {number} is a {type(values).__name__}; expected a mapping of column names "
                    "to values"
                )
            yield dict(values)
    except DataError:
        raise
    except Exception as error:  # code of another package: any error is a fault of the source
        raise DataError(f"reader {name!r} failed: {type(error).__name__}: {error}") from error


def _reader(name: str) -> Any:
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise DataError(
                f"reader {name!r}: no module {error.name!r} on this machine; install its package, or put its folder on "
                "PYTHONPATH"
            ) from None
        except AttributeError:
            raise DataError(f"reader {name!r}: {module} has no {attribute!r}") from None
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        hint = did_you_mean(name, list(found))
        raise DataError(f"reader {name!r}: no entry point of this name in group {GROUP!r}{hint}")
    return found[name].load()
