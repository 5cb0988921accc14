"""Errors that tell a user what happened, what was expected and what to do; each knows its exit code."""

from collections.abc import Mapping
from typing import Any, ClassVar
from unicodedata import category

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of what a terminal acts upon or does not show."""
JOINERS = "\u200c\u200d"
"""Of these the ones that belong to words: they join letters, and emoji."""


def printable(text: str, keep: str = f"\n\t{JOINERS}") -> str:
    r"""Return a text with control characters, invisible ones and halves of pairs escaped as in Python (\x1b)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if category(c) in HIDDEN and c not in keep else c for c in text)


class ClDistError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """Return the message, fit for a terminal: it may quote what a file holds."""
        return printable(super().__str__())


class ConfigError(ClDistError):
    """A setting is unknown, out of range, or contradicts another one."""

    exit_code = 2


class DataError(ClDistError):
    """A data file is missing or holds rows that cannot be used; the message names file, line and field."""

    exit_code = 3


class ClusterError(ClDistError):
    """The cluster cannot satisfy what the run asks for."""

    exit_code = 4


class TrainingError(ClDistError):
    """A stage failed more often than `cluster.max_failures` allows."""

    exit_code = 5


class ProtectionError(ClDistError):
    """What earlier tasks need has moved in training."""

    exit_code = 5


class EmptiedParameterError(ClDistError):
    """A method reads a parameter where ZeRO-3 has emptied it."""

    exit_code = 5


class CheckpointError(ClDistError):
    """A stored result is missing, damaged, or of another shape than the run expects."""

    exit_code = 6


class StorageError(ClDistError):
    """The run folder cannot be written."""

    exit_code = 6


class RunInUseError(ClDistError):
    """Another driver is at work on the run."""

    exit_code = 2


class OrderError(CheckpointError):
    """Finished tasks are missing from the sequence, or stand in another order."""

    exit_code = 6


class StageConflictError(CheckpointError):
    """A finished stage was made with other settings than this run asks for."""

    def __init__(self, stage: str, changed: Mapping[str, tuple[object, object]]) -> None:
        diff = "\n".join(f"  {key}: finished with {old!r}, now {new!r}" for key, (old, new) in changed.items())
        if any(key.startswith(("rows.", "replay_rows.", "labels.")) for key in changed):
            diff += "\nThe rows of its tasks are not those that it was computed on; rows.TASK are their digests."
        super().__init__(
            f"{stage} is already done with other settings:\n{diff}\n"
            "Restore them, or start a new run with run.name=... to keep both results."
        )
        self.stage, self.changed = stage, changed

    def __reduce__(self) -> tuple[Any, ...]:  # without it, Ray cannot bring the error back from a worker
        return type(self), (self.stage, self.changed)


class StoppedError(ClDistError):
    """The run was asked to stop; what is finished, and the stage it was at, are kept."""

    exit_code = 75


class JobError(ClDistError):
    """A cluster's job server cannot be reached, or a job is not there."""

    exit_code = 7


class QualityError(ClDistError):
    """A run is finished, but misses a bound that `--fail-if` sets."""

    exit_code = 8


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError naming the field, its value and what was expected, unless ok."""
    if not ok:
        raise ConfigError(f"{name}={value!r}: expected {expected}")
