import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import read_allowed

ROOT = Path(__file__).parents[1]
SUITE = """
import pytest

def test_passes(): pass

@pytest.mark.skip(reason="no browser here")
def test_skips(): pass

@pytest.mark.xfail(reason="known")
def test_fails_as_expected(): assert False
"""


def run_suite(folder: Path, allowed: str, ci: str) -> subprocess.CompletedProcess[str]:
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "tests").mkdir()
    (folder / "tests" / "allowed_skips.txt").write_text(allowed)
    (folder / "tests" / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-p", "tests.skips", "--import-mode=importlib"]
    env = {**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)


def test_unknown_skip_fails_ci_and_is_printed(tmp_path: Path) -> None:
    result = run_suite(tmp_path, "# nothing\ntests/test_it.py::test_other :: no browser\n", ci="true")
    assert result.returncode == 1
    assert "tests/test_it.py::test_skips: Skipped: no browser here" in result.stdout
    assert "test_fails_as_expected:" not in result.stdout


@pytest.mark.parametrize(
    ("allowed", "ci"), [("tests/test_it.py::test_s* :: no browser\n", "true"), ("", "false"), ("", "")]
)
def test_allowed_skips_and_runs_outside_ci_pass(tmp_path: Path, allowed: str, ci: str) -> None:
    result = run_suite(tmp_path, allowed, ci)
    assert result.returncode == 0, result.stdout


def test_line_without_a_reason_names_its_place(tmp_path: Path) -> None:
    path = tmp_path / "allowed_skips.txt"
    path.write_text("# comment\n\ntests/test_it.py::test_skips\n")
    with pytest.raises(pytest.UsageError, match=r"allowed_skips.txt:3: expected"):
        read_allowed(path)
