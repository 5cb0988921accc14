"""Signals as shells, terminals and schedulers send them: saved and resumable, or ignored where they are ignored."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_dist.contract import tiny
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.errors import StoppedError
from cl_dist.stopping import STOPS, kept_from_children, signals_noted, stop_on_signals
from tests.launcher.commands import ROOT, TASKS, save_run

STEPS = 3000


def long_run(folder: Path) -> Path:
    return save_run(folder / "tiny.yaml", tiny.tree(folder, {"science": {"train": {"epochs": STEPS}}}, tasks=TASKS))


def start(folder: Path, ignored: tuple[signal.Signals, ...] = (), **options: Any) -> "subprocess.Popen[bytes]":
    """Start a run that takes long, with signals ignored as a shell or nohup does it, and wait until it trains."""

    def ignore() -> None:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)

    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "train", str(folder / "tiny.yaml")],
        **{"cwd": folder, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, "stdout": log, "stderr": log, **options},
        preexec_fn=ignore,
    )
    wait_for(lambda: trains(folder), process)
    return process


def trains(folder: Path) -> bool:
    events = folder / "runs/tiny/metrics/events.jsonl"
    return events.exists() and '"round"' in events.read_text(encoding="utf8")


def wait_for(claim: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 100
    while not claim():
        assert process.poll() is None, process.returncode
        assert time.monotonic() < deadline
        time.sleep(0.1)


def ended(process: "subprocess.Popen[bytes]", folder: Path) -> tuple[int, str, bool, str]:
    """Return exit code, status, whether a checkpoint of the stage is kept, and what was written."""
    code = process.wait(timeout=100)
    status = json.loads((folder / "runs/tiny/run.json").read_text(encoding="utf8"))["status"]
    kept = any((folder / "runs/tiny/stages").glob("00-food/train.partial-*/checkpoints/*"))
    return code, status, kept, (folder / "log").read_text(encoding="utf8", errors="replace")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_what_schedulers_send_saves_the_stage_and_exits_75(tmp_path: Path, number: signal.Signals) -> None:
    long_run(tmp_path)
    process = start(tmp_path)
    process.send_signal(number)
    time.sleep(0.01)
    process.send_signal(number)  # they send it twice
    code, status, kept, said = ended(process, tmp_path)
    assert (code, status, kept) == (75, "stopped", True), said
    assert f"stopped by {number.name}; `cl-dist resume`" in said
    assert "Traceback" not in said


def test_ctrl_c_saves_the_stage_and_exits_130(tmp_path: Path) -> None:
    long_run(tmp_path)
    process = start(tmp_path)
    process.send_signal(signal.SIGINT)
    code, status, kept, said = ended(process, tmp_path)
    assert (code, status, kept, "Traceback" in said) == (130, "interrupted", True, False), said


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    """SIGINT in a background job of a script, SIGHUP under nohup, SIGUSR1 by a shell's trap ''."""
    long_run(tmp_path)
    process = start(tmp_path, ignored=(signal.SIGINT, signal.SIGHUP, signal.SIGUSR1))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        process.send_signal(number)
    rounds = (tmp_path / "log").read_text(encoding="utf8").count("round stage=")
    wait_for(lambda: (tmp_path / "log").read_text(encoding="utf8").count("round stage=") > rounds + 1, process)
    process.send_signal(signal.SIGTERM)
    code, status, kept, said = ended(process, tmp_path)
    assert (code, status, kept, "Traceback" in said) == (75, "stopped", True, False), said


def test_a_terminal_that_is_closed_leaves_a_run_that_resumes(tmp_path: Path) -> None:
    long_run(tmp_path)
    master, slave = pty.openpty()
    process = start(tmp_path, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    os.close(master)  # from now on its progress bar cannot be written
    os.killpg(process.pid, signal.SIGHUP)
    code, status, kept, _ = ended(process, tmp_path)
    assert (code, status, kept) == (75, "stopped", True)


def test_a_pause_is_no_end(tmp_path: Path) -> None:
    long_run(tmp_path)
    process = start(tmp_path)
    process.send_signal(signal.SIGSTOP)
    time.sleep(0.5)
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert ended(process, tmp_path)[:3] == (75, "stopped", True)


def test_a_stage_that_was_stopped_is_never_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the handler of a caller does: here it lets the program go on."""
    opened = tiny.make_run(tmp_path)
    job, heard = opened.job(opened.plan(0)[0]), list[int]()
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:

        def stopped(*args: object) -> None:
            signal.raise_signal(signal.SIGTERM)
            raise StoppedError("stopped after step 1")

        monkeypatch.setattr("cl_dist.stages.train.run", stopped)
        tracker: Any = type("Silent", (), {"event": lambda self, event: None})()
        with pytest.raises(StoppedError, match="after step 1"):
            LocalDispatcher().run(job, str(tmp_path / "out"), tracker)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_second_signal_does_not_cut_the_end_in_two() -> None:
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
        stop_on_signals()
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_IGN
        with signals_noted() as noted:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGUSR2)
        assert noted == [signal.SIGHUP]
        with pytest.raises(StoppedError, match="stopped by SIGHUP"):
            signal.raise_signal(noted[0])
        for number in STOPS:
            signal.raise_signal(number)  # nothing happens
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_processes_that_a_run_starts_live_through_a_signal_to_their_group() -> None:
    code = "import signal, time; signal.raise_signal(signal.SIGHUP); print('lives')"
    with kept_from_children():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert (done.returncode, done.stdout) == (0, "lives\n")
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, set())
