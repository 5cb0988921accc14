"""The help, the version and shell completion; every verb is listed, in order of use, with an example that parses."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from cl_dist import __version__
from launcher.cli import EXIT_CODES, GROUPS, VERBS, app
from tests.launcher.commands import ROOT, Cli, fresh

PANELS = ("Start", "Run", "Look", "Use", "Cluster", "Environment")


def command(name: str) -> Any:
    """Return the command of a verb."""
    found: Any = typer.main.get_command(app)
    for part in name.split():
        found = found.commands[part]
    return found


def test_the_help_lists_verbs_in_panels_in_order_of_use_and_imports_nothing_heavy(tmp_path: Path) -> None:
    ended, modules = fresh("--help", cwd=tmp_path)
    assert (ended.code, modules) == (0, []), ended.err
    panels = [name for name in re.findall(r"╭─ (\w+) ─", ended.out) if name != "Options"]
    assert panels == list(PANELS)
    listed = re.findall(r"^│ ([a-z]+)  ", ended.out, flags=re.MULTILINE)
    assert listed == list(dict.fromkeys(verb.name.split()[0] for verb in VERBS))
    words = re.sub(r"[\s│]+", " ", ended.out)
    assert all(f"{code} {meaning}" in words for code, meaning in EXIT_CODES.items())
    assert "--install-completion" in words


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name.replace(" ", "-"))
def test_every_verb_has_a_help_and_an_example_that_parses(cli: Cli, verb: Any) -> None:
    ended = cli(*verb.name.split(), "--help")
    assert ended.code == 0
    assert f"Example: {verb.example}" in re.sub(r"\s+", " ", ended.out)
    assert verb.run.__doc__.splitlines()[0].rstrip(".").split(".")[0] in re.sub(r"\s+", " ", ended.out)
    words = shlex.split(re.split(r" [<>] ", verb.example)[0])
    assert words[: 1 + len(verb.name.split())] == ["cl-dist", *verb.name.split()]
    command(verb.name).make_context(verb.name, words[1 + len(verb.name.split()) :])


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_lists_its_verbs_in_order(cli: Cli, group: str) -> None:
    shown = cli(group, "--help").out
    assert re.findall(r"^│ ([a-z]+)  ", shown, flags=re.MULTILINE) == [
        verb.name.split()[1] for verb in VERBS if verb.name.startswith(f"{group} ")
    ]


def test_the_version_is_that_of_the_package(cli: Cli) -> None:
    assert cli("--version").out == f"cl-dist {__version__}\n"


@pytest.mark.parametrize("verb", ["submit", "jobs", "logs", "stop"])
def test_verbs_of_jobs_are_in_the_group_job_alone(cli: Cli, verb: str) -> None:
    assert cli(verb, "x").code == 2
    for other in ("status", "resume"):
        assert "No such option: --address" in cli(other, "x", "--address", "http://h:1").err


def completed(folder: Path, line: str) -> list[str]:
    """Return what bash would offer for the last word of a line."""
    words = line.split(" ")
    variables = {"_CL_DIST_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    program = "import sys; sys.argv = ['cl-dist']; from launcher.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cl-dist re", ["render", "report", "resume"]),
        ("cl-dist job s", ["status", "stop", "submit"]),
        ("cl-dist train ctr-d", ["ctr-demo", "ctr-dsc10"]),
        ("cl-dist list re", ["recipes"]),
    ],
)
def test_bash_completes_verbs_and_recipes(tmp_path: Path, line: str, offered: list[str]) -> None:
    assert sorted(completed(tmp_path, line)) == offered


def test_bash_gets_a_script(tmp_path: Path) -> None:
    program = "import sys; sys.argv = ['cl-dist']; from launcher.cli import main; main()"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "_CL_DIST_COMPLETE": "source_bash"}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "complete -o default -F _cl_dist_completion cl-dist" in done.stdout
