"""A Train stage in the middle: what the next attempt needs to go on, on any number of ranks and any ZeRO stage.

    checkpoints/step-<N>/   after N optimizer steps
        trainable*.safetensors, exp_avg*.safetensors, exp_avg_sq*.safetensors    each rank writes what it owns
        best/trainable*.safetensors     weights of the best round so far, where one is selected
        checkpoint.json                 step, rounds, running sums, and the digest of every file; written last
The folder appears under its name by one rename. The two newest are kept; a damaged one is passed over.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from cl_dist.ledger import UNFINISHED, sha256, sync_folder, write_json
from cl_dist.parallel import moments
from cl_dist.parallel.engine import Engine
from cl_dist.parallel.world import World
from cl_dist.stages.weights import Pieces, StoredWeights

log = logging.getLogger(__name__)
FOLDER, INDEX, BEST, KEPT = "checkpoints", "checkpoint.json", "best", 2


class Best:
    """The weights of the best round so far: in this process, or in a checkpoint's folder."""

    def __init__(self, loss: float, weights: Pieces | Path) -> None:
        self.loss, self._weights = loss, weights

    def lie_in(self, folder: Path) -> None:
        """Be read from this folder from now on, if they were read from one before, which may be removed."""
        if isinstance(self._weights, Path):
            self._weights = folder

    def save(self, folder: Path, world: World) -> None:
        """Write them to a folder. A collective."""
        if isinstance(self._weights, Pieces):
            self._weights.save(folder)
            return
        if world.rank == 0:
            for path in self._weights.iterdir():
                shutil.copyfile(path, folder / path.name)
        world.gather(None)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What was saved."""

    step: int
    """Optimizer steps that are done."""
    rounds: list[dict[str, float]]
    sums: dict[str, dict[str, float]]
    """Running sums of the round, over all ranks."""
    seconds: float
    """Time spent in the stage so far."""
    best: Best | None
    folder: Path

    def load_weights(self, model: nn.Module) -> None:
        """Put the trained weights into a model, before an engine takes it."""
        model.load_state_dict(dict(StoredWeights(self.folder)), strict=False)

    def load_moments(self, engine: Engine) -> None:
        """Put the optimizer where it was."""
        moments.restore(engine, self.step, {key: StoredWeights(self.folder, key) for key in moments.KEYS})


def save(out: Path, engine: Engine, facts: Mapping[str, Any], best: Best | None) -> None:
    """Write a checkpoint below out. A collective; facts are plain data, equal on all ranks, with the `step`."""
    world, final = engine.world, out / FOLDER / f"step-{facts['step']:08d}"
    partial = final.with_name(f"{final.name}.partial")
    if world.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / BEST).mkdir(parents=True)
    world.gather(None)
    Pieces(engine).save(partial)
    for key in moments.KEYS:
        Pieces(engine, key).save(partial, key)
    if best is not None:
        best.save(partial / BEST, world)
    if world.rank == 0:
        files = {str(p.relative_to(partial)): sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        loss = None if best is None else best.loss
        write_json(partial / INDEX, {**facts, "best_loss": loss, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync_folder(final.parent)
    world.gather(None)
    if best is not None:
        best.lie_in(final / BEST)
    if world.rank == 0:
        for old in _found(out)[KEPT:]:
            shutil.rmtree(old)


def latest(out: Path, world: World) -> Checkpoint | None:
    """Return the newest checkpoint below out that is whole, or None; rank 0 decides. A collective.

    What else an earlier attempt has left there is removed: newer checkpoints, which are damaged, and results, which a
    gang of another size would not overwrite.
    """
    chosen: Path | None = None
    if world.rank == 0:
        found = _found(out)
        chosen = next((path for path in found if _is_whole(path)), None)
        newer = found[: len(found) if chosen is None else found.index(chosen)]
        results = [path for path in out.iterdir() if path.name not in UNFINISHED]
        for path in (*newer, *results, *(out / FOLDER).glob("*.partial")):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder = world.gather(chosen)[0]
    if folder is None:
        return None
    index = json.loads((folder / INDEX).read_text(encoding="utf8"))
    best = None if index["best_loss"] is None else Best(index["best_loss"], folder / BEST)
    return Checkpoint(index["step"], index["rounds"], index["sums"], index["seconds"], best, folder)


def _found(out: Path) -> list[Path]:
    """Return the checkpoints below out, newest first."""
    return sorted((path.parent for path in (out / FOLDER).glob(f"step-*[0-9]/{INDEX}")), reverse=True)


def _is_whole(folder: Path) -> bool:
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf8"))
        damaged = [name for name, digest in index["files"].items() if sha256(folder / name) != digest]
        index["step"], index["rounds"], index["sums"], index["seconds"], index["best_loss"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = [f"{INDEX} ({type(error).__name__}: {error})"]
    if damaged:
        log.warning("checkpoint damaged folder=%s files=%s: passed over", folder, ", ".join(damaged))
    return not damaged
