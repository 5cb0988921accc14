"""Where a path of the run file leads: a plain path, or a file inside an installed package."""

import os
from importlib.util import find_spec
from pathlib import Path

from cl_dist.errors import DataError

PREFIX = "package:"


def resolve(path: str) -> Path:
    """Return the place that a path of the run file names; a plain file there need not exist.

    `~` is expanded and a relative path starts at the working directory. `package:NAME/inner/path` lies in the
    folder of an installed package, which is found but never imported: an import may be slow, or need what is
    not installed.

    Raises:
        DataError: If the package is not installed, or the inner path is empty or leaves the package's folder.
    """
    if not path.startswith(PREFIX):
        return Path(path).expanduser()
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
