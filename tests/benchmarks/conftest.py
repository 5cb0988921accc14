"""Figures of benchmarks: printed, compared with budgets, and stored for the page with `--figures FILE`."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

FIGURES = pytest.StashKey[list[dict[str, Any]]]()
Measured = Callable[..., bool]
"""Takes what was measured, its value, its text with a field for the value, `at_least` and `at_most`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--figures", type=Path, metavar="FILE", help="write what benchmarks measure to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FIGURES] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    path: Path | None = session.config.getoption("figures", None)
    if path and not exitstatus:
        found = {"cores": os.cpu_count(), "torch": torch.__version__, "figures": session.config.stash[FIGURES]}
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf8")


@pytest.fixture
def measured(pytestconfig: pytest.Config) -> Measured:
    """Return what keeps a figure and tells whether it is within its budget, which a benchmark asserts."""

    def take(
        what: str, value: float, text: str, *, at_least: float | None = None, at_most: float | None = None
    ) -> bool:
        limits = {"at least": at_least, "at most": at_most}
        budget = ", ".join(f"{name} {limit:g}" for name, limit in limits.items() if limit is not None)
        told = text.format(value)
        pytestconfig.stash[FIGURES].append({"what": what, "value": value, "text": told, "budget": budget})
        print(f"\n{what}: {told} ({budget or 'no budget'})")
        return (at_least is None or value >= at_least) and (at_most is None or value <= at_most)

    return take
