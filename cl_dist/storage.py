"""What a run needs of its storage: one driver at a time, and an error that says so when it cannot be written."""

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
_ROOM = "Make room, or remove runs that are not needed"
_SHM = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class NodeResources:
    """What a machine has for a run."""

    free_gb: float = 0.0
    """Where the run folder is, or will be."""
    shm_gb: float = 0.0
    """Size of /dev/shm, where Ray keeps objects and processes share memory."""
    open_files: int = 0
    """How many files a process may hold open."""


def existing(folder: Path) -> Path:
    """Return the nearest folder above that exists, or the folder itself."""
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def room(folder: Path) -> NodeResources:
    """Return what this machine has for a run in an absolute folder."""
    shm = shutil.disk_usage(_SHM).total if _SHM.is_dir() else 0
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return NodeResources(free_gb=shutil.disk_usage(existing(folder)).free / 1e9, shm_gb=shm / 1e9, open_files=files)


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a run folder for as long as the block runs; the lock ends with the process, however it ends.

    Raises:
        RunInUseError: If another driver holds it.
        StorageError: If it cannot be written or locked.
    """
    path = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)  # it is emptied below: no link to a file
    except OSError as error:
        raise _unwritable(folder, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = path.read_text(encoding="utf8").strip() or "another process"
            raise RunInUseError(
                f"{folder}: {holder} is at work on this run; wait for it or stop it, then `cl-dist resume {folder}`"
            ) from error
        except OSError as error:
            raise StorageError(
                f"{folder}: cannot be locked: {error}. A run needs a file system with locks, which keep a second "
                "driver out: mount this one with locks, or move the run folder to another place and resume it there; "
                "a new run takes another place with run.dir=..."
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
    """Turn any error of the file system, while a folder is written, into what to do.

    Raises:
        StorageError: Instead of such an error.
    """
    try:
        yield
    except OSError as error:
        raise _unwritable(error.filename or folder, error) from error


@contextmanager
def storage_errors(folder: Path | str) -> Iterator[None]:
    """Turn an error of a full or read-only disk, or of a file in the folder that is another user's, into what to do.

    Raises:
        StorageError: Instead of such an error.
    """
    try:
        yield
    except StorageError:  # what to do has been said
        raise
    except Exception as error:
        where = getattr(error, "filename", None)
        # A refusal elsewhere is that of something to be read, such as rows or a backbone.
        is_inside = where is not None and Path(str(where)).absolute().is_relative_to(Path(folder).absolute())
        if _is(error, *_FULL, errno.EROFS) or (is_inside and isinstance(error, PermissionError)):
            raise _unwritable(where or folder, error) from error
        raise


def _is(error: Exception, *numbers: int) -> bool:
    # safetensors makes text of the system's error: "... (os error 28)"
    return getattr(error, "errno", None) in numbers or any(f"(os error {number})" in str(error) for number in numbers)


def refused(error: BaseException) -> StorageError | None:
    """Return what to do about a refusal of the file system that nothing else has told of; None for other errors."""
    if not isinstance(error, OSError):
        return None
    is_without_tmp = "No usable temporary directory" in str(error)  # Python's words where none can be written
    if not is_without_tmp and error.errno not in (*_FULL, errno.EROFS, errno.EACCES, errno.EPERM):
        return None
    remedy = _ROOM if error.errno in _FULL else "Let this user read and write it, or name another place"
    return StorageError(f"{error.filename or 'a file that could not be named'}: {error.strerror}. {remedy}.")


def _unwritable(where: Path | str, error: Exception) -> StorageError:
    remedy = (
        "Make it writable, or move the run folder to a place that is and resume it there; a new run takes another "
        "place with run.dir=..."
    )
    if _is(error, *_FULL):
        remedy = f"{_ROOM}; then `cl-dist resume` goes on"
    return StorageError(f"{where}: cannot be written: {error}. {remedy}. Finished stages are kept.")
