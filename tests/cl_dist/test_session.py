"""The front door: `from cl_dist import train, resume, load_run, load_exported, CtrClassifier`."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import cl_dist
from cl_dist import StoredRun, load_run, resume, run_events, train
from cl_dist.config import merged, parse
from cl_dist.contract import tiny
from cl_dist.errors import ConfigError, DataError
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from tests.launcher.commands import save_run

FAST = {"science": {"train": {"epochs": 1, "min_round_steps": 1}, "method": {"name": "sequential"}}}
BASELINES = {"individual": {"method": {"name": "individual"}}, "joint": {"method": {"name": "joint"}}}


def tree(folder: Path, **over: Any) -> dict[str, Any]:
    return merged(tiny.tree(folder, FAST, tasks=("food", "film")), over)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> StoredRun:
    """A finished run with two baselines."""
    return train(tree(tmp_path_factory.mktemp("stored"), baselines=BASELINES))


def test_import_of_the_package_imports_neither_torch_nor_ray() -> None:
    names = "[name for name in ('torch', 'ray', 'transformers') if name in sys.modules]"
    program = f"import sys, cl_dist; from cl_dist import train, resume, load_run; print({names})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_every_name_of_the_front_door_is_there() -> None:
    for name in cl_dist.__all__:
        assert getattr(cl_dist, name).__name__ == name
        assert name in dir(cl_dist)
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cl_dist.trian  # noqa: B018


def test_a_trained_run_has_its_results(stored: StoredRun) -> None:
    assert stored.tasks == ["food", "film"]
    summary = stored.summary()
    assert stored.matrix == summary["matrix"]["accuracy"]
    assert stored.matrix[0][1] is None
    assert summary["references"] == {"individual": "individual", "joint": "joint"}
    assert summary["metrics"]["cl/fwt_one"]["value"] is not None
    assert json.loads((stored.folder / "metrics/summary.json").read_text("utf8")) == summary
    assert [line.status for line in stored.progress()] == ["finished"] * 3
    assert [each.config.science.method.name for each in stored.baselines] == ["individual", "joint"]
    assert (stored.folder / "logs/driver.log").read_text("utf8").count("stage_done stage=01-film/train") == 3


def test_a_loaded_run_has_the_same_results_and_predicts(stored: StoredRun) -> None:
    again = load_run(stored.folder)
    assert again.summary() == stored.summary()
    rows = again.run.data(0).test
    found = again.predict("food", [row.text for row in rows])
    lines = (stored.folder / "stages/01-film/evaluate/predictions/food.jsonl").read_text("utf8").splitlines()
    assert [each.answer for each in found] == [json.loads(line)["prediction"] for line in lines]
    assert found[0].scores is not None
    assert sum(found[0].scores.values()) == pytest.approx(1.0)
    (scored,) = again.evaluate(["food"])
    assert scored["accuracy"] == again.matrix[1][0]


def test_texts_that_cannot_be_read_are_named(stored: StoredRun) -> None:
    with pytest.raises(ConfigError, match="'fod': the run has no such task; did you mean 'food'"):
        stored.predict("fod", ["a"])
    with pytest.raises(DataError, match="row 1: field text"):
        stored.predict("food", ["the soup", ""])
    with pytest.raises(DataError, match="row 0: field text_pair: task food has no text_pair"):
        stored.predict("food", ["the soup"], ["the cake"])
    with pytest.raises(DataError, match="1 texts and 2 pairs"):
        stored.predict("food", ["the soup"], ["the cake", "the film"])


def test_a_run_is_trained_from_a_file_plain_data_or_a_config_and_resumed(tmp_path: Path) -> None:
    events: list[str] = []
    plain = tree(tmp_path, science={"tasks": tree(tmp_path)["science"]["tasks"][:1]})
    path = save_run(tmp_path / "tiny.yaml", plain)
    first = train(path, watch=lambda event: events.append(event["event"]))
    assert events[0] == "open"
    assert events[-1] == "finished"
    before = (first.folder / "stages/00-food/train/manifest.json").read_bytes()
    assert (first.folder / "config.source.yaml").is_file()
    for source in (plain, parse(RunConfig, plain), str(path)):
        assert train(source, overrides=["cluster.max_failures=1"]).summary() == first.summary()
    added = save_run(tmp_path / "more.yaml", {"tasks": tree(tmp_path)["science"]["tasks"][1:]})
    assert resume(first.folder, add_tasks=added).tasks == ["food", "film"]
    assert (first.folder / "stages/00-food/train/manifest.json").read_bytes() == before
    assert json.loads((first.folder / "run.json").read_text("utf8"))["command"] == "cl_dist.train"


def test_each_run_is_built_once_and_each_summary_computed_once(
    stored: StoredRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    build, compute = Run.__init__, run_events.summary

    def built(self: Run, config: RunConfig) -> None:
        calls["runs"] += 1
        build(self, config)

    def computed(run: Run) -> dict[str, Any]:
        calls["summaries"] += 1
        return compute(run)

    monkeypatch.setattr(Run, "__init__", built)
    monkeypatch.setattr("cl_dist.stored_run.summary", computed)
    monkeypatch.setattr(run_events, "summary", computed)
    for verb in (resume, load_run):
        calls.clear()
        verb(stored.folder).write_summaries()
        assert calls == {"runs": 3, "summaries": 3}
