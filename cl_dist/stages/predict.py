"""Predictions of a stored model, for Evaluate stages and for `cl-dist predict`."""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cl_dist.data.language import TextCodec, encode_row
from cl_dist.data.rows import Row
from cl_dist.data.token_report import unreadable
from cl_dist.errors import CheckpointError, DataError
from cl_dist.learners.base import Learner
from cl_dist.models.backbone import load_tokenizer, num_embeddings
from cl_dist.models.causal import CausalModel
from cl_dist.models.decode import greedy_decode
from cl_dist.parallel.world import World
from cl_dist.stages.build import build_learner, to_inference, writes_text
from cl_dist.stages.stage_job import Job, task_data


class Predictor:
    """Predicts with the model of an Evaluate stage's job. Labels of rows are ignored.

    The model has the parts of tasks up to the latest one requested; later parts are not loaded. A request for a later
    task reloads the model, so request the latest task first.
    """

    learner: Learner

    def __init__(self, job: Job) -> None:
        self._job, self._world, self._latest = job, World.current(), -1
        self._tokenizer = load_tokenizer(job.model)

    def _load(self, task: int) -> None:
        if task <= self._latest:
            return
        self._model: Any = None
        self.__dict__.pop("learner", None)
        gc.collect()  # never two models in memory: accelerate's hooks form reference cycles
        self.learner, self._latest = build_learner(self._job, task, for_inference=True), task
        self._model = to_inference(self._job, self.learner.model)

    @property
    def writes(self) -> bool:
        """Whether answers are generated as text, instead of chosen among classes."""
        return writes_text(self._job.method, self._job.model)

    def refuse_unreadable(self, task: int, rows: Sequence[Row]) -> None:
        """Check that the tokenizer and the backbone can encode rows.

        Raises:
            DataError: With the first row that they cannot.
        """
        model, config = self._job.model, self._job.tasks[task]
        known = None if self.writes else num_embeddings(model)
        for row, column, message in unreadable(config, rows, self._tokenizer, self._job.max_length[task], known):
            where = f"row {row.id}" if row.where is None else f"line {row.where.line}"
            raise DataError(f"{where}: field {column}: {message}")

    @torch.no_grad()
    def logits(
        self, task: int, rows: Sequence[Row], without: str | None = None, after_batch: Callable[[], None] | None = None
    ) -> list[Tensor]:
        """Return the float32 logits (K,) of each row, K classes in the order of the task's labels.

        Rows are split into shards, and these by length into batches of a fixed size: a row's last bits may depend on
        the padding of its batch, so only equal batches give equal bits.
        """
        self._load(task)
        size, data = self._job.evaluate.shard_rows, task_data(self._job, task)
        self.learner.activate(task, without)
        found: list[Tensor] = []
        for start in range(0, len(rows), size):
            encoded = self.learner.rows(self._tokenizer, self._job.max_length[task], training=False)
            encoded.add(task, data, [replace(row, label=data.labels[0]) for row in rows[start : start + size]])
            order, of_row = encoded.by_length(), dict[int, Tensor]()
            for indices in self._batches(order):
                logits_BK = self._model(encoded.batch(indices, self._world.device)).float().cpu()
                of_row |= dict(zip(indices, logits_BK, strict=True))
                if after_batch is not None:
                    after_batch()
            found += [of_row[index] for index in range(len(order))]
        return found

    def probabilities(self, task: int, rows: Sequence[Row]) -> list[dict[str, float]]:
        """Return each row's probability of each of the task's labels."""
        labels = task_data(self._job, task).labels
        found = []
        for row, logits_K in zip(rows, self.logits(task, rows), strict=True):
            if not logits_K.isfinite().all():
                raise CheckpointError(f"row {row.id}: the model's logits are not finite: its training has diverged")
            found.append(dict(zip(labels, logits_K.double().softmax(-1).tolist(), strict=True)))
        return found

    def answers(self, task: int, rows: Sequence[Row]) -> list[str]:
        """Return the answer to each row: the most likely label, or greedily generated text.

        Generated tokens that encode a label are returned as that label, otherwise as text. An answer has at most one
        token more than the longest answer of the train rows.
        """
        if not self.writes:
            labels = task_data(self._job, task).labels
            return [labels[int(logits_K.argmax())] for logits_K in self.logits(task, rows)]
        self._load(task)
        assert isinstance(self.learner.model, CausalModel)
        codec, data = TextCodec(self._tokenizer), task_data(self._job, task)
        backbone, special = self.learner.model.backbone, codec.special
        known = {tuple(codec.encode(label)): label for label in data.labels}
        longest = max(len(codec.encode(text)) for text in {row.label for row in data.train})
        length = self._job.max_length[task]
        found: list[str] = []
        for start in range(0, len(rows), self._job.evaluate.shard_rows):
            blind = [replace(row, label="") for row in rows[start : start + self._job.evaluate.shard_rows]]
            encoded = [encode_row(codec, row, data.question, length, longest) for row in blind]
            prompts = [[*context, *asked, special.ans] for context, asked, _ in encoded]
            of_row: dict[int, str] = {}
            for indices in self._batches(sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))):
                chosen = [prompts[index] for index in indices]
                written = greedy_decode(backbone, chosen, special.pad, special.eos, longest + 1)
                for index, tokens in zip(indices, written, strict=True):
                    of_row[index] = known.get(tuple(tokens)) or codec.decode(tokens)
            found += [of_row[index] for index in range(len(prompts))]
        return found

    def _batches(self, order: list[int]) -> list[list[int]]:
        size = self._job.evaluate.batch
        return [order[first : first + size] for first in range(0, len(order), size)]
