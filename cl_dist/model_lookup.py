"""Lookup of the stored model that answers for a task, and its verification. Torch-free."""

from collections.abc import Sequence

from cl_dist.config import did_you_mean
from cl_dist.errors import CheckpointError, ConfigError
from cl_dist.run import Run
from cl_dist.stage import Evaluate, StageRef, Train, model_after


def number_of(run: Run, task: str, option: str = "--task") -> int:
    """Return the position of a task in the sequence.

    Raises:
        ConfigError: If the run has no such task.
    """
    ids = [known.id for known in run.tasks.tasks]
    if task not in ids:
        raise ConfigError(f"{option} {task!r}: the run has no such task{did_you_mean(task, ids)}")
    return ids.index(task)


def last_learned(run: Run) -> int:
    """Return the last task with a finished Train stage.

    Raises:
        CheckpointError: If there is none.
    """
    for task in reversed(range(len(run.tasks))):
        if run.ledger.manifest(model_after(task)) is not None:
            return task
    raise CheckpointError(f"{run.config.folder}: no task has been trained yet; `cl-dist resume` continues the run")


def answering(run: Run, tasks: Sequence[int], after: int) -> list[tuple[Evaluate, list[int]]]:
    """Return the Evaluate stages that score some tasks after training on `after`, each with the tasks it scores.

    The plan decides: the last Evaluate stage scores the tasks whose model has changed, and the one before it the
    others. The weights of every model are checked against their manifests.

    Raises:
        ConfigError: If there is no model for a task.
        CheckpointError: If a model is missing or damaged.
    """
    found: dict[StageRef, tuple[Evaluate, list[int]]] = {}
    for task in tasks:
        stage = _scoring(run, task, after)
        if stage.model not in found:
            _check_stored(run, stage.model)
        found.setdefault(stage.model, (stage, []))[1].append(task)
    return list(found.values())


def _scoring(run: Run, task: int, after: int) -> Evaluate:
    stage = next((stage for stage in run.plan(after) if isinstance(stage, Evaluate)), None)
    while stage is not None and task not in stage.tasks:
        earlier = None if stage.previous is None else run.stage(stage.previous)
        stage = earlier if isinstance(earlier, Evaluate) else None
    if stage is None:
        asked, last = (run.tasks.tasks[number].id for number in (task, after))
        method = run.config.science.method.name
        raise ConfigError(f"task {asked}: after task {last} the method {method!r} has no model for it")
    return stage


def _check_stored(run: Run, model: StageRef | None) -> None:
    """Raise CheckpointError unless every stage of a model exists undamaged and has the run's settings."""
    while model is not None:
        stage = run.stage(model)
        run.ledger.is_done(stage)  # raises where it was made with other settings
        run.ledger.verify(model, ".safetensors")
        assert isinstance(stage, Train)
        model = stage.init
