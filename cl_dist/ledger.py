"""The run folder: which stages are done, with which settings, and how a result becomes real by one rename."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cl_dist.errors import CheckpointError, OrderError, StageConflictError
from cl_dist.stage import Stage, StageRef, digest_of, ref

Facts = Mapping[str, Any]
MANIFEST = "manifest.json"
UNFINISHED = ("checkpoints", "shards")
"""Folders of a stage that is under way, which the next attempt goes on from."""


class Ledger:
    """The stages of one run.

    facts_of names everything that decides a stage's result as flat plain data; its digest is the stage's fingerprint.
    A stage is done when its folder holds a manifest, which is written last and appears by one rename of the folder.
    """

    def __init__(self, folder: Path, task_ids: Sequence[str], facts_of: Callable[[Stage], Facts]) -> None:
        self.folder = folder
        self._task_ids, self._facts_of = task_ids, facts_of
        self._verified: dict[Path, tuple[Any, ...]] = {}
        self._read: dict[Path, tuple[Any, Any]] = {}

    def key(self, stage: StageRef) -> str:
        """Return the name of a stage as people see it, such as '02-laptop/train'."""
        return f"{stage.task:02d}-{self._task_ids[stage.task]}/{stage.stage}"

    def path(self, stage: StageRef) -> Path:
        """Return the folder of a finished stage."""
        return self.folder / "stages" / self.key(stage)

    def fingerprint(self, stage: Stage) -> str:
        """Return the digest of the stage's facts."""
        return digest_of(dict(self._facts_of(stage)))

    def manifest(self, stage: StageRef) -> dict[str, Any] | None:
        """Return the manifest of a finished stage, or None.

        Raises:
            CheckpointError: If it is there but damaged or cannot be read, or if its folder is a link.
        """
        path = self.path(stage) / MANIFEST
        try:
            refuse_links((path.parent.parent, path.parent))
            manifest: dict[str, Any] = self._parsed(path, parse_manifest)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error}; mend or remove the folder {path.parent}, or move the run "
                "folder to another place and resume it there"
            ) from error
        except ValueError as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); remove the folder {path.parent} to compute the stage again"
            ) from None
        return manifest

    def is_done(self, stage: Stage) -> bool:
        """Return whether the stage has a result made with these settings.

        Raises:
            StageConflictError: If it has one made with others; the message names the keys that differ.
        """
        manifest = self.manifest(ref(stage))
        if manifest is None:
            return False
        facts = dict(self._facts_of(stage))
        if manifest["fingerprint"] == digest_of(facts):
            return True
        old = manifest["facts"]
        absent = "(default)"
        changed = {
            key: (old.get(key, absent), facts.get(key, absent))
            for key in sorted(old.keys() | facts.keys())
            if old.get(key, absent) != facts.get(key, absent)
        }
        raise StageConflictError(self.key(ref(stage)), changed)

    @contextmanager
    def publish(self, stage: Stage) -> Iterator[Path]:
        """Yield a folder to write a stage's result to; on success it becomes the stage's folder.

        Its name carries the fingerprint, so what was begun with other settings is never gone on with. Of what an
        earlier attempt with the same settings left, `UNFINISHED` stays until the stage is done.

        Raises:
            CheckpointError: If there is a link where the stage's own files and folders belong.
        """
        final, facts = self.path(ref(stage)), dict(self._facts_of(stage))
        refuse_links(_places(final))
        fingerprint = digest_of(facts)
        partial = _partial(final, fingerprint)
        partial.mkdir(parents=True, exist_ok=True)
        stale = [path for path in final.parent.glob(f"{final.name}.partial-*") if path != partial]
        for path in (*stale, *(path for path in partial.iterdir() if path.name not in UNFINISHED)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        started, clock = datetime.now(UTC), time.monotonic()
        yield partial
        files = {str(path.relative_to(partial)): path for path in sorted(partial.rglob("*")) if path.is_file()}
        manifest = {
            "stage": stage.model_dump(mode="json"),
            "fingerprint": fingerprint,
            "facts": facts,
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - clock, 3),
            "files": {name: synced(path) for name, path in files.items() if name.split("/")[0] not in UNFINISHED},
        }
        write_json(partial / MANIFEST, manifest)
        self._move(partial, final)

    def rescue(self, stage: Stage) -> bool:
        """Publish what an earlier attempt had finished but for the last rename; return whether there was something.

        Raises:
            CheckpointError: If there is a link where the stage's own files and folders belong.
        """
        final, fingerprint = self.path(ref(stage)), self.fingerprint(stage)
        refuse_links(_places(final))
        partial = _partial(final, fingerprint)
        try:
            manifest = self._parsed(partial / MANIFEST, parse_manifest)
            whole = all(sha256(partial / name) == digest for name, digest in manifest["files"].items())
        except (OSError, ValueError):
            return False
        if not whole or manifest["fingerprint"] != fingerprint:
            return False
        self._move(partial, final)
        return True

    @staticmethod
    def _move(partial: Path, final: Path) -> None:
        for name in UNFINISHED:
            shutil.rmtree(partial / name, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # a folder without a manifest is not a result
        partial.rename(final)
        sync_folder(final.parent)

    def verify(self, stage: StageRef, suffix: str = "") -> None:
        """Compare the files of a finished stage, or those of some ending, with its manifest.

        A file that has not changed since it was last compared is not read again.

        Raises:
            CheckpointError: If the stage is not there, or a file is missing or damaged.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            raise CheckpointError(f"{self.key(stage)} has not been computed; `cl-dist resume` computes what is missing")
        for name, digest in manifest["files"].items():
            if not name.endswith(suffix):
                continue
            path = self.path(stage) / name
            try:
                is_whole = self._is_whole(path, digest)
            except OSError:
                is_whole = False
            if not is_whole:
                raise CheckpointError(
                    f"{path}: missing or damaged; remove the folder {path.parent} and resume: it is not the file that "
                    "its manifest names"
                )

    def check_order(self) -> None:
        """Compare the tasks of finished stages with the sequence.

        Raises:
            OrderError: If one is missing from it, or stands elsewhere.
        """
        names = [f"{number:02d}-{task}" for number, task in enumerate(self._task_ids)]
        finished = {path.parent.parent.name for path in (self.folder / "stages").glob(f"*/*/{MANIFEST}")}
        if gone := sorted(finished - set(names)):
            raise OrderError(
                f"{self.folder}: {', '.join(gone)} is finished, but the tasks are now {', '.join(names)}. What was "
                "learned later rests on it: finished tasks keep their places, new ones are appended. For another order "
                "start a new run with run.name=..."
            )

    def read(self, stage: StageRef, name: str) -> Any:
        """Return a JSON file of a finished stage, checked against the digest in its manifest.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        manifest, path = self.manifest(stage), self.path(stage) / name
        if manifest is None:
            raise CheckpointError(f"{self.key(stage)} has not been computed; `cl-dist resume` computes what is missing")
        if not path.exists() or not self._is_whole(path, manifest["files"].get(name)):
            raise CheckpointError(f"{path}: missing or damaged; remove the folder {path.parent.name!r} and resume")
        return self._parsed(path)

    def _parsed(self, path: Path, parse: Callable[[str], Any] = json.loads) -> Any:
        """Return what a JSON file holds, read again only if the file has changed; not to be altered."""
        facts = path.stat()
        state = facts.st_size, facts.st_mtime_ns, facts.st_ino
        if self._read.get(path, (None, None))[0] != state:
            self._read[path] = state, parse(path.read_text(encoding="utf8"))
        return self._read[path][1]

    def _is_whole(self, path: Path, digest: str | None) -> bool:
        """Return whether a file has the digest of its manifest; one that has not changed since is not read again."""
        facts = path.stat()
        state = facts.st_size, facts.st_mtime_ns, facts.st_ino, digest
        if self._verified.get(path) != state:
            if sha256(path) != digest:
                return False
            self._verified[path] = state
        return True


def _partial(final: Path, fingerprint: str) -> Path:
    """Return where a stage is computed before its folder gets its name."""
    return final.with_name(f"{final.name}.partial-{fingerprint[:12]}")


def _places(final: Path) -> Iterator[Path]:
    """Yield where a stage is or has been begun, from the outside inwards, so that a link comes before what it hides."""
    yield from (final.parent, final)
    for partial in final.parent.glob(f"{final.name}.partial-*"):
        yield partial
        yield from partial.rglob("*")


def refuse_links(places: Iterable[Path]) -> None:
    """Refuse a link among places that a run writes to and removes: what lies behind it is not the run's own.

    Raises:
        CheckpointError: If there is one.
    """
    for path in places:
        if path.is_symlink():
            raise CheckpointError(
                f"{path}: a link, where a run keeps its own files; remove the link (not what it points to) and resume: "
                "what is missing is computed again"
            )


def is_inside(name: str) -> bool:
    """Return whether a name with slashes stays inside of the folder it is joined to, wherever it came from."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def parse_manifest(text: str) -> dict[str, Any]:
    """Return what a manifest holds, once all that is read of one is there and its facts have its fingerprint.

    Raises:
        ValueError: If it is not like that.
    """
    try:
        manifest: dict[str, Any] = json.loads(text)
        datetime.fromisoformat(manifest["started"])
        right = {
            "stage": isinstance(manifest["stage"], dict) and isinstance(manifest["stage"]["kind"], str),
            "facts": isinstance(manifest["facts"], dict),
            "seconds": isinstance(manifest["seconds"], float) and math.isfinite(manifest["seconds"]),
            "files": all(is_inside(name) and isinstance(digest, str) for name, digest in manifest["files"].items()),
        }
        is_whole = digest_of(manifest["facts"]) == manifest["fingerprint"]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a manifest: {type(error).__name__}: {error}") from None
    if wrong := [name for name, is_right in right.items() if not is_right]:
        raise ValueError(f"not what belongs there: {', '.join(wrong)}")
    if not is_whole:
        raise ValueError("its fingerprint is not that of its facts")
    return manifest


def sha256(path: Path) -> str:
    """Return the digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synced(path: Path) -> str:
    """Make a file durable, and return its digest."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Make a rename inside a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
