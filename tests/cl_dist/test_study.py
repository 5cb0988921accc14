"""Studies: their files, the runs that these expand to, shared stages, a kill, and the numbers of the results."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_dist.contract import tiny
from cl_dist.errors import CheckpointError, ConfigError
from cl_dist.ledger import MANIFEST
from cl_dist.stage import ref
from cl_dist.study import driver, read_study, registration, run_study
from cl_dist.study.driver import OpenStudy
from cl_dist.study.file import REGISTERED, StudyRun
from cl_dist.study.results import KEYS

ROOT = Path(__file__).parents[2]
TASKS = ("food", "film")
PROGRAM = """
import sys
from pathlib import Path
from cl_dist.study import read_study, run_study
run_study(read_study(Path(sys.argv[1])), parallel=2)
"""
SEQUENTIAL = {"method": {"name": "sequential"}}
ARMS = {
    "plain": SEQUENTIAL,
    "longer": {**SEQUENTIAL, "tasks.food.train": {"epochs": 2}},
    "own": {"method": {"name": "individual"}},
}
"""The first two are equal up to their second task, so that they share the stages of the first."""


def save(folder: Path, **over: Any) -> Path:
    """Write a study of three arms and two seeds with its base; return the path of the study file."""
    base = tiny.tree(folder, {"science": {"train": {"epochs": 1}}}, tasks=TASKS)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(base), encoding="utf8")
    tree = {
        "base": "tiny.yaml",
        "dir": str(folder),
        "arms": ARMS,
        "orders": [["film", "food"]],
        "seeds": 2,
        "primary": {"arms": ["longer", "plain"], "margin": 0.02},
        "comparisons": [{"arms": ["plain", "own"], "metric": each} for each in KEYS],
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(tree | over, sort_keys=False), encoding="utf8")
    return path


def without_times(node: Any) -> Any:
    """Return study.json without what a second computation of the same study changes."""
    if isinstance(node, dict):
        return {key: without_times(value) for key, value in node.items() if key not in ("seconds", "when")}
    return [without_times(item) for item in node] if isinstance(node, list) else node


def inodes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A study file whose study was computed without interruption, and its document."""
    path = save(tmp_path_factory.mktemp("study"))
    return path, run_study(read_study(path))


def test_equal_stages_are_computed_once(finished: tuple[Path, Any]) -> None:
    path, document = finished
    assert document["missing"] == 0
    assert document["stages"] == {"of_runs": 26 - 2, "distinct": 20}
    runs = path.parent / "small" / "runs"
    for seed in (0, 1):
        plain, longer = (inodes(runs / f"{arm}-o1-s{seed}" / "stages") for arm in ("plain", "longer"))
        assert {name for name in plain if plain[name] == longer.get(name)} == {
            name for name in plain if name.startswith("00-film/")
        }


def test_means_are_those_of_the_summaries(finished: tuple[Path, Any]) -> None:
    path, document = finished
    summaries = {
        name: json.loads((path.parent / "small/runs" / name / "metrics/summary.json").read_text())
        for name in (run["run"] for run in document["runs"])
    }
    for arm in document["arms"]:
        own = [found for name, found in summaries.items() if name.startswith(f"{arm['arm']}-")]
        for metric in ("accuracy", "f1", "forgetting"):
            values = [found["metrics"][KEYS[metric]]["value"] for found in own]
            assert arm["metrics"][metric]["value"] == pytest.approx(sum(values) / 2), (arm["arm"], metric)
    plain = next(arm for arm in document["arms"] if arm["arm"] == "plain")
    learned = {
        arm: [summaries[f"{arm}-o1-s{seed}"]["metrics"]["cl/learning_acc"]["value"] for seed in (0, 1)]
        for arm in ("plain", "own")
    }
    transfer = sum(learned["plain"]) / 2 - sum(learned["own"]) / 2
    assert plain["metrics"]["transfer"]["value"] == pytest.approx(transfer)
    against_own = next(line for line in document["comparisons"] if line["metric"] == "transfer")
    assert against_own["value"] == pytest.approx(transfer)
    difference = next(line for line in document["comparisons"] if line["name"] == "plain - own")
    assert difference["value"] == pytest.approx(sum(each["value"] for each in difference["by_pair"]) / 2)


