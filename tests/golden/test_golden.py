"""A rearrangement of the code changes no fingerprint and no byte of a result."""

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.runs import recipes
from tests.golden import golden

FINGERPRINTS = json.loads(golden.FINGERPRINTS.read_text())
RESULTS = json.loads(golden.RESULTS.read_text())


@pytest.mark.parametrize("recipe", recipes())
def test_every_stage_of_a_recipe_keeps_its_fingerprint(recipe: str) -> None:
    if absent := golden.needs(recipe):
        pytest.skip(f"needs data that cannot be redistributed: set {', '.join(absent)}")
    assert golden.fingerprints(recipe) == FINGERPRINTS[recipe]


@pytest.mark.parametrize("name", golden.RUNS)
def test_a_tiny_run_leaves_the_same_bytes(name: str, tmp_path: Path) -> None:
    found, kept = golden.result(tmp_path, name), RESULTS["runs"][name]
    if golden.machine() == RESULTS["machine"]:
        assert found["bytes"] == kept["bytes"]
    else:
        assert found["bytes"].keys() == kept["bytes"].keys()
        assert found["scores"].keys() == kept["scores"].keys()
        for file, scores in found["scores"].items():
            assert _numbers(scores) == pytest.approx(_numbers(kept["scores"][file]), abs=0.2), file


def _numbers(tree: Any) -> list[float]:
    """Return the numbers of a tree of plain data, in order."""
    if isinstance(tree, dict):
        return [number for key in sorted(tree) for number in _numbers(tree[key])]
    if isinstance(tree, list):
        return [number for each in tree for number in _numbers(each)]
    return [float(tree)] if isinstance(tree, int | float) and not isinstance(tree, bool) else []
