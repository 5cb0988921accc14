"""Ledger of a run folder: finished stages, their settings and fingerprints, published by one atomic rename."""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cl_dist.errors import CheckpointError, OrderError, StageConflictError
from cl_dist.stage import Stage, StageRef, digest_of, ref

Facts = Mapping[str, Any]
MANIFEST = "manifest.json"
UNFINISHED = ("checkpoints", "shards")
"""Folders of an unfinished stage, from which the next attempt resumes."""


class Ledger:
    """The stages of one run.

    facts_of returns the fingerprint inputs of a stage, everything that decides its result, as flat plain data. A stage
    is done when its folder contains a manifest, which is written last and appears by one rename of the folder.
    """

    def __init__(self, folder: Path, task_ids: Sequence[str], facts_of: Callable[[Stage], Facts]) -> None:
        self.folder = folder
        self._task_ids, self._facts_of = task_ids, facts_of
        self._verified: dict[Path, tuple[Any, ...]] = {}
        self._read: dict[Path, tuple[Any, Any]] = {}

    def key(self, stage: StageRef) -> str:
        """Return the display name of a stage, such as '02-laptop/train'."""
        return f"{stage.task:02d}-{self._task_ids[stage.task]}/{stage.stage}"

    def path(self, stage: StageRef) -> Path:
        """Return the folder of a finished stage."""
        return self.folder / "stages" / self.key(stage)

    def fingerprint(self, stage: Stage) -> str:
        """Return the digest of the stage's fingerprint inputs."""
        return digest_of(dict(self._facts_of(stage)))

    def manifest(self, stage: StageRef) -> dict[str, Any] | None:
        """Return the manifest of a finished stage, or None.

        Raises:
            CheckpointError: If it is damaged or cannot be read, or if its folder is a symbolic link.
        """
        path = self.path(stage) / MANIFEST
        try:
            refuse_links((path.parent.parent, path.parent))
            manifest: dict[str, Any] = self._parsed(path, parse_manifest)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(
                f"{path}: cannot be read: {error}; repair or remove the folder {path.parent}, or move the run "
                "folder elsewhere and resume it there"
            ) from error
        except ValueError as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); remove the folder {path.parent} to compute the stage again"
            ) from None
        return manifest

    def is_done(self, stage: Stage) -> bool:
        """Return whether the stage has a result for the current settings.

        Raises:
            StageConflictError: If it has one for other settings; the message lists the keys that differ.
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
        """Yield a folder for a stage's result; on success it becomes the stage's folder.

        Its name contains the fingerprint, so an attempt resumes only from one with the same settings: the folders
        `UNFINISHED` of an earlier attempt stay until the stage is done, its other files are removed.

        Raises:
            CheckpointError: If one of the stage's files or folders is a symbolic link.
        """
        final, facts = self.path(ref(stage)), dict(self._facts_of(stage))
        refuse_links(_stage_paths(final))
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
        """Publish a result that an earlier attempt completed except for the rename; return whether one was found.

        Raises:
            CheckpointError: If one of the stage's files or folders is a symbolic link.
        """
        final, fingerprint = self.path(ref(stage)), self.fingerprint(stage)
        refuse_links(_stage_paths(final))
        partial = _partial(final, fingerprint)
        try:
            manifest = self._parsed(partial / MANIFEST, parse_manifest)
            is_intact = all(sha256(partial / name) == digest for name, digest in manifest["files"].items())
        except (OSError, ValueError):
            return False
        if not is_intact or manifest["fingerprint"] != fingerprint:
            return False
        self._move(partial, final)
        return True

    def adopt(self, stage: Stage, folder: Path) -> bool:
        """Publish a finished stage of another run as the result of a stage with the same fingerprint.

        Its files become hard links, or copies on another file system, and are compared with their digests.

        Args:
            stage: The stage that has no result.
            folder: Folder of the other run's finished stage.

        Returns:
            False if the other stage has another fingerprint, or is missing or damaged.

        Raises:
            CheckpointError: If one of the stage's files or folders is a symbolic link.
        """
        final, fingerprint = self.path(ref(stage)), self.fingerprint(stage)
        refuse_links(_stage_paths(final))
        try:
            manifest = self._parsed(folder / MANIFEST, parse_manifest)
        except (OSError, ValueError):
            return False
        if manifest["fingerprint"] != fingerprint:
            return False
        partial, names = _partial(final, fingerprint), (*manifest["files"], MANIFEST)
        with suppress(FileNotFoundError):
            for name in names:
                link(folder / name, partial / name)
            if self.rescue(stage):
                return True
        for name in names:  # or the stage, when it is computed, would write into the other run's files
            (partial / name).unlink(missing_ok=True)
        return False

    @staticmethod
    def _move(partial: Path, final: Path) -> None:
        for name in UNFINISHED:
            shutil.rmtree(partial / name, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)  # a folder without a manifest is not a result
        partial.rename(final)
        sync_folder(final.parent)

    def verify(self, stage: StageRef, suffix: str = "") -> None:
        """Compare the files of a finished stage, all or those with a suffix, with its manifest.

        Files that have not changed since the last comparison are not read again.

        Raises:
            CheckpointError: If the stage is not finished, or a file is missing or damaged.
        """
        manifest = self.manifest(stage)
        if manifest is None:
            raise CheckpointError(f"{self.key(stage)} has not been computed; `cl-dist resume` computes what is missing")
        for name, digest in manifest["files"].items():
            if not name.endswith(suffix):
                continue
            path = self.path(stage) / name
            try:
                is_intact = self._is_intact(path, digest)
            except OSError:
                is_intact = False
            if not is_intact:
                raise CheckpointError(
                    f"{path}: missing or damaged: it does not match its manifest; remove the folder {path.parent} and "
                    "resume"
                )

    def check_order(self) -> None:
        """Check that the tasks of finished stages keep their positions in the sequence.

        Raises:
            OrderError: If one is missing or has moved.
        """
        names = [f"{number:02d}-{task}" for number, task in enumerate(self._task_ids)]
        finished = {path.parent.parent.name for path in (self.folder / "stages").glob(f"*/*/{MANIFEST}")}
        if gone := sorted(finished - set(names)):
            raise OrderError(
                f"{self.folder}: {', '.join(gone)} is finished, but the tasks are now {', '.join(names)}. Finished "
                "tasks must keep their positions, since later ones depend on them; append new tasks at the end. For "
                "another order start a new run with run.name=..."
            )

    def read(self, stage: StageRef, name: str) -> Any:
        """Return a JSON file of a finished stage, checked against the digest in its manifest.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        manifest, path = self.manifest(stage), self.path(stage) / name
        if manifest is None:
            raise CheckpointError(f"{self.key(stage)} has not been computed; `cl-dist resume` computes what is missing")
        if not path.exists() or not self._is_intact(path, manifest["files"].get(name)):
            raise CheckpointError(f"{path}: missing or damaged; remove the folder {path.parent.name!r} and resume")
        return self._parsed(path)

    def read_lines(self, stage: StageRef, name: str) -> list[Any]:
        """Return the values of a file of JSON lines of a finished stage, checked against its manifest.

        Raises:
            CheckpointError: If it is missing or damaged.
        """
        self.verify(stage, name)
        with (self.path(stage) / name).open(encoding="utf8", newline="\n") as file:  # texts may have other line ends
            return [json.loads(line) for line in file]

    def _parsed(self, path: Path, parse: Callable[[str], Any] = json.loads) -> Any:
        """Return the data of a JSON file, cached until the file changes; callers must not modify it."""
        stat = path.stat()
        state = stat.st_size, stat.st_mtime_ns, stat.st_ino
        if self._read.get(path, (None, None))[0] != state:
            self._read[path] = state, parse(path.read_text(encoding="utf8"))
        return self._read[path][1]

    def _is_intact(self, path: Path, digest: str | None) -> bool:
        """Return whether a file has this digest, cached until the file changes."""
        stat = path.stat()
        state = stat.st_size, stat.st_mtime_ns, stat.st_ino, digest
        if self._verified.get(path) != state:
            if sha256(path) != digest:
                return False
            self._verified[path] = state
        return True


