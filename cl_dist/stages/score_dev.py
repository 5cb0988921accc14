"""Loss and accuracy on the dev rows of a Train stage, by all ranks together."""

from collections.abc import Mapping

import torch

from cl_dist.data.sampler import num_micro_batches, share
from cl_dist.learners.base import Learner, Rows
from cl_dist.parallel.engine import Engine


@torch.no_grad()
def score_dev(engine: Engine, learner: Learner, dev: Mapping[int, Rows], batch: int) -> dict[str, float]:
    """Return mean loss and accuracy over the dev rows, each rank scoring its stride; every rank gets the same numbers.

    Rows are put back into order before they are summed, so the sums do not depend on the number of ranks.
    """
    world, losses, right = engine.world, [], 0
    engine.module.eval()
    for task, rows in dev.items():
        if not len(rows):
            continue
        learner.activate(task)
        size = min(batch, num_micro_batches(len(rows), world.size, 1))
        mine: list[tuple[int, float, bool]] = []
        for start in range(0, len(rows), size * world.size):
            indices = torch.arange(start, min(start + size * world.size, len(rows))).numpy()
            (places,) = share(indices, world.rank, world.size, size, 1)
            inputs = rows.batch(places, world.device)
            losses_B, right_B = learner.score_examples(engine(inputs), inputs)
            scored = zip(places.tolist(), losses_B.tolist(), right_B.tolist(), strict=True)
            mine += [row for row in scored if row[0] >= 0]
        everyone = sorted(row for part in world.gather(mine) for row in part)
        losses += [loss for _, loss, _ in everyone]
        right += sum(correct for _, _, correct in everyone)
    return {"dev/loss": sum(losses) / len(losses), "dev/accuracy": right / len(losses)}
