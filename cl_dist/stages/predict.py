"""A stored model answers rows: inside an Evaluate stage, and outside of any, with the same numbers."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cl_dist.data.classify import ClassifyRows
from cl_dist.data.rows import Row
from cl_dist.methods.base import Learner
from cl_dist.models.backbone import load_tokenizer
from cl_dist.parallel.world import World
from cl_dist.stages.job import Job, build_learner, task_data


class Predictor:
    """Holds the model of an Evaluate stage's job. Rows need no label, and theirs are not looked at.

    It has the parts of the latest task that it was asked for and of those before it: what later tasks added is not
    loaded. Asked for a later task it starts anew, so ask for that first.
    """

    learner: Learner

    def __init__(self, job: Job) -> None:
        self._job, self._world, self._latest = job, World.current(), -1
        self._tokenizer = load_tokenizer(job.model)

    def _load(self, task: int) -> None:
        if task <= self._latest:
            return
        self._model = self.learner = None  # type: ignore[assignment]  # never two models resident
        self.learner, self._latest = build_learner(self._job, task), task
        self._model = self.learner.model.to(self._world.device).eval()
        if self._job.model.dtype == "bfloat16":
            self._model = self._model.to(torch.bfloat16)

    @torch.no_grad()
    def logits(
        self, task: int, rows: Sequence[Row], without: str | None = None, after_batch: Callable[[], None] | None = None
    ) -> list[Tensor]:
        """Return the float32 logits (K,) of each row, K classes in the order of the task's labels.

        Rows are cut into shards, and these by length into batches of a fixed size: a row's last bits may depend on how
        far its batch is padded, so that only equal batches give equal bits.
        """
        self._load(task)
        size, labels = self._job.evaluate.shard_rows, task_data(self._job, task).labels
        self.learner.activate(task, without)
        found: list[Tensor] = []
        for start in range(0, len(rows), size):
            encoded = ClassifyRows(self._tokenizer, self._job.max_length[task])
            encoded.add(task, [replace(row, label=labels[0]) for row in rows[start : start + size]], labels)
            order, of_row = encoded.by_length(), dict[int, Tensor]()
            for first in range(0, len(order), self._job.evaluate.batch):
                indices = order[first : first + self._job.evaluate.batch]
                logits_BK = self._model(encoded.batch(indices, self._world.device)).float().cpu()
                of_row |= dict(zip(indices, logits_BK, strict=True))
                if after_batch is not None:
                    after_batch()
            found += [of_row[index] for index in range(len(order))]
        return found
