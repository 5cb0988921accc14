"""Storage of a run: the lock that admits one driver, node resources, and errors with a remedy."""

import errno
import fcntl
import os
import platform
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cl_dist.errors import RunInUseError, StorageError

LOCK = "driver.lock"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FREE_SPACE = "Free space, or remove runs that are not needed"
_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class NodeResources:
    """Disk, shared memory and file limits of a machine."""

    free_gb: float = 0.0
    """Free disk space where the run folder is or will be."""
    shm_gb: float = 0.0
    """Size of /dev/shm, which Ray uses for objects and processes for shared memory."""
    open_files: int = 0
    """Limit of open files per process."""


def existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def room(folder: Path) -> NodeResources:
    """Return the resources of this machine for a run in an absolute folder."""
    shm = shutil.disk_usage(_SHM).total if _SHM.is_dir() else 0
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return NodeResources(free_gb=shutil.disk_usage(existing(folder)).free / 1e9, shm_gb=shm / 1e9, open_files=files)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock a run folder for the duration of the context; the lock ends with the process, however it ends.

    Raises:
        RunInUseError: If another driver has the lock.
        StorageError: If the folder cannot be written or locked.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)  # truncated below, so never follow a link
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = path.read_text(encoding="utf8").strip() or "another process"
            raise RunInUseError(
                f"{folder}: {holder} is working on this run; wait for it or stop it, then `cl-dist resume {folder}`"
            ) from error
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be locked: {error}. A run needs a file system with locks, which exclude a second "
                "driver: mount this one with locks, or move the run folder elsewhere and resume it there; for a new "
                "run set run.dir=..."
            ) from error
        try:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
        except OSError as error:
            raise _unwritable(folder, error) from error
        yield
    finally:
        os.close(handle)


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Convert every file system error of the context, which writes a folder, to a StorageError with a remedy.

    Raises:
        StorageError: Instead of such an error.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(error.filename or folder, error) from error


@contextmanager
def storage_errors(folder: Path | str) -> Iterator[None]:
    """Convert errors of a full or read-only disk, and denied access inside the folder, to a StorageError.

    Raises:
        StorageError: Instead of such an error.
    """
    try:
        yield
    except StorageError:  # already has a remedy
        raise
    except Exception as error:
        where = getattr(error, "filename", None)
        # A PermissionError outside the folder concerns an input, such as rows or a backbone.
        is_inside = where is not None and Path(str(where)).absolute().is_relative_to(Path(folder).absolute())
        if _is(error, *_FULL, errno.EROFS) or (is_inside and isinstance(error, PermissionError)):
            raise _unwritable(where or folder, error) from error
        raise


def _is(error: Exception, *numbers: int) -> bool:
    # safetensors has the errno in the message only: "... (os error 28)"
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


def refused(error: BaseException) -> StorageError | None:
    """Return a StorageError with a remedy for an unhandled file system error; None for other errors."""
    if not isinstance(error, OSError):
        return None
    is_without_tmp = "No usable temporary directory" in str(error)  # tempfile's message; its errno is ENOENT
    if not is_without_tmp and error.errno not in (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM):
        return None
    remedy = _FREE_SPACE if error.errno in _FULL else "Give this user read and write access, or choose another path"
    return StorageError(f"{error.filename or 'an unnamed file'}: {error.strerror}. {remedy}.")


def _unwritable(where: Path | str, error: Exception) -> StorageError:
    remedy = (
        "Make it writable, or move the run folder to a writable location and resume it there; for a new run set "
        "run.dir=..."
    )
    if _is(error, *_FULL):
        remedy = f"{_FREE_SPACE}; then `cl-dist resume` continues"
    return StorageError(f"{where}: cannot be written: {error}. {remedy}. Finished stages are kept.")
