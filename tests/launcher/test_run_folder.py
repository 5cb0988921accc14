"""A run folder is the same one however it is spelled, and has one driver, with its baselines."""

from pathlib import Path

import pytest

from cl_dist.storage import only_driver
from tests import tiny
from tests.launcher.commands import Cli, save_run


def trained(cli: Cli, folder: Path) -> Path:
    """Return the folder of a finished run with a baseline."""
    tree = tiny.tree(folder, {"run": {"name": "run"}, "science": {"method": {"name": "sequential"}}}, tasks=("food",))
    tree["baselines"] = {"other": {"seed": 1}}
    assert cli("train", save_run(folder / "run.yaml", tree)).code == 0
    return folder / "runs" / "run"


@pytest.mark.parametrize("spelled", [".", "metrics/..", "link"])
def test_a_run_folder_is_itself_however_it_is_spelled(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelled: str
) -> None:
    run = trained(cli, tmp_path)
    files = sorted(run.rglob("*"))
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path if spelled == "link" else run)
    ended = cli("resume", spelled)
    assert ended.code == 0, ended.err
    assert sorted(run.rglob("*")) == files
    assert "not begun" not in cli("status", spelled).out


def test_a_run_does_not_share_its_baseline_with_another_driver(cli: Cli, tmp_path: Path) -> None:
    run = trained(cli, tmp_path)
    with only_driver(run / "baselines" / "other"):
        ended = cli("resume", run)
        assert ended.code == 2
        assert "at work on this run" in ended.err.replace("\n", " ")
        assert cli("resume", run, "--no-baselines").code == 0
