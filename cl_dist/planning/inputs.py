"""Inputs of a plan: the run's data, the backbone's sizes, and the model that they define.

Missing inputs are replaced by stated assumptions: nothing is downloaded from the hub for a plan.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cl_dist.errors import ConfigError, DataError
from cl_dist.kinds import trainings
from cl_dist.models.config import ModelConfig
from cl_dist.paths import resolve
from cl_dist.planning.memory import Model, Step
from cl_dist.run import Run
from cl_dist.stage import TrainConfig
from cl_dist.tokens import num_ids

if TYPE_CHECKING:
    from cl_dist.planning.trace import TracedLearner

LABELS, ANSWER = 2, 8
"""Defaults if data or tokenizer are missing: labels per task; tokens per answer, including the end token."""


@dataclass
class PlanInputs:
    """The available inputs of a run's plan."""

    run: Run
    missing: dict[int, str] = field(default_factory=dict)
    """Tasks with missing files, and the first missing file of each."""
    assumptions: list[str] = field(default_factory=list)
    """Assumptions of the plan, with reasons."""

    @classmethod
    def of(cls, run: Run) -> PlanInputs:
        """Read the available data.

        Raises:
            DataError: With the faults of all existing files.
        """
        inputs, faults = cls(run), []
        for number, task in enumerate(run.tasks.tasks):
            is_local = task.source.kind not in ("planted", "datasets", "reader")
            paths = [*task.source.paths.values(), task.source.path] if is_local else []
            absent = [path for path in paths if path and not resolve(path).exists()]
            if absent:
                inputs.missing[number] = absent[0]
                continue
            try:
                run.data(number)
            except DataError as error:
                faults.append(str(error))
        if faults:
            raise DataError("\n".join(faults))
        if inputs.missing:
            names = ", ".join(f"{run.tasks.tasks[t].id} ({path})" for t, path in inputs.missing.items())
            inputs.assumptions.append(
                f"rows and fingerprints of stages: no data of {names}; assuming {LABELS} labels per task"
            )
        return inputs

    def labels(self) -> tuple[int, ...]:
        """Return the number of labels of every task."""
        count = len(self.run.tasks)
        return tuple(LABELS if t in self.missing else len(self.run.data(t).labels) for t in range(count))

    def model(self) -> ModelConfig | None:
        """Return the backbone with its sizes from config.json, or None if that is not available locally."""
        model = self.run.config.science.model
        if model.config is not None:
            return model
        if (reason := _not_local(model.source)) is not None:
            self.assumptions.append(f"memory: science.model.source={model.source!r} {reason}")
            return None
        path = resolve(model.source) / "config.json"
        try:
            return model.model_copy(update={"config": json.loads(path.read_text(encoding="utf8"))})
        except (OSError, ValueError) as error:
            where = f"science.model.source={model.source!r}"
            raise ConfigError(f"{where}: expected a folder with config.json: {error}") from error

    def vocabulary(self, model: ModelConfig) -> tuple[int, int]:
        """Return the size of a decoder's vocabulary, including special tokens, and the tokens of its longest answer."""
        from cl_dist.data.language import SpecialTokens, TextCodec

        rows = int((model.config or {}).get("vocab_size", 0))
        tokens, answer = rows, ANSWER
        if _not_local(model.source) is None and any(resolve(model.source).glob("token*")):
            from cl_dist.models.backbone import load_tokenizer

            tokenizer = load_tokenizer(model)
            codec, tokens = TextCodec(tokenizer), num_ids(tokenizer)
            names = {
                row.label for t in range(len(self.run.tasks)) if t not in self.missing for row in self.run.data(t).train
            }
            answer = 1 + max((len(codec.encode(name)) for name in names), default=ANSWER - 1)
        else:
            self.assumptions.append(
                f"tokens: no local tokenizer; assuming the vocabulary of the model's config, and answers of {ANSWER} "
                "tokens"
            )
        size = SpecialTokens(tokens, 0).size(len(self.run.tasks), model.spare_task_tokens)
        return max(rows, size), answer


