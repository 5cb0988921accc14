"""Registration of a study: its primary comparison and margin, as they were before the first result."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cl_dist.errors import CheckpointError
from cl_dist.ledger import write_json
from cl_dist.study.file import REGISTERED, Study


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the primary comparison after results existed."""

    when: str
    after_runs: int
    old: dict[str, Any]
    new: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Registration:
    """The primary comparison in force, when it was registered, and its changes."""

    primary: dict[str, Any]
    when: str
    changes: tuple[Change, ...] = ()

    def document(self) -> dict[str, Any]:
        """Return it as plain data."""
        changes = [
            {"when": each.when, "after_runs": each.after_runs, "old": each.old, "new": each.new}
            for each in self.changes
        ]
        return {"primary": self.primary, "when": self.when, "changes": changes}


def registered(study: Study, finished: int) -> Registration:
    """Return the registration of a study, and note a change of the study file in it.

    Args:
        study: The study.
        finished: Number of finished runs. A change before the first one replaces the registration.

    Raises:
        CheckpointError: If the stored registration is damaged.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    primary, known = study.file.primary.model_dump(mode="json"), stored(study.folder)
    if known is None or (known.primary != primary and finished == 0 and not known.changes):
        return Registration(primary, now)
    if known.primary == primary:
        return known
    return Registration(primary, known.when, (*known.changes, Change(now, finished, known.primary, primary)))


def write(folder: Path, found: Registration) -> None:
    """Store a registration in the study folder."""
    write_json(folder / REGISTERED, found.document())


def stored(folder: Path) -> Registration | None:
    """Return the stored registration of a study folder, or None.

    Raises:
        CheckpointError: If it is damaged.
    """
    path = folder / REGISTERED
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        changes = tuple(Change(**each) for each in found["changes"])
        return Registration(dict(found["primary"]), str(found["when"]), changes)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged: {error}; restore it, or start the study in a new folder") from None
