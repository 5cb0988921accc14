"""The stages that come in shards: how each kind is cut up, worked on and put together again."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cl_dist.stages import choose, evaluate, generate, rationalise, vote, voters
from cl_dist.stages.job import Job

Shard = Any
"""Names a piece of a stage: frozen, hashable, ordered. It depends on the science settings alone."""


class Worker(Protocol):
    """Holds the stage's model and works on one shard after the other."""

    def run(self, shard: Shard) -> Any:
        """Return a shard's result as plain data; it does not depend on who computes it, nor on the shards before."""


@dataclass(frozen=True, slots=True)
class Sharded:
    """A kind of stage that any number of workers may compute."""

    cut: Callable[[Job], list[Any]]
    """Job -> shards, in order. Work through neighbours from the last to the first: the last needs most of a model."""
    worker: Callable[[Job], Worker]
    merge: Callable[[Job, Iterable[tuple[Any, Any]], Path], None]
    """(job, (shard, result) in any order, folder): join the results and write the stage's files."""


SHARDED = {
    "evaluate": Sharded(evaluate.shards, evaluate.Scorer, evaluate.merge),
    "generate": Sharded(generate.shards, generate.Dreamer, generate.merge),
    "rationalise": Sharded(voters.shards, rationalise.Marker, rationalise.merge),
    "record": Sharded(voters.shards, vote.Recording, vote.merge_record),
    "vote": Sharded(voters.shards, vote.Comparing, vote.merge_vote),
    "choose": Sharded(choose.shards, choose.Trier, choose.merge),
}
