"""The pytest plugin of the contract suite: options --method and --settings, and a pool of two ranks."""

import json
import os
from collections.abc import Iterator

import pytest

from cl_dist.contract.ranks import Ranks

# Before torch is imported, here and in every rank: the same bits everywhere, and no network.
for _name, _value in {
    "DS_ACCELERATOR": "cpu",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(_name, _value)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("cl-dist")
    group.addoption("--method", help="method to test: 'package.module:METHOD', or a name; default: all of cl-dist")
    group.addoption("--settings", default="{}", help="JSON: settings with which the method learns within 20 steps")


def pytest_configure(config: pytest.Config) -> None:
    """Know the marker of pytest-timeout where that is not installed, and add the method's settings to the tiny runs."""
    config.addinivalue_line("markers", "timeout(seconds): limit of pytest-timeout")
    if (name := config.getoption("--method")) is not None:
        from cl_dist.contract import tiny  # imports torch, which reads the environment

        tiny.METHODS.setdefault(name, {"name": name, **json.loads(config.getoption("--settings"))})


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes in one gloo group."""
    pool = Ranks(world=2)
    yield pool
    pool.close()