@pytest.mark.timeout(300)  # three processes that import torch, on a machine that may be busy
def test_a_study_whose_processes_are_killed_continues_to_the_same_table(
    finished: tuple[Path, Any], tmp_path: Path
) -> None:
    """SIGKILL hits the driver while two worker processes compute runs."""
    path = save(tmp_path)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(path)], env={**os.environ, "PYTHONPATH": paths}, stderr=subprocess.DEVNULL
    )
    folder = tmp_path / "small"
    until = time.monotonic() + 80
    while len(list(folder.glob(f"runs/*/stages/*/*/{MANIFEST}"))) < 5 and time.monotonic() < until:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    study = read_study(folder)
    assert OpenStudy(study).plan()[0].done > 0
    assert len(OpenStudy(study).done()) < 6
    partly = run_study(study, compute=False)
    assert partly["missing"] > 0
    assert without_times(run_study(read_study(path))) == without_times(finished[1])


def test_a_damaged_stage_of_another_run_is_not_shared(finished: tuple[Path, Any], tmp_path: Path) -> None:
    study = read_study(save(tmp_path))
    opened, other = OpenStudy(study), OpenStudy(read_study(finished[0]))
    stage, _ = opened.stages["plain-o1-s0"][0]
    source = other.runs["plain-o1-s0"].ledger.path(ref(stage))
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(source), str(copy)], check=True)
    ledger = opened.runs["plain-o1-s0"].ledger
    (copy / "train.json").write_text("{}", encoding="utf8")
    assert not ledger.adopt(stage, copy)
    assert all(path.stat().st_nlink == 1 for path in copy.rglob("*") if path.is_file())  # nothing is left of the try
    assert not opened.runs["own-o1-s0"].ledger.adopt(opened.stages["own-o1-s0"][0][0], source)  # another fingerprint
    assert not ledger.adopt(stage, tmp_path / "nowhere")
    assert ledger.adopt(stage, source)
    ledger.verify(ref(stage))


def test_plan_tells_hours_from_finished_stages_and_is_silent_without(
    finished: tuple[Path, Any], tmp_path: Path
) -> None:
    path = finished[0]
    more = OpenStudy(read_study(path, ["seeds=3"]))
    plans = {line.arm: line for line in more.plan()}
    assert all(line.runs == 3 and line.finished == 2 for line in plans.values())
    assert all(line.hours is not None and line.hours > 0 for line in plans.values())
    assert (plans["plain"].shared, plans["longer"].shared) == (0, 2)
    assert {line.hours for line in OpenStudy(read_study(save(tmp_path))).plan()} == {None}


def test_a_change_of_the_primary_comparison_after_results_is_noted(finished: tuple[Path, Any]) -> None:
    path, _ = finished
    study = read_study(path, ["primary.margin=0.05"])
    found = registration.registered(study, finished=6)
    assert [(each.after_runs, each.old["margin"], each.new["margin"]) for each in found.changes] == [(6, 0.02, 0.05)]
    assert registration.registered(study, finished=0).changes == ()
    assert registration.registered(read_study(path), finished=6).changes == ()
    document = run_study(study, compute=False)
    assert document["registered"]["changes"][0]["after_runs"] == 6
    back = run_study(read_study(path), compute=False)
    assert len(back["registered"]["changes"]) == 2
    other = run_study(read_study(path, ["seeds=[7, 8]", "primary.margin=0.03"]), compute=False)
    assert other["registered"]["changes"][2]["after_runs"] == 6  # runs of earlier seeds count
    run_study(read_study(path), compute=False)


def test_a_damaged_registration_is_an_error(tmp_path: Path) -> None:
    (tmp_path / REGISTERED).write_text("{}", encoding="utf8")
    with pytest.raises(CheckpointError, match="damaged"):
        registration.stored(tmp_path)


def test_an_arm_that_changes_after_results_is_refused(finished: tuple[Path, Any]) -> None:
    with pytest.raises(CheckpointError, match="run plain-o1-s0: 00-film/train is already done"):
        run_study(read_study(finished[0], ["arms.plain={method: {name: sequential}, train: {epochs: 3}}"]))


class Fake:
    """Workers that compute nothing; the first run finds no room on the cluster, and one run may fail."""

    tried: list[str] = []
    fails = ""

    def __init__(self, log: Path) -> None:
        pass

    def compute(self, run: StudyRun, command: str) -> None:
        type(self).tried.append(run.name)
        time.sleep(0.3)  # the other worker takes a run meanwhile
        if run.name == self.fails:
            raise driver.StudyRunError("diverged", 5)
        if self.tried.index(run.name) == 0 and self.tried.count(run.name) == 1:
            raise driver.StudyRunError("no room", 4)

    def stop(self) -> None:
        pass


