"""A method of another package: named in the run file, found as an entry point, and tested by the contract suite."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.errors import ConfigError
from cl_dist.methods import descriptions, get_method
from cl_dist.methods import registry as lookup
from cl_dist.run_config import RunConfig
from cl_dist.stage import ref
from tests.pages.markdown import blocks

ROOT = Path(__file__).parents[2]
SKELETON = Path(__file__).parent / "skeleton"
NAME = "my_pkg.probe:METHOD"
pytestmark = pytest.mark.timeout(600)


def install(folder: Path, entry_point: str = NAME) -> Path:
    """Put the skeleton into a folder as pip would, with an entry point."""
    shutil.copytree(SKELETON, folder, dirs_exist_ok=True)
    (folder / "my_pkg" / "broken.py").write_text("raise RuntimeError('no licence')\n")
    info = folder / "my_pkg-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-pkg\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[cl_dist.methods]\nprobe = {entry_point}\n")
    return folder


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = install(tmp_path / "site")
    monkeypatch.syspath_prepend(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        monkeypatch.delitem(sys.modules, name)
    return folder


def test_the_page_of_methods_shows_the_skeleton() -> None:
    page = (ROOT / "cl_dist/methods/README.md").read_text(encoding="utf8")
    shown = [block.text for block in blocks("cl_dist/methods/README.md", page) if block.language == "python"]
    assert shown == [
        (SKELETON / "my_pkg" / name).read_text(encoding="utf8") for name in ("probe.py", "probe_learner.py")
    ]


def contract(package: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    """Run the contract suite from outside the project."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cl_dist.contract.plugin", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "--pyargs", "cl_dist.contract", *options],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", [NAME, "probe"])
def test_a_run_with_a_method_of_another_package_is_computed(tmp_path: Path, package: Path, name: str) -> None:
    over = {"science": {"method": {"name": name, "scale": 2.0}, "train": {"epochs": 1, "min_round_steps": 1}}}
    run = tiny.compute(tiny.make_run(tmp_path, over, tasks=("food",)))
    facts = run.facts(run.plan(0)[0])
    assert (facts["method.name"], facts["method.scale"], facts["method_version"]) == (name, 2.0, "1")
    assert run.ledger.read(ref(run.plan(0)[0]), "train.json")["metrics"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_pkg.probe:METHOD", "no module 'absent_pkg' on this machine; install its package, or put its folder"),
        ("my_pkg.probe:METOD", "has no attribute 'METOD'; expected 'package.module:METHOD'"),
        ("my_pkg.probe:ProbeConfig", "expected an instance of cl_dist.methods.base.Method"),
        ("my_pkg.broken:METHOD", "importing 'my_pkg.broken' failed: RuntimeError: no licence"),
        ("prob", "is not a method; did you mean 'probe'?"),
    ],
)
def test_a_method_that_cannot_be_used_is_refused_with_the_reason(
    tmp_path: Path, package: Path, name: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, tiny.tree(tmp_path, tasks=("food",)) | {"science": {"method": {"name": name}}})
    assert message in str(caught.value)


def test_an_entry_point_that_fails_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(install(tmp_path / "site", "my_pkg.broken:METHOD"))
    with pytest.raises(ConfigError, match=r"entry point 'my_pkg.broken:METHOD' .* cannot be loaded: RuntimeError"):
        get_method("probe")
    assert descriptions()["probe"].startswith("cannot be loaded: ")
    assert descriptions()["ewc"]


def test_settings_that_change_the_name_are_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lookup.METHODS, "renamed", get_method("probe"))
    with pytest.raises(ConfigError, match="keep the name of the run file"):
        lookup.method_config("renamed", {"name": "other"})


def test_the_contract_suite_runs_over_it_from_outside(package: Path) -> None:
    done = contract(package, "--method", NAME, "-k", "capabilities or forward_pass_alone")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_the_contract_suite_names_a_flag_that_is_wrong(package: Path) -> None:
    source = package / "my_pkg" / "probe.py"
    source.write_text(source.read_text().replace("freezes_backbone=True, ", ""))
    done = contract(package, "--method", "probe", "-k", "capabilities")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "method 'probe' declares Capabilities(freezes_backbone=False)" in done.stdout


@pytest.mark.long
def test_it_keeps_the_whole_contract(package: Path) -> None:
    done = contract(package, "--method", NAME, "--settings", '{"scale": 1.5}')
    assert done.returncode == 0, done.stdout + done.stderr
