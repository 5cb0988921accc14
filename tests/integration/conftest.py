"""What the tests on Ray compare with: one run that nobody disturbed."""

from pathlib import Path

import pytest

from tests.integration import ray_runs


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a CTR run of three tasks on two Ray workers with ZeRO-2, computed by `cl-dist train`."""
    folder = tmp_path_factory.mktemp("ray")
    ray_runs.save_run(folder, "undisturbed")
    command = ray_runs.Command(folder, "train", "undisturbed.yaml")
    assert command.end(2 * ray_runs.START_S) == 0, command.output
    return folder / "runs" / "undisturbed"
