"""What every test shares: an environment that computes the same everywhere, and a pool of two ranks."""

import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch and Ray are imported, here and in every process that a test starts.
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # `make test-gpu` sets cuda
os.environ |= {
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",  # some virtual machines announce AMX, then die (SIGILL) using it
    # `.venv/bin/python -m pytest` does not put its folder there, and tests start `ray`, shellcheck and hadolint.
    "PATH": f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    "RAY_AUTH_MODE": "disabled",  # local clusters on loopback; the joining nodes would have no token
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # 2 s by default, waited for at each report
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",  # 60 s by default, waited for when a node is gone
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
os.environ.pop("RAY_ADDRESS", None)  # never somebody's real cluster

from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

from cl_dist.contract.ranks import Ranks

ROOT = Path(__file__).parents[1]
RAY_FILES = {str(path.relative_to(ROOT)) for path in ROOT.glob("tests/**/test_*.py") if "mark.ray" in path.read_text()}

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

pytest.register_assert_rewrite("cl_dist.contract.test_contract")
pytest_plugins = ["tests.skips"]
_sessions: list[pytest.Session] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    _sessions.append(session)


def _starts_ray(nodeid: str) -> bool:
    return nodeid.partition("::")[0] in RAY_FILES


class _InTwoProcesses(LoadScopeScheduling):  # type: ignore[misc]  # the library carries no types
    """How xdist hands tests out: all files that start Ray to one process, and each other file to one."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if _starts_ray(nodeid) else nodeid.partition("::")[0]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return _InTwoProcesses(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):  # those that take longest first
        items.sort(key=lambda item: not _starts_ray(item.nodeid))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """End without running the destructors of the C++ libraries that a thousand tests have loaded.

    Twice a process whose tests had all passed died of a segmentation fault after its summary. What we start is closed
    by the tests that start it; Ray is left here.
    """
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(int(_sessions[0].exitstatus) if _sessions else 0)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """Two processes in one gloo group: `ranks.run(function, *args)` is function(rank, world, *args) on both."""
    pool = Ranks(world=2)
    yield pool
    pool.close()
