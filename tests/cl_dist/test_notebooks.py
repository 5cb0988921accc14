"""The example notebooks run from top to bottom, and each ends its cells with objects that show themselves."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from cl_dist import StoredRun

FOLDER = Path(__file__).parents[2] / "cl_dist/notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    notebook = json.loads(path.read_text("utf8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does; return the value of its last expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    notebook = json.loads(path.read_text("utf8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
    assert all(line.rstrip("\n") == line.rstrip() for text in cells(path, "markdown") for line in text.splitlines())


@pytest.mark.timeout(300)
def test_the_first_run_learns_two_tasks_and_shows_its_matrix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [run_cell(source, names) for source in cells(FOLDER / "first_run.ipynb", "code")]
    runs = [value for value in shown if isinstance(value, StoredRun)]
    assert len(runs) == 2
    for run in runs:
        html = run._repr_html_()
        assert html.count("<td") == 4
        assert "queue" in html
        assert "forgetting 0.000" in html
    matrix = runs[0].matrix
    assert min(score for row in matrix for score in row if score is not None) > 0.9
    predictions = next(value for value in shown if isinstance(value, list) and hasattr(value[0], "answer"))
    assert [each.answer for each in predictions] == ["billing", "login"]
