"""Errors with an exit code; the message says what happened, what was expected and what to do."""

from collections.abc import Mapping
from typing import Any, ClassVar
from unicodedata import category

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of characters that a terminal interprets or does not show."""
JOINERS = "\u200c\u200d"
"""Zero-width (non-)joiners, which are part of words and emoji."""


def printable(text: str, keep: str = f"\n\t{JOINERS}") -> str:
    r"""Return a text with control, invisible and lone surrogate characters escaped as in Python (\x1b)."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(ascii(c)[1:-1] if category(c) in HIDDEN and c not in keep else c for c in text)


class ClDistError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        """Return the message with control characters escaped, since it may quote file contents."""
        return printable(super().__str__())


class ConfigError(ClDistError):
    """A setting is unknown, out of range, or contradicts another one."""

    exit_code = 2


class DataError(ClDistError):
    """A data file is missing or has invalid rows; the message names file, line and field."""

    exit_code = 3


class ClusterError(ClDistError):
    """The cluster does not have the resources that the run requests."""

    exit_code = 4


class TrainingError(ClDistError):
    """A stage failed more often than `cluster.max_failures` allows."""

    exit_code = 5


class ProtectionError(ClDistError):
    """Training changed weights that earlier tasks depend on."""

    exit_code = 5


class EmptiedParameterError(ClDistError):
    """A method reads a parameter where ZeRO-3 has emptied it."""

    exit_code = 5


class CheckpointError(ClDistError):
    """A stored result is missing, damaged, or differs in shape from what the run expects."""

    exit_code = 6


class StorageError(ClDistError):
    """The run folder cannot be written."""

    exit_code = 6


class RunInUseError(ClDistError):
    """Another driver is working on the run."""

    exit_code = 2


class OrderError(CheckpointError):
    """Finished tasks are missing from the sequence, or their order has changed."""

    exit_code = 6


class StageConflictError(CheckpointError):
    """The settings of a finished stage differ from those of this run."""

    def __init__(self, stage: str, changed: Mapping[str, tuple[object, object]]) -> None:
        diff = "\n".join(f"  {key}: finished with {old!r}, now {new!r}" for key, (old, new) in changed.items())
        if any(key.startswith(("rows.", "replay_rows.", "labels.")) for key in changed):
            diff += "\nThe rows of its tasks have changed since it was computed; rows.TASK are their digests."
        super().__init__(
            f"{stage} is already done with different settings:\n{diff}\n"
            "Restore them, or start a new run with run.name=... to keep both results."
        )
        self.stage, self.changed = stage, changed

    def __reduce__(self) -> tuple[Any, ...]:  # Ray pickles the error of a worker
        return type(self), (self.stage, self.changed)


class StoppedError(ClDistError):
    """The run was stopped on request; finished stages and the state of the current one are saved."""

    exit_code = 75


class JobError(ClDistError):
    """The job server of a cluster is not reachable, or a job does not exist."""

    exit_code = 7


class QualityError(ClDistError):
    """A finished run violates a bound set by `--fail-if`."""

    exit_code = 8


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise ConfigError with the field, its value and the expected value, unless ok."""
    if not ok:
        raise ConfigError(f"{name}={value!r}: expected {expected}")
