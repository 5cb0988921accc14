"""Mirror: a copy of a run's finished stages on another store (s3://, gs://, file:// or any other of fsspec).

A run works in its run folder. Each finished stage is copied when it is published, its manifest last, so the copy holds
a stage completely or not at all; run.json, the run file and the metrics follow. A run without a folder, for example on
a new machine, starts from the copy. Checkpoints inside a stage are not copied.
"""

import logging
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cl_dist.errors import CheckpointError, ClDistError, ConfigError, StorageError
from cl_dist.ledger import MANIFEST, is_inside, parse_manifest, refuse_links, sha256
from cl_dist.run_config import RunConfig

log = logging.getLogger(__name__)
KEPT = ("config.yaml", "config.source.yaml", "run.json")
METRICS = ("metrics/R.csv", "metrics/summary.json", "metrics/events.jsonl")


class Mirror:
    """The copy of one run."""

    def __init__(self, config: RunConfig) -> None:
        """Open the store of `run.mirror`; this reads and writes nothing.

        Raises:
            ConfigError: If fsspec does not know the kind of store, or needs more than a URL.
            StorageError: If it cannot be reached.
        """
        import fsspec  # here: most runs have no mirror

        assert config.run.mirror is not None
        self._folder, self._url = config.folder, f"{config.run.mirror.rstrip('/')}/{config.run.name}"
        try:
            self._store, self._root = fsspec.core.url_to_fs(self._url)
        except OSError as error:
            raise StorageError(f"run.mirror: {self._url}: cannot be reached: {error}") from error
        except Exception as error:  # each store raises its own errors
            raise ConfigError(f"run.mirror={config.run.mirror!r}: {error}; s3:// needs pip install s3fs") from error

    def probe(self) -> None:
        """Write a small file to the store, read it back and remove it.

        Raises:
            StorageError: If one of these fails.
        """
        there = f"{self._root}/.probe-{uuid.uuid4().hex}"
        with self._errors("written and read"):
            self._store.makedirs(self._root, exist_ok=True)
            self._store.pipe_file(there, b"probe")
            if self._store.cat_file(there) != b"probe":
                raise OSError("the store returned other bytes than were written")
            self._store.rm_file(there)

    def push(self) -> None:
        """Copy finished stages that the store lacks, and the files about the run.

        Raises:
            StorageError: If the store cannot be written.
        """
        with self._errors("written"):
            for manifest in sorted((self._folder / "stages").glob(f"*/*/{MANIFEST}")):
                if not self._same(manifest):
                    names = sorted(path for path in manifest.parent.rglob("*") if path.is_file() and path != manifest)
                    for path in (*names, manifest):
                        self._put(path)
            for name in (*KEPT, *METRICS):
                if (self._folder / name).exists():
                    self._put(self._folder / name)

    def pull(self) -> int:
        """Fetch the stages that the run folder lacks, and return their number.

        Raises:
            StorageError: If the store cannot be read.
            CheckpointError: If a file differs from its manifest's digest, or would lie outside the stage's folder.
        """
        with self._errors("read"):
            return self._pull()

    def _pull(self) -> int:
        brought = 0
        for there in sorted(self._store.glob(f"{self._root}/stages/*/*/{MANIFEST}")):
            remote = there.rpartition("/")[0]
            key = "/".join(remote.split("/")[-2:])
            if not is_inside(key):
                raise _damaged(remote, "not the name of a stage's folder:")
            final = self._folder / "stages" / key
            partial = final.with_name(f"{final.name}.mirrored")
            refuse_links((final.parent, final, partial))
            if (final / MANIFEST).exists():
                continue
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._fetch(remote, partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            brought += 1
        if brought:
            log.info("mirror url=%s stages=%d fetched", self._url, brought)
        return brought

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except ClDistError:
            raise
        except Exception as error:  # each store raises its own errors
            raise StorageError(f"run.mirror: {self._url}: cannot be {done}: {type(error).__name__}: {error}") from error

    def _fetch(self, remote: str, folder: Path) -> None:
        """Fetch a stage's manifest and the files that it names, and no other file of that folder."""
        text, wrong = self._store.cat_file(f"{remote}/{MANIFEST}"), []
        try:
            files: dict[str, str] = parse_manifest(text.decode("utf8"))["files"]
        except ValueError as error:
            files, wrong = {}, [f"{MANIFEST} ({error})"]
        for name, digest in files.items():
            local = folder / name
            local.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                self._store.get_file(f"{remote}/{name}", str(local))
            if not local.is_file() or sha256(local) != digest:
                wrong.append(name)
        if wrong:
            shutil.rmtree(folder)
            raise _damaged(remote, f"{', '.join(wrong)} missing or damaged;")
        (folder / MANIFEST).write_bytes(text)

    def _same(self, manifest: Path) -> bool:
        there = self._remote(manifest)
        return bool(self._store.exists(there)) and self._store.cat_file(there) == manifest.read_bytes()

    def _put(self, path: Path) -> None:
        there = self._remote(path)
        self._store.makedirs(there.rpartition("/")[0], exist_ok=True)
        self._store.put_file(str(path), there)

    def _remote(self, path: Path) -> str:
        return f"{self._root}/{path.relative_to(self._folder).as_posix()}"


def _damaged(remote: str, what: str) -> CheckpointError:
    remedy = "remove that folder from the store, and the run computes the stage again"
    return CheckpointError(f"run.mirror: {remote}: {what} {remedy}")


class Mirroring:
    """Watcher of a run's events that keeps the mirror up to date."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Copy after each stage. If the store cannot be reached, log a warning and retry after the next stage.

        Raises:
            StorageError: If the store cannot be reached when the run has finished.
        """
        if event["event"] == "finished":
            self._mirror.push()
        elif event["event"] in ("stage_done", "stopped", "interrupted", "failed"):
            try:
                self._mirror.push()
            except StorageError as error:
                log.warning("%s; the copy is retried after the next stage and by `cl-dist resume`", error)