def _partial(final: Path, fingerprint: str) -> Path:
    """Return the folder in which a stage is computed before the rename."""
    return final.with_name(f"{final.name}.partial-{fingerprint[:12]}")


def _stage_paths(final: Path) -> Iterator[Path]:
    """Yield the folders of a stage and all paths of its attempts, parents first."""
    yield from (final.parent, final)
    for partial in final.parent.glob(f"{final.name}.partial-*"):
        yield partial
        yield from partial.rglob("*")


def refuse_links(paths: Iterable[Path]) -> None:
    """Check that no path which a run writes or removes is a symbolic link, whose target may not belong to the run.

    Raises:
        CheckpointError: If one is.
    """
    for path in paths:
        if path.is_symlink():
            raise CheckpointError(
                f"{path}: is a symbolic link inside the run's own folder; remove the link (not its target) and resume: "
                "missing results are computed again"
            )


def link(source: Path, target: Path) -> None:
    """Make a hard link, which replaces the target; copy the file where the file system has no such link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copy2(source, target)


def is_inside(name: str) -> bool:
    """Return whether a relative path from an untrusted source stays inside the folder that it is joined to."""
    return name.isprintable() and "\\" not in name and not {"", ".", ".."} & set(name.split("/"))


def parse_manifest(text: str) -> dict[str, Any]:
    """Parse a manifest; check its fields, and its fingerprint against its facts.

    Raises:
        ValueError: If it is invalid.
    """
    try:
        manifest: dict[str, Any] = json.loads(text)
        datetime.fromisoformat(manifest["started"])
        is_valid = {
            "stage": isinstance(manifest["stage"], dict) and isinstance(manifest["stage"]["kind"], str),
            "facts": isinstance(manifest["facts"], dict),
            "seconds": isinstance(manifest["seconds"], float) and math.isfinite(manifest["seconds"]),
            "files": all(is_inside(name) and isinstance(digest, str) for name, digest in manifest["files"].items()),
        }
        matches = digest_of(manifest["facts"]) == manifest["fingerprint"]
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a manifest: {type(error).__name__}: {error}") from None
    if invalid := [name for name, ok in is_valid.items() if not ok]:
        raise ValueError(f"invalid values: {', '.join(invalid)}")
    if not matches:
        raise ValueError("its fingerprint does not match its facts")
    return manifest


def sha256(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synced(path: Path) -> str:
    """Flush a file to disk and return its sha256."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return sha256(path)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically: readers see the old file or the new one."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically: readers see the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_folder(folder: Path) -> None:
    """Flush a rename inside a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
