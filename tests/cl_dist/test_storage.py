"""What a run folder that cannot be held or written says, and what is no fault of the folder."""

import errno
import os
from pathlib import Path

import pytest

from cl_dist.errors import RunInUseError, StorageError
from cl_dist.storage import LOCK, run_lock, storage_errors

ROOM, PLACE = "Free space, or remove runs", "Make it writable, or move the run folder"


def hold(folder: Path) -> None:
    with run_lock(folder):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_file_system_without_locks_is_not_taken_for_another_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(StorageError, match=rf"{tmp_path}: cannot be locked: .*{os.strerror(number)}.*run\.dir="):
        hold(tmp_path)


def test_another_driver_is_named(tmp_path: Path) -> None:
    with run_lock(tmp_path), pytest.raises(RunInUseError, match=f"process {os.getpid()} on .* is working on this run"):
        hold(tmp_path)


@pytest.mark.parametrize("name", ["file/run", "x" * 300, "/proc/nope/run"])
def test_a_run_folder_that_cannot_be_made_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"{tmp_path / name}: cannot be written.*{PLACE}") as caught:
        hold(tmp_path / name)
    assert caught.value.exit_code == 6


@pytest.mark.parametrize(
    ("call", "number", "remedy"),
    [
        ("open", errno.EROFS, PLACE),
        ("open", errno.EACCES, PLACE),
        ("open", errno.EPERM, PLACE),
        ("open", errno.ENOSPC, ROOM),
        ("write", errno.ENOSPC, ROOM),
        ("write", errno.EIO, PLACE),
    ],
)
def test_a_lock_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, remedy: str
) -> None:
    def refused(*args: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refused)
        with pytest.raises(StorageError, match=f"{tmp_path}: cannot be written: .*{remedy}"):
            hold(tmp_path)
    hold(tmp_path)


def test_a_lock_that_is_a_link_does_not_empty_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    (tmp_path / LOCK).symlink_to(tmp_path / "notes")
    with pytest.raises(StorageError, match=LOCK):
        hold(tmp_path)
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "name", "remedy"),
    [
        (errno.ENOSPC, "run/x", ROOM),
        (errno.EDQUOT, None, ROOM),
        (errno.EROFS, "run/x", PLACE),
        (errno.EACCES, "run/x", PLACE),
        (errno.EPERM, "run/x", PLACE),
        (errno.EACCES, "rows.jsonl", None),  # which is only read
        (errno.EPERM, None, None),  # of a signal, or a socket
        (errno.ENOENT, "run/x", None),
    ],
)
def test_what_cannot_be_written_in_a_run_folder_comes_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, name: str | None, remedy: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    error = OSError(number, os.strerror(number), *([] if name is None else [str(tmp_path / name)]))
    told = pytest.raises(type(error)) if remedy is None else pytest.raises(StorageError, match=remedy)
    with told as caught, storage_errors(Path("run")):
        raise error
    if remedy is None:
        assert caught.value is error
    else:
        assert str(caught.value).startswith(f"{tmp_path / name if name else 'run'}: cannot be written")
