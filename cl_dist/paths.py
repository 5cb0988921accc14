"""Paths in the run file: plain paths, and files inside installed packages."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from cl_dist.errors import DataError

PREFIX = "package:"
MAX_NAME, MAX_PATH = 255, 3000
"""Limits in bytes: a file name on Linux; a path, 4095 less the part that a run adds below its folder."""


def _checked(path: str) -> str:
    if "\0" in path:
        raise ValueError("contains a zero byte, which a path cannot have")
    try:
        os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the file name encoding {error.encoding} cannot encode {path[error.start]!a}; set LC_ALL=C.UTF-8"
        ) from None
    if len(os.fsencode(path)) > MAX_PATH or any(len(os.fsencode(name)) > MAX_NAME for name in path.split("/")):
        raise ValueError(f"is too long: at most {MAX_PATH} bytes, and {MAX_NAME} between two slashes")
    return path


ConfigPath = Annotated[str, AfterValidator(_checked)]
"""A path in the run file, which need not exist, or a name on a hub."""


def resolve(path: str) -> Path:
    """Return the file system path of a path in the run file; it need not exist.

    Expands `~`; a relative path starts at the working directory. `package:NAME/inner/path` is a path in the folder of
    an installed package, which is located but never imported: an import may be slow or have missing dependencies.

    Raises:
        DataError: If the package is not installed, the inner path is empty or leaves the package's folder, or the user
            of `~` does not exist.
    """
    if not path.startswith(PREFIX):
        return home(path)
    name, _, inner = path.removeprefix(PREFIX).partition("/")
    if not name.isidentifier() or not inner:
        raise DataError(f"{path}: expected package:NAME/inner/path with the top-level name of a package")
    try:
        spec = find_spec(name)  # imports nothing, since the name has no dots
    except ValueError:  # a module created in code, without a spec
        spec = None
    if spec is None:
        raise DataError(f"{path}: package {name!r} is not installed; try pip install {name}")
    folders = [os.path.abspath(folder) for folder in spec.submodule_search_locations or ()]
    if not folders:
        raise DataError(f"{path}: {name!r} is a single module and has no folder with files")
    paths = [os.path.normpath(os.path.join(folder, inner)) for folder in folders]
    # Compared as text: some installers symlink a package's files into a cache.
    if any(not path.startswith(folder + os.sep) for path, folder in zip(paths, folders, strict=True)):
        raise DataError(f"{path}: leaves the folder of package {name!r}; expected a path inside it")
    return next((Path(path) for path in paths if os.path.exists(path)), Path(paths[0]))


def home(path: str) -> Path:
    """Return a path with `~` expanded.

    Raises:
        DataError: If the user does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise DataError(f"{path}: this user does not exist on this machine; write the full path") from None
