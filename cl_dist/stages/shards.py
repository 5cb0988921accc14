"""Stages that are computed in shards: the interface of a kind, and the store of finished shards."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from cl_dist.kinds import KINDS
from cl_dist.ledger import write_text
from cl_dist.stage import digest_of
from cl_dist.stages.stage_job import Job

log = logging.getLogger(__name__)
Shard = Any
"""Names a part of a stage: frozen, hashable, ordered. It depends on the science settings alone."""


class Worker(Protocol):
    """Loads the stage's model once and computes one shard after the other."""

    def run(self, shard: Shard) -> Any:
        """Return a shard's result as JSON data; it depends neither on the worker nor on other shards."""


@dataclass(frozen=True, slots=True)
class ShardedKind:
    """A kind of stage that any number of workers may compute."""

    cut: Callable[[Job], list[Any]]
    """Job -> shards, in order. Compute neighbours from the last to the first: the last needs most of a model."""
    worker: Callable[[Job], Worker]
    merge: Callable[[Job, Iterable[tuple[Any, Any]], Path], None]
    """(job, (shard, result) in any order, folder): join the results and write the stage's files."""


def sharded(kind: str) -> ShardedKind:
    """Return the worker side of a kind of stage."""
    path = KINDS[kind].worker
    assert path is not None, f"{kind}: trained by a gang"
    module, _, name = path.partition(":")
    found: ShardedKind = getattr(import_module(module), name)
    return found


def import_workers() -> None:
    """Import the worker side of every kind, and torch with it, before the first shard arrives."""
    for kind, entry in KINDS.items():
        if entry.worker is not None:
            sharded(kind)


class ShardStore:
    """The shards of a stage that are finished, kept in its folder until all of them are."""

    def __init__(self, job: Job, out: Path) -> None:
        """Read what an earlier attempt has left; a damaged file is a shard to be computed again."""
        self._job, self._out, self._kind = job, out, sharded(job.stage.kind)
        self.shards = self._kind.cut(job)
        self._folder = out / "shards"
        self._folder.mkdir(exist_ok=True)
        self._results: dict[Shard, Any] = {}
        for number, shard in enumerate(self.shards):
            path = self._path(number)
            if not path.exists():
                continue
            try:
                found = json.loads(path.read_text(encoding="utf8"))
                if found["digest"] != digest_of(found["result"]):
                    raise ValueError("not what its digest says")
                self._results[shard] = found["result"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                log.warning("shard damaged file=%s error=%s: computed again", path, error)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.json"

    @property
    def missing(self) -> list[Shard]:
        """The shards without a result, in order."""
        return [shard for shard in self.shards if shard not in self._results]

    def keep(self, shard: Shard, result: Any) -> None:
        """Keep a shard's result: whole, or not at all."""
        text = json.dumps({"digest": digest_of(result), "result": result})
        write_text(self._path(self.shards.index(shard)), text)
        self._results[shard] = result

    def merge(self) -> None:
        """Put the results together and write the stage's files."""
        self._kind.merge(self._job, self._results.items(), self._out)
