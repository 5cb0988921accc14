"""A run folder is the same one however it is spelled, and has one driver, with its baselines."""

import json
from pathlib import Path

import pytest

from cl_dist.contract import tiny
from cl_dist.storage import run_lock
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
    with run_lock(run / "baselines" / "other"):
        ended = cli("resume", run)
        assert ended.code == 2
        assert "working on this run" in ended.err.replace("\n", " ")
        assert cli("resume", run, "--no-baselines").code == 0


def test_a_run_is_resumed_where_it_is(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(cli, tmp_path)
    monkeypatch.chdir(tmp_path)
    for overrides in (["run.dir=new place"], ["run.name=other"], ["run={name: run, dir: new}"], ["run.dir=runs/.."]):
        ended = cli("resume", "runs/run", *overrides)
        assert ended.code == 2
        assert "move that folder and resume it there: mv runs/run " in ended.err.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["model", "runs"]
    assert cli("resume", "runs/run", "run.dir=./runs", "run.name=run").code == 0
    before = (run / "stages/00-food/train/manifest.json").read_bytes()
    run.rename(tmp_path / "moved")
    assert cli("resume", "moved").code == 0
    assert (tmp_path / "moved/stages/00-food/train/manifest.json").read_bytes() == before


@pytest.mark.parametrize("verb", ["status", "resume", "report", "inspect", "eval", "predict --task food"])
def test_a_folder_whose_name_is_none_for_a_run_says_so(cli: Cli, tmp_path: Path, verb: str) -> None:
    run = tmp_path / "moved run"
    run.mkdir()
    (run / "config.yaml").write_text("science: {}\n", encoding="utf8")
    first, *rest = verb.split()
    ended = cli(first, run, *rest)
    assert ended.code == 2
    assert "a run takes the name of its folder, and 'moved run' is not a valid name" in ended.err.replace("\n", " ")
    assert "rename the folder" in ended.err.replace("\n", " ")


def relabelled(path: Path, split: str) -> None:
    """Give every row of a split the label 'good'."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]
    tiny.save_rows(path, [row | ({"label": "good"} if row["split"] == split else {}) for row in rows])


@pytest.mark.parametrize(
    ("split", "verb"),
    [
        *(("test", "report"), ("test", "report --json"), ("test", "eval"), ("dev", "report"), ("dev", "eval")),
        *(("test", "resume"), ("dev", "predict --task food"), ("dev", "export {new} --task food")),
    ],
)
def test_rows_that_have_changed_since_are_told_and_nothing_is_written(
    cli: Cli, tmp_path: Path, split: str, verb: str
) -> None:
    run = trained(cli, tmp_path)
    assert cli("report", run).code == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    relabelled(tmp_path / "food.jsonl", split)
    first, *rest = verb.replace("{new}", str(tmp_path / "new")).split()
    ended = cli(first, run, *rest)
    told = ended.json()["message"] if "--json" in rest else ended.err
    assert ended.code == 6, told
    assert "The rows of its tasks have changed since it was computed" in told.replace("\n", " ")
    assert "rows.food" in told
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_reference_whose_rows_have_changed_since_is_told(cli: Cli, tmp_path: Path) -> None:
    run = trained(cli, tmp_path / "one")
    tree = tiny.tree(tmp_path / "two", {"science": {"method": {"name": "joint"}}}, tasks=("food",))
    assert cli("train", save_run(tmp_path / "two.yaml", tree)).code == 0
    relabelled(tmp_path / "two" / "food.jsonl", "test")
    for command in ([run, "--reference", f"joint={tmp_path}/two/runs/tiny"], [run, tmp_path / "two/runs/tiny"]):
        ended = cli("report", *command)
        assert ended.code == 6
        assert "have changed since it was computed" in ended.err.replace("\n", " ")