def test_a_run_without_room_on_the_cluster_waits_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_Worker", Fake)
    monkeypatch.setattr(Fake, "tried", [])
    notes: list[str] = []
    run_study(read_study(save(tmp_path)), parallel=2, note=notes.append)
    assert len(Fake.tried) == 7
    assert len(set(Fake.tried)) == 6
    assert [line for line in notes if "has no room" in line]


def test_a_failed_run_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_Worker", Fake)
    monkeypatch.setattr(Fake, "tried", ["none"])
    monkeypatch.setattr(Fake, "fails", "own-o1-s0")
    with pytest.raises(driver.StudyRunError, match="diverged") as failed:
        run_study(read_study(save(tmp_path)), parallel=2)
    assert failed.value.exit_code == 5
    assert len(Fake.tried) < 6


class TestFile:
    def test_arms_are_nested_or_dotted(self, tmp_path: Path) -> None:
        arms = {
            "a": {"method": {"name": "hat", "tsm_size": 8}, "train": {"lr": 0.5}},
            "b": {"science.train.lr": 0.25, "method.s_max": 9, "cluster": {"max_failures": 1}},
            "c": {"science": {"method": {"gate_lr": 0.5}}, "tasks.film.rows": {"train": 4}},
        }
        path = save(tmp_path, arms=arms, primary={"arms": ["a", "b"], "margin": 0.01}, comparisons=[])
        a, b, c = (read_study(path).of_arm(arm)[0].config for arm in arms)
        assert (a.science.method.name, a.science.train.lr, a.science.train.epochs) == ("hat", 0.5, 1)
        assert a.science.method.changed()["tsm_size"] == 8
        assert "gate_lr" not in a.science.method.model_fields_set  # replaced, not merged with that of the base
        assert (b.science.method.name, b.science.method.changed()["s_max"]) == ("ctr", 9)
        assert (b.science.train.lr, b.cluster.max_failures) == (0.25, 1)
        assert c.science.method.changed()["tsm_size"] == 24
        assert next(task for task in c.science.tasks if task.id == "film").rows.train == 4

    def test_designs(self, tmp_path: Path) -> None:
        path = save(tmp_path, orders=2, seeds=[5, 7])
        crossed = read_study(path)
        assert [pair.name for pair in crossed.pairs] == ["o1-s5", "o1-s7", "o2-s5", "o2-s7"]
        assert [run.name for run in crossed.runs][:4] == ["plain-o1-s5", "longer-o1-s5", "own-o1-s5", "plain-o1-s7"]
        paired = read_study(path, ["design=paired"])
        assert [pair.name for pair in paired.pairs] == ["o1-s5", "o2-s7"]
        assert [run.config.science.seed for run in paired.of_arm("own")] == [5, 7]
        assert {pair.order for pair in paired.pairs} == {("food", "film"), ("film", "food")}
        with pytest.raises(ConfigError, match="as many of each"):
            read_study(path, ["design=paired", "seeds=3"])

    def test_more_random_orders_extend_fewer(self, tmp_path: Path) -> None:
        path = save(tmp_path, orders=1)
        assert read_study(path, ["orders=2"]).pairs[0].order == read_study(path).pairs[0].order
        with pytest.raises(ConfigError, match="only 2 orders"):
            read_study(path, ["orders=3"])

    def test_an_arm_runs_some_pairs(self, tmp_path: Path) -> None:
        path = save(tmp_path, seeds=3)
        some = read_study(path, ["arms.own.pairs=1"])
        assert [run.name for run in some.of_arm("own")] == ["own-o1-s0"]
        assert [run.name for run in read_study(path, ["arms.own.pairs=[1, 3]"]).of_arm("own")] == [
            "own-o1-s0",
            "own-o1-s2",
        ]
        with pytest.raises(ConfigError, match="from 1 to 3"):
            read_study(path, ["arms.own.pairs=4"])

    @pytest.mark.parametrize(
        ("override", "message"),
        [
            ("primary.arms=[plain, plane]", "did you mean 'plain'"),
            ("primary.arms=[own, own]", "two different arms"),
            ("arms.plain.run={name: x}", "the study names its runs"),
            ("arms.plain.trian={lr: 1}", "arms.plain: .*trian"),
            ("seeds=0", "at least one"),
            ("seeds=[1, 1]", "distinct"),
            ("orders=[[food]]", "each of food, film once"),
            ("comparisons=[{arms: [longer, plain]}]", "occurs twice"),
            ("alone=nobody", "is not an arm"),
            ("primary.margin=null", "margin"),
            ("base=nowhere.yaml", "nowhere"),
        ],
    )
    def test_faults(self, tmp_path: Path, override: str, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_study(save(tmp_path), [override])
