"""Checks of a run before it starts workers: rows, tokenizer, labels and lengths."""

import logging
from functools import lru_cache
from typing import TYPE_CHECKING

from cl_dist.data.sources import listing
from cl_dist.errors import ConfigError, DataError
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
