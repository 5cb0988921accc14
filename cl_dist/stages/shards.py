"""The stages that come in shards: how each kind is cut up, worked on and put together again."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cl_dist.ledger import write_text
from cl_dist.stage import digest_of
from cl_dist.stages import choose, evaluate, generate, rationalise, vote
from cl_dist.stages import voting_shards as voters
from cl_dist.stages.stage_job import Job

log = logging.getLogger(__name__)
Shard = Any
"""Names a piece of a stage: frozen, hashable, ordered. It depends on the science settings alone."""


class Worker(Protocol):
    """Holds the stage's model and works on one shard after the other."""

    def run(self, shard: Shard) -> Any:
        """Return a shard's result as what JSON can hold; it depends neither on who computes it nor on other shards."""


@dataclass(frozen=True, slots=True)
class ShardedKind:
    """A kind of stage that any number of workers may compute."""

    cut: Callable[[Job], list[Any]]
    """Job -> shards, in order. Work through neighbours from the last to the first: the last needs most of a model."""
    worker: Callable[[Job], Worker]
    merge: Callable[[Job, Iterable[tuple[Any, Any]], Path], None]
    """(job, (shard, result) in any order, folder): join the results and write the stage's files."""


SHARDED = {
    "evaluate": ShardedKind(evaluate.shards, evaluate.EvaluateWorker, evaluate.merge),
    "generate": ShardedKind(generate.shards, generate.GenerateWorker, generate.merge),
    "rationalise": ShardedKind(voters.shards, rationalise.RationaliseWorker, rationalise.merge),
    "record": ShardedKind(voters.shards, vote.RecordWorker, vote.merge_record),
    "vote": ShardedKind(voters.shards, vote.VoteWorker, vote.merge_vote),
    "choose": ShardedKind(choose.shards, choose.ChooseWorker, choose.merge),
}


class ShardStore:
    """The shards of a stage that are finished, kept in its folder until all of them are."""

    def __init__(self, job: Job, out: Path) -> None:
        """Read what an earlier attempt has left; a damaged file is a shard to be computed again."""
        self._job, self._out, self._kind = job, out, SHARDED[job.stage.kind]
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
