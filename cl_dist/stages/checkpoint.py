"""Checkpoints within a Train stage, to resume it on any number of ranks and with any ZeRO stage.

    checkpoints/step-<N>/   after N optimizer steps
        trainable*.safetensors, exp_avg*.safetensors, exp_avg_sq*.safetensors    each rank writes its partitions
        best/trainable*.safetensors     weights of the best round so far, if the best round is selected
        checkpoint.json                 step, rounds, running sums, digests of every file and its own; written last
The folder gets its final name by one rename. The two newest are kept; damaged ones are skipped.
"""

import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cl_dist.errors import StorageError
from cl_dist.ledger import UNFINISHED, sha256, sync_folder, synced, write_json
from cl_dist.parallel import moments, params
from cl_dist.parallel.engine import Engine
from cl_dist.parallel.world import World
from cl_dist.stage import digest_of
from cl_dist.stages.weights import TRAINABLE, LocalShards, ShardedWeights
from cl_dist.storage import storage_errors

log = logging.getLogger(__name__)
FOLDER, INDEX, BEST, KEEP_LATEST = "checkpoints", "checkpoint.json", "best", 2


class Best:
    """The weights of the best round so far, in memory or in a checkpoint's folder."""

    def __init__(self, loss: float, weights: LocalShards | Path) -> None:
        self.loss, self._weights = loss, weights

    def relocate(self, folder: Path) -> None:
        """Read the weights from this folder from now on, if they are not in memory; the old folder may be removed."""
        if isinstance(self._weights, Path):
            self._weights = folder

    def write(self, folder: Path, rank: int) -> list[Path]:
        """Write this rank's files and return them; rank 0 copies those of a checkpoint. Not a collective."""
        if isinstance(self._weights, LocalShards):
            return self._weights.write(folder)
        files = self._weights.iterdir() if rank == 0 else ()
        return [Path(shutil.copyfile(path, folder / path.name)) for path in files]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """State of a stage in a checkpoint."""

    step: int
    """Number of completed optimizer steps."""
    rounds: list[dict[str, float]]
    sums: dict[str, dict[str, float]]
    """Running sums of the round, over all ranks."""
    seconds: float
    """Time spent in the stage so far."""
    best: Best | None
    folder: Path
    source: int | None = None
    """The earlier task that the stage started from: see `Learner.source`."""

    def load_weights(self, model: nn.Module, rank: int) -> None:
        """Load the trained weights into a model before an engine takes it."""
        params.load(model, ShardedWeights(self.folder), rank)

    def load_moments(self, engine: Engine) -> None:
        """Restore the state of the optimizer."""
        moments.restore(engine, self.step, {key: ShardedWeights(self.folder, key) for key in moments.KEYS})


class Writer:
    """Writes checkpoints below a stage's folder in the background: each rank copies its state, and a thread writes it.

    Threads call no collectives. The written files become a checkpoint by `commit`, a collective.
    """

    def __init__(self, out: Path, engine: Engine) -> None:
        self._folder, self._engine, self._world = out / FOLDER, engine, engine.world
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._written: Future[dict[str, str]] | None = None
        self._state: dict[str, Any] = {}
        self._best: Best | None = None

    def save(self, state: Mapping[str, Any], best: Best | None, *, wait: bool) -> None:
        """Commit the previous checkpoint and start to write a new one; with wait, also commit it. A collective.

        state is plain data, equal on all ranks, with the `step`.
        """
        self.commit()
        self._state, self._best = {**state, "best_loss": None if best is None else best.loss}, best
        if self._world.rank == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            (self._partial / BEST).mkdir(parents=True)
        self._world.gather(None)
        keys = {TRAINABLE: None, **{key: key for key in moments.KEYS}}
        copies = ((stem, LocalShards(self._engine, key)) for stem, key in keys.items())
        taken = copies if wait else list(copies)  # with wait, copied one at a time to save memory
        self._written = self._thread.submit(_write, self._partial, taken, best, self._world.rank)
        if wait:
            self.commit()

    @property
    def is_pending(self) -> bool:
        """Whether this rank has a checkpoint to commit, written or not."""
        return self._written is not None

    @property
    def is_written(self) -> bool:
        """Whether this rank has a checkpoint to commit whose files are written."""
        return self._written is not None and self._written.done()

    def commit(self) -> None:
        """Wait for the files of the pending checkpoint, and publish it. A collective.

        Raises:
            StorageError: On all ranks, if one of them failed to write.
        """
        if self._written is None:
            return
        error = self._written.exception()
        if error is not None and not isinstance(error, StorageError):
            raise error
        outcomes = self._world.gather(error or self._written.result())
        self._written = None
        if failed := [outcome for outcome in outcomes if isinstance(outcome, BaseException)]:
            raise failed[0]
        partial, final = self._partial, self._partial.with_suffix("")
        if self._world.rank == 0:
            files = {name: digest for share in outcomes if isinstance(share, dict) for name, digest in share.items()}
            index = {**self._state, "files": files}
            write_json(partial / INDEX, {**index, "digest": digest_of(index)})
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            sync_folder(final.parent)
        self._world.gather(None)
        if self._best is not None:
            self._best.relocate(final / BEST)
        if self._world.rank == 0:
            for old in _checkpoints(self._folder.parent)[KEEP_LATEST:]:
                shutil.rmtree(old)

    def close(self) -> None:
        """Wait for this rank's thread, without a commit. Not a collective."""
        self._thread.shutdown()

    @property
    def _partial(self) -> Path:
        return self._folder / f"{_name(self._state['step'])}.partial"


def _write(folder: Path, copies: Iterable[tuple[str, LocalShards]], best: Best | None, rank: int) -> dict[str, str]:
    """Write a rank's files, and return their digests by name."""
    with storage_errors(folder):
        paths = [path for stem, copy in copies for path in copy.write(folder, stem)]
        if best is not None:
            paths += best.write(folder / BEST, rank)
        return {str(path.relative_to(folder)): synced(path) for path in paths}


def latest(out: Path, world: World) -> Checkpoint | None:
    """Return the newest intact checkpoint below out, or None; rank 0 decides. A collective.

    Other files of an earlier attempt are removed: newer checkpoints, which are damaged, and results, which a gang of
    another size would not overwrite.
    """
    chosen: Path | None = None
    if world.rank == 0:
        found = _checkpoints(out)
        chosen = next((path for path in found if _is_intact(path)), None)
        newer = found[: len(found) if chosen is None else found.index(chosen)]
        results = [path for path in out.iterdir() if path.name not in UNFINISHED]
        for path in (*newer, *results, *(out / FOLDER).glob("*.partial")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = world.gather(chosen)[0]
    if folder is None:
        return None
    index = json.loads((folder / INDEX).read_text(encoding="utf8"))
    best = None if index["best_loss"] is None else Best(index["best_loss"], folder / BEST)
    return Checkpoint(
        index["step"], index["rounds"], index["sums"], index["seconds"], best, folder, index.get("source")
    )


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints below out, newest first."""
    return sorted((path.parent for path in (out / FOLDER).glob(f"step-*[0-9]/{INDEX}")), reverse=True)


def _is_intact(folder: Path) -> bool:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf8"))
        if index.pop("digest") != digest_of(index) or folder.name != _name(index["step"]):
            raise ValueError("digest does not match")
        damaged = [name for name, digest in index["files"].items() if sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        damaged = [f"{INDEX} ({type(error).__name__}: {error})"]
    if damaged:
        log.warning("checkpoint damaged folder=%s files=%s: skipped", folder, ", ".join(damaged))
    return not damaged
