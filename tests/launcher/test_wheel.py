import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = "import launcher.cli; print(launcher.cli.__file__); launcher.cli.main()"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT), cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


def run(*args: str, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_wheel_holds_both_packages_with_their_data_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"cl_dist", "launcher", "cl_dist-0.1.0.dist-info"}
    data = [
        *ROOT.glob("*/py.typed"),
        *ROOT.glob("cl_dist/**/*.md"),
        *ROOT.glob("launcher/recipes/*"),
        *ROOT.glob("launcher/templates/*"),
    ]
    assert {str(path.relative_to(ROOT)) for path in data} <= names
    assert not any(name.startswith(("launcher/pictures", "launcher/tables")) for name in names)


def test_installed_wheel_lists_its_recipes_away_from_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    run("-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel), cwd=tmp_path)
    where, *recipes = run(
        "-c", PROGRAM, "list", "recipes", cwd=tmp_path, PYTHONPATH=str(target), PYTHONSAFEPATH="1"
    ).splitlines()
    assert Path(where).is_relative_to(target)
    assert any("ctr-demo" in line for line in recipes)
