"""`resume --add-tasks`: a finished run learns on, as if it had known all tasks from the start."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_dist.contract import tiny
from tests import chaos
from tests.launcher.commands import Cli, save_run


def made(folder: Path, method: str, name: str, tasks: tuple[str, ...]) -> Path:
    over: dict[str, Any] = {"run": {"name": name}, "science": {"method": dict(tiny.METHODS[method])}}
    if tiny.writes(method):
        over["science"]["model"] = {"spare_task_tokens": 1}  # so that a third task needs a larger vocabulary
    tree = tiny.tree(folder, over, tasks=tiny.TASKS)
    tree["science"]["tasks"] = [task for task in tree["science"]["tasks"] if task["id"] in tasks]
    return save_run(folder / f"{name}.yaml", tree)


def third(folder: Path, method: str) -> Path:
    """Return a file with the task that is appended."""
    tree = yaml.safe_load(made(folder, method, "third", ("topic",)).read_text())
    path = folder / "more.yaml"
    path.write_text(yaml.safe_dump({"tasks": tree["science"]["tasks"]}))
    return path


@pytest.mark.parametrize("method", ["ctr", "lamol", "sequential"])
def test_an_appended_task_gives_what_a_run_of_all_tasks_gives(cli: Cli, tmp_path: Path, method: str) -> None:
    assert cli("train", made(tmp_path, method, "whole", tiny.TASKS)).code == 0
    assert cli("train", made(tmp_path, method, "grown", tiny.TASKS[:2])).code == 0
    run = tmp_path / "runs" / "grown"
    before = {path: path.stat().st_mtime_ns for path in run.rglob("manifest.json")}
    ended = cli("resume", run, "--add-tasks", third(tmp_path, method))
    assert ended.code == 0, ended.err
    assert {path: path.stat().st_mtime_ns for path in before} == before  # nothing finished is done twice
    assert chaos.digests(run) == chaos.digests(tmp_path / "runs" / "whole")
    again = cli("resume", run)  # the run file knows the task now
    assert again.code == 0
    document = json.loads((run / "metrics" / "summary.json").read_text())
    assert [task["id"] for task in document["tasks"]] == list(tiny.TASKS)


def test_orders_that_baselines_name_are_appended_to(cli: Cli, tmp_path: Path) -> None:
    made(tmp_path, "sequential", "grown", tiny.TASKS[:2])
    tree = yaml.safe_load((tmp_path / "grown.yaml").read_text())
    tree["science"] |= {"orders": {"back": ["film", "food"]}}
    tree["baselines"] = {"named": {"order": "back"}, "listed": {"order": ["film", "food"]}}
    assert cli("train", save_run(tmp_path / "grown.yaml", tree)).code == 0
    run = tmp_path / "runs" / "grown"
    ended = cli("resume", run, "--add-tasks", third(tmp_path, "sequential"))
    assert ended.code == 0, ended.err
    for name in ("named", "listed"):
        summary = json.loads((run / "baselines" / name / "metrics" / "summary.json").read_text())
        assert [task["id"] for task in summary["tasks"]] == ["film", "food", "topic"]


def test_joint_adds_a_stage_and_keeps_the_old_one(cli: Cli, tmp_path: Path) -> None:
    assert cli("train", made(tmp_path, "joint", "grown", tiny.TASKS[:2])).code == 0
    run = tmp_path / "runs" / "grown"
    assert cli("resume", run, "--add-tasks", third(tmp_path, "joint")).code == 0
    stages = sorted(str(path.parent.relative_to(run / "stages")) for path in run.rglob("manifest.json"))
    assert stages == ["01-film/evaluate", "01-film/train", "02-topic/evaluate", "02-topic/train"]


def test_what_cannot_be_appended_is_refused_before_anything_is_written(cli: Cli, tmp_path: Path) -> None:
    assert cli("train", made(tmp_path, "sequential", "grown", tiny.TASKS[:2])).code == 0
    run, more = tmp_path / "runs" / "grown", third(tmp_path, "sequential")
    config = (run / "config.yaml").read_bytes()
    tasks = yaml.safe_load(more.read_text())["tasks"]
    for text, message in (
        (yaml.safe_dump(tasks), "expected a mapping `tasks: [...]` with tasks"),
        ("tasks: [5]", "tasks.0=5: expected a task"),
        (
            yaml.safe_dump({"tasks": [{**tasks[0], "id": 7}]}),
            "tasks.0.id=7: Input should be a valid string; quote it: '7'",
        ),
        ("", "expected a mapping `tasks: [...]` with tasks"),
        (yaml.safe_dump({"tasks": []}), "expected a mapping `tasks: [...]` with tasks"),
        (yaml.safe_dump({"tasks": tasks, "seed": 1}), "and no other key"),
        (yaml.safe_dump({"tasks": [{**tasks[0], "id": "food"}]}), "the run already has food"),
        (yaml.safe_dump({"tasks": [{**tasks[0], "txt": "x"}]}), "unknown key 'txt'; did you mean 'text'?"),
    ):
        more.write_text(text)
        ended = cli("resume", run, "--add-tasks", more)
        assert ended.code == 2
        assert message in ended.err.replace("\n", " ")
    assert cli("resume", run, "--add-tasks", tmp_path / "absent.yaml").code == 2
    shutil.move(more, more.with_suffix(".bak"))
    ended = cli("resume", run, "science.order=[film, food]")
    assert ended.code == 6
    assert "must keep their positions" in ended.err.replace("\n", " ")
    assert (run / "config.yaml").read_bytes() == config
