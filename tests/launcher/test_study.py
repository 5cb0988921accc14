"""The verb `study`: plan, table, JSON, page and errors."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from cl_dist.contract import tiny
from launcher.report.study import p_value, write_page
from tests.launcher.commands import Cli, fresh, save_run

ARMS = {"plain": {"method": {"name": "sequential"}}, "own": {"method": {"name": "individual"}}}
TREE = {
    "base": "tiny.yaml",
    "arms": ARMS,
    "seeds": 2,
    "primary": {"arms": ["plain", "own"], "margin": 0.02},
    "comparisons": [{"arms": ["own", "plain"], "metric": "f1"}, {"arms": ["own", "plain"], "metric": "forgetting"}],
}


def study(folder: Path) -> Path:
    save_run(folder / "tiny.yaml", tiny.tree(folder, {"science": {"train": {"epochs": 1}}}, tasks=("food", "film")))
    return save_run(folder / "study.yaml", TREE)


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a study file whose study was computed, and what the command printed."""
    folder = tmp_path_factory.mktemp("studied")
    study(folder)
    ended = fresh("study", "study.yaml", cwd=folder)[0]
    assert ended.code == 0, ended.err
    return folder, ended.out


def test_table(computed: tuple[Path, str]) -> None:
    out = computed[1]
    for text in ("plain (sequential)", "own (individual)", "2/2", "plain - own (primary)", "forgetting", "(Holm)"):
        assert text in out
    assert "missing" not in out


def test_the_page_is_self_contained(computed: tuple[Path, str]) -> None:
    page = (computed[0] / "runs/study/report/index.html").read_text(encoding="utf8")
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    for text in ("Primary comparison", "minimum detectable difference", "McNemar", "4 of 4 runs", "<svg"):
        assert text in page
    HTMLParser().feed(page)


def test_plan_and_json(cli: Cli, computed: tuple[Path, str]) -> None:
    folder = computed[0]
    plan = cli("study", folder / "runs/study", "seeds=3", "--plan", "--json").json()
    assert [run["finished"] for run in plan["runs"]] == [True] * 4 + [False] * 2
    assert plan["hours"] > 0
    ended = cli("study", folder / "runs/study", "seeds=3", "--no-compute", "--json")
    assert ended.code == 0
    document = ended.json()
    assert (document["missing"], document["comparisons"][0]["pairs"]) == (2, 2)
    assert "2 of 6 runs are missing" in Path(document["report"]).read_text(encoding="utf8")
    text = cli("study", folder / "runs/study", "--plan").out
    assert "plain-o1-s1" in text
    assert "6 runs with 24 stages" in text  # the folder keeps the last study file


def test_hours_are_unknown_without_finished_stages(cli: Cli, tmp_path: Path) -> None:
    study(tmp_path)
    text = cli("study", "study.yaml", "--plan").out
    assert "unknown" in text
    assert not (tmp_path / "runs").exists()


def test_more_of_the_base_and_errors(cli: Cli, tmp_path: Path) -> None:
    study(tmp_path)
    assert cli("study", "study.yaml", "base.science.train.epochs=2", "--plan").code == 0
    ended = cli("study", "study.yaml", "primary.margin=2", "--plan")
    assert ended.code == 2
    assert "primary.margin" in ended.err
    assert cli("study", "nowhere.yaml").code == 2
    assert "expected a study file" in cli("study", tmp_path, "--plan").err


def test_names_cannot_leave_their_text_node(computed: tuple[Path, str], tmp_path: Path, cli: Cli) -> None:
    document: Any = cli("study", computed[0] / "runs/study", "--no-compute", "--json").json()
    for arm in document["arms"]:
        arm["arm"] = "<b onload=x>"
    document["comparisons"][0] |= {"name": "<script>alert(1)</script>", "sentence": "<script>alert(2)</script>"}
    page = write_page(document, tmp_path).read_text(encoding="utf8")
    assert "<script" not in page
    assert "<b onload" not in page


def test_a_change_of_the_margin_after_results_stands_on_the_page(cli: Cli, computed: tuple[Path, str]) -> None:
    ended = cli("study", computed[0] / "runs/study", "primary.margin=0.05", "--no-compute")
    assert "changed after 4 runs" in ended.out
    page = (computed[0] / "runs/study/report/index.html").read_text(encoding="utf8")
    assert "changed after 4 runs" in page
    assert "margin 2.00 points" in page


def test_p_values() -> None:
    assert [p_value(each) for each in (None, 0.00001, 0.0312, 1.0)] == ["\N{EN DASH}", "< .0001", ".0312", "1.0000"]