def _not_local(source: str) -> str | None:
    """Return why a source's files are not available without a download, or None if they are."""
    if source.endswith(".gguf"):
        return "is a gguf file, which is unpacked at its first use; set a folder with config.json for a plan"
    if source.startswith(("package:", ".", "/", "~")) or Path(source).is_dir():
        return None
    return (
        "is a name on the hub, and nothing is downloaded for a plan; set science.model.config, or a folder with "
        "config.json"
    )


def _longest_rows(run: Run, task: int) -> TrainConfig:
    """Return a task's settings with the longest rows of its Train stages, including replayed rows of other tasks."""
    science, tasks = run.config.science, run.tasks.tasks
    read = {task}
    for stage in trainings(run.plan(task)):
        read |= {*stage.data, *stage.replay}
        read |= set(range(task)) if stage.samples is not None else set()
    longest = max(science.train_of(tasks[u]).max_length for u in read)
    return science.train_of(tasks[task]).model_copy(update={"max_length": longest})


@dataclass
class ModelEstimate:
    """The model of a run's last task, which has most parts, on its longest rows."""

    traced: TracedLearner
    partitions: bool
    """Whether ZeRO-3 partitions the backbone while it is loaded."""
    whole_at_once: int
    """Parameters in memory at a time if the others are offloaded to files."""
    item: int
    train: TrainConfig
    """Settings of the task with the longest rows."""
    answer: int
    per_task: int
    """Elements added by the last task."""
    is_text: bool

    @classmethod
    def of(cls, inputs: PlanInputs) -> ModelEstimate | None:
        """Build the model on fake tensors, or return None if its sizes are not available."""
        model = inputs.model()
        if model is None:
            return None
        from cl_dist.parallel.files import MEGABYTE, num_buffers
        from cl_dist.planning.trace import TracedLearner
        from cl_dist.stages.build import loads_partitioned

        run, is_text = inputs.run, inputs.run.output == "lm"
        vocabulary, answer = inputs.vocabulary(model) if is_text else (None, 1)
        labels, method = inputs.labels(), run.config.science.method
        stages = trainings(run.plan(len(labels) - 1))
        tasks = tuple({*stages[-1].data, *stages[-1].replay})
        recompute = run.config.cluster.activation_checkpointing
        traced = TracedLearner(method, model, labels, vocabulary=vocabulary, tasks=tasks, recompute=recompute)
        partitions = loads_partitioned(run.config.science.method, run.config.science.model)
        before = (
            TracedLearner(method, model, labels[:-1], vocabulary=vocabulary).parts.elements if len(labels) > 1 else 0
        )
        settings = [_longest_rows(run, task) for task in range(len(labels))]
        longest = max(settings, key=lambda train: train.max_length * train.global_batch)
        item = 2 if model.dtype == "bfloat16" else 4
        smallest = MEGABYTE * run.config.cluster.workers // item
        num_gathered = num_buffers(traced.learner.model, lambda parameter: parameter.numel() >= smallest)
        return cls(traced, partitions, num_gathered, item, longest, answer, traced.parts.elements - before, is_text)

    @property
    def model(self) -> Model:
        """Counts of the model."""
        traced = self.traced
        return Model(
            elements=traced.backbone.elements + traced.parts.elements,
            trained=traced.backbone.trained + traced.parts.trained,
            largest=traced.largest,
            item=self.item,
            task_elements=traced.parts.elements,
            buffers=traced.buffers,
            extras=traced.extras,
            partitions=self.partitions,
            whole_at_once=self.whole_at_once,
            quantized=traced.quantized,
            tables=traced.tables,
        )

    def step(self, rows: int, accumulates: bool) -> Step:
        """Return the micro-batches of an optimizer step."""
        micro = self.traced.micro(rows, self.train.max_length, self.answer)
        points = [(point.activations, point.gradients) for point in micro.points]
        return Step(micro.saved, points, accumulates, micro.operations)
