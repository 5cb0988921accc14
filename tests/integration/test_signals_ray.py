"""Signals to all processes of a run on Ray, as a closed terminal or Slurm sends them: its gang is still saved."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from tests.integration import ray_runs
from tests.integration.ray_runs import Command, events

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


def everywhere(command: Command, number: signal.Signals) -> None:
    """Send a signal to a driver and to all processes below it."""
    for pid in command.family():
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    command.signal(number)


def test_a_signal_to_all_processes_saves_the_stage_and_what_is_ignored_stays_so(tmp_path: Path) -> None:
    ray_runs.save_run(tmp_path, "grouped")
    run = tmp_path / "runs" / "grouped"
    command = Command(tmp_path, "train", "grouped.yaml", "science.train.epochs=3000", inside=["env", "nohup"])
    command.wait_until(lambda: any(event["event"] == "round" for event in events(run)), "task 0 trains")
    everywhere(command, signal.SIGHUP)  # nohup: nothing happens
    rounds = len(events(run))
    command.wait_until(lambda: len(events(run)) > rounds + 1, "it goes on")
    everywhere(command, signal.SIGUSR1)
    assert command.end(ray_runs.START_S) == 75, command.output
    assert "stopped by SIGUSR1" in command.output
    assert json.loads((run / "run.json").read_text(encoding="utf8"))["status"] == "stopped"
    assert any((run / "stages").glob("00-food/train.partial-*/checkpoints/*"))
    assert not any(event["event"] == "gang_restart" for event in events(run))
