"""Checks of a run before it starts workers: rows, tokenizer, labels, lengths and numbers of steps."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from cl_dist.data.sampler import num_steps
from cl_dist.data.sources import listing
from cl_dist.errors import ConfigError, DataError
from cl_dist.kinds import trainings
from cl_dist.methods import capabilities_of
from cl_dist.models.config import ModelConfig
from cl_dist.run import Run
from cl_dist.stage import Choose

if TYPE_CHECKING:
    from cl_dist.data.language import TextCodec
    from cl_dist.data.token_report import TokenReport

log = logging.getLogger(__name__)


def check_data(run: Run) -> None:
    """Load and check the rows of every task.

    Raises:
        DataError: With the faults of all tasks.
    """
    faults = []
    for task in range(len(run.tasks)):
        try:
            run.data(task)
        except DataError as error:
            faults.append(str(error))
    if faults:
        raise DataError("\n".join(faults))


def check_tokens(run: Run) -> None:
    """Check that the tokenizer can encode the rows of every task and the backbone embeds their tokens; imports torch.

    Raises:
        ConfigError: If the model has no tokenizer, or one with tokens that the backbone does not embed.
        DataError: With the rows of all tasks that cannot be encoded.
    """
    check_model(run)
    faults = []
    for task in range(len(run.tasks)):
        report, name = token_report(run, task), run.tasks.tasks[task].id
        if report.faults:
            faults.append(f"task {name}: {len(report.faults)} row(s) cannot be encoded\n{listing(report.faults)}")
        elif (warning := report.warning(run.science.model.source)) is not None:
            log.warning("data task=%s %s", name, warning)
    if faults:
        raise DataError("\n".join(faults))


@dataclass(frozen=True, slots=True)
class StepHint:
    """Tasks with fewer optimizer steps than a part of the method needs."""

    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.found}; {self.remedy}"


def step_hints(run: Run) -> list[StepHint]:
    """Return a hint for each number of optimizer steps that is too small for the method (`Capabilities.slow_steps`)."""
    science = run.science
    able = capabilities_of(science.method, science.model)
    tasks: dict[tuple[int, int], list[str]] = {}
    for number, task in enumerate(run.tasks.tasks):
        settings = science.train_of(task)
        for stage in trainings(run.plan(number)):
            steps = num_steps(run.num_rows(stage), settings.global_batch)
            if 0 < settings.epochs * steps < able.slow_steps:
                names = tasks.setdefault((settings.epochs * steps, -(-able.slow_steps // steps)), [])
                names += [] if task.id in names else [task.id]
    return [
        StepHint(
            f"{_listed(names)}: {steps} optimizer steps; {able.slow_parts} hardly move below {able.slow_steps}",
            f"raise train.epochs to {epochs}, or lower train.global_batch",
        )
        for (steps, epochs), names in tasks.items()
    ]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"task {shown}" if len(names) == 1 else f"tasks {shown}"


def check_model(run: Run) -> None:
    """Check that the model has a tokenizer whose tokens the backbone embeds; imports torch.

    Raises:
        ConfigError: If not.
    """
    from cl_dist.models.backbone import check_vocabulary, load_tokenizer

    tokenizer = load_tokenizer(run.science.model)
    if not _adds_embeddings(run):
        check_vocabulary(run.science.model, tokenizer, is_whole=run.output == "lm")


def token_report(run: Run, task: int) -> "TokenReport":
    """Return the report of the tokenizer on the rows of a task, computed once; imports torch.

    Raises:
        ConfigError: If the model has no tokenizer.
    """
    return _token_report(run, task, _adds_embeddings(run))


def check_writing(run: Run) -> None:
    """Check that a language model can generate the labels of every task and fits its rows; imports torch.

    Raises:
        DataError: With labels that the tokenizer encodes alike, and rows whose question and answer are too long.
        ConfigError: If a metric's package is not installed.
    """
    faults = [fault for task in range(len(run.tasks)) if (fault := writing_fault(run, task)) is not None]
    if faults:
        raise DataError("\n".join(faults))


def writing_fault(run: Run, task: int) -> str | None:
    """Return why the run's model cannot generate the answers of a task; None if it can, or if it is a classifier.

    Raises:
        ConfigError: If the package of the task's metric is not installed.
    """
    if run.output != "lm":
        return None
    from cl_dist.data.text_faults import label_faults, length_faults
    from cl_dist.data.text_metrics import check_library

    config, data, codec = run.tasks.tasks[task], run.data(task), _codec(run.science.model.model_dump_json())
    try:
        check_library(config.metric)
    except ConfigError as error:
        raise ConfigError(f"tasks.{config.id}.{error}") from None
    lines = label_faults(data.labels, codec)
    has_candidates = any(isinstance(stage, Choose) for stage in run.stages())  # they answer the voting rows
    answered = ("test", "dev" if data.dev else "train") if has_candidates else ("test",)
    if too_long := list(length_faults(config, data, codec, run.max_length(task), answered)):
        lines.append(listing(too_long).lstrip())
    return f"task {config.id}: " + "\n  ".join(lines) if lines else None


def _adds_embeddings(run: Run) -> bool:
    """Return whether the model gets embeddings for tokens that the backbone lacks."""
    able = capabilities_of(run.science.method, run.science.model)
    return run.output == "lm" and not able.freezes_backbone


_REPORTS: dict[tuple[str, ...], "TokenReport"] = {}


def _token_report(run: Run, task: int, grows: bool) -> "TokenReport":
    from cl_dist.data.token_report import build_report
    from cl_dist.models.backbone import load_tokenizer, num_embeddings

    config, model = run.tasks.tasks[task], run.science.model
    data, length = run.data(task), run.max_length(task)
    key = (config.model_dump_json(), repr(sorted(data.digests.items())), model.model_dump_json(), f"{length} {grows}")
    if key not in _REPORTS:  # shared by a run and its baselines
        embeddings = None if grows else num_embeddings(model)
        _REPORTS[key] = build_report(config, data, load_tokenizer(model), length, embeddings)
    return _REPORTS[key]


@lru_cache(maxsize=2)
def _codec(model: str) -> "TextCodec":
    from cl_dist.data.language import TextCodec
    from cl_dist.models.backbone import load_tokenizer

    return TextCodec(load_tokenizer(ModelConfig.model_validate_json(model)))
