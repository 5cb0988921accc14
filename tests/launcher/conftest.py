"""The command line, a run file that nothing was computed of, and one whose run is finished."""

import logging
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_dist.contract import tiny
from cl_dist.stopping import STOPS
from tests.launcher.commands import BASELINES, TASKS, Cli, fresh, save_run


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    """Undo what the command line does to its process."""
    log, handlers = logging.getLogger("cl_dist"), {number: signal.getsignal(number) for number in STOPS}
    before = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.level, log.propagate = before
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, _as_it_was: None) -> Cli:
    monkeypatch.chdir(tmp_path)
    return Cli(capsys, monkeypatch)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run file of two tasks that nothing was computed of."""
    return save_run(tmp_path / "tiny.yaml", tiny.tree(tmp_path, tasks=TASKS))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run file whose run was computed to its end, with two baselines, by a process of its own."""
    folder = tmp_path_factory.mktemp("finished")
    save_run(folder / "tiny.yaml", tiny.tree(folder, tasks=TASKS) | {"baselines": BASELINES})
    ended = fresh("train", "tiny.yaml", cwd=folder)[0]
    assert ended.code == 0, ended.err
    return folder
