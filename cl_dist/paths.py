"""Where a path of the run file leads: a plain path, or a file inside an installed package."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from cl_dist.errors import DataError

PREFIX = "package:"
MAX_NAME, MAX_PATH = 255, 3000
"""Bytes of the longest name that Linux takes, and of the longest path: 4095, less what a run puts below its folder."""


def _checked(path: str) -> str:
    if "\0" in path:
        raise ValueError("holds a zero byte, which no path has")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"this locale's encoding of file names, {error.encoding}, has no {path[error.start]!a}; set LC_ALL=C.UTF-8"
        ) from None
    if len(os.fsencode(path)) > MAX_PATH or any(len(os.fsencode(name)) > MAX_NAME for name in path.split("/")):
        raise ValueError(f"is longer than a path can be: {MAX_PATH} bytes, {MAX_NAME} between two slashes")
    return path


Place = Annotated[str, AfterValidator(_checked)]
"""A path of the run file, which need not be there, or a name on a hub."""


def resolve(path: str) -> Path:
    """Return the place that a path of the run file names; a plain file there need not exist.

    `~` is expanded and a relative path starts at the working directory. `package:NAME/inner/path` lies in the
    folder of an installed package, which is found but never imported: an import may be slow, or need what is
    not installed.

    Raises:
        DataError: If the package is not installed, or the inner path is empty or leaves the package's folder, or there
            is no such user behind `~`.
    """
    if not path.startswith(PREFIX):
        return home(path)
    name, _, inner = path.removeprefix(PREFIX).partition("/")
    if not name.isidentifier() or not inner:
        raise DataError(f"{path}: expected package:NAME/inner/path with the top-level name of a package")
    try:
        spec = find_spec(name)  # of a name without dots, so that nothing is imported
    except ValueError:  # a module that was made by hand and has no spec
        spec = None
    if spec is None:
        raise DataError(f"{path}: package {name!r} is not installed; try pip install {name}")
    folders = [os.path.abspath(folder) for folder in spec.submodule_search_locations or ()]
    if not folders:
        raise DataError(f"{path}: {name!r} is a single module and has no folder with files")
    places = [os.path.normpath(os.path.join(folder, inner)) for folder in folders]
    # Compared as text, since installers may make a package's files symbolic links into a cache.
    if any(not place.startswith(folder + os.sep) for place, folder in zip(places, folders, strict=True)):
        raise DataError(f"{path}: leaves the folder of package {name!r}; expected a path inside it")
    return next((Path(place) for place in places if os.path.exists(place)), Path(places[0]))


def home(path: str) -> Path:
    """Return a path with `~` expanded.

    Raises:
        DataError: If there is no such user behind `~`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path}: there is no such user on this machine; write the whole path") from None
