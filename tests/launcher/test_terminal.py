"""What reaches a terminal or a pipe: any label in any locale, without markup or escape codes; closed and full pipes."""

import json
import logging
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist import errors
from cl_dist.contract import tiny
from cl_dist.errors import ClDistError, printable
from cl_dist.logs import driver_log
from launcher import console
from launcher.cli import EXIT_CODES
from launcher.watch import Watch
from tests.launcher.commands import ROOT, TASKS, Cli, Ended, save_run

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
HOSTILE = (
    *("[INST]", "[/INST]", "[bold red]x[/]", "[link=http://x]y", ":cat:", "[[", "\\[x]"),
    *(
        "\x1b[31mred\x1b[0m",
        "\x1b]0;title\x07",
        "a\rb",
        "bell\x07",
        "del\x7f",
        "csi\x9b31m",
        "\u202eevil",
        "\u200bzero",
    ),
    *("良い", "größe", "שלום", "😀", "e\u0301", "nb\u00a0sp"),
)


def labelled(folder: Path, labels: tuple[str, ...]) -> Path:
    """Write a run file over rows with these labels, task by task two of them, and its data."""
    tree = tiny.tree(folder, tasks=TASKS)
    for number, task in enumerate(TASKS):
        rows = tiny.rows(task, 20)
        for k, row in enumerate(rows):
            row["label"] = labels[(2 * number + k % 2) % len(labels)]
        tiny.save_rows(folder / f"{task}.jsonl", rows)
    return save_run(folder / "tiny.yaml", tree)


def in_locale(locale: dict[str, str], *args: object, cwd: Path, stdin: bytes = b"") -> tuple[Ended, bytes]:
    """Return how `cl-dist` ended in a process of its own in a locale, and the bytes on its stdout."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHON"))}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *map(str, args)],
        cwd=cwd,
        env=kept | {"PYTHONPATH": path} | locale,
        capture_output=True,
        input=stdin,
        timeout=200,
    )
    return Ended(done.returncode, done.stdout.decode("latin-1"), done.stderr.decode("latin-1")), done.stdout


LATIN = {"PYTHONIOENCODING": "latin-1"}
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("pair", [HOSTILE[n : n + 2] for n in range(0, len(HOSTILE) - 1, 2)])
def test_labels_are_shown_as_they_are_and_never_raw(cli: Cli, tmp_path: Path, pair: tuple[str, str]) -> None:
    run = labelled(tmp_path, pair)
    for command in (["data", "check"], ["data", "show"]):
        ended = cli(*command, run)
        assert ended.code == 0, ended.err
        assert not any(is_acted_upon(char) for char in ended.out), ended.out
    assert all(printable(label) in re.sub(r"\s+", " ", cli("data", "show", run).out) for label in pair)
    labels = cli("data", "check", run, "--json")
    assert labels.out.isascii()
    assert labels.json()["food"]["labels"] == sorted(pair)


def is_acted_upon(char: str) -> bool:
    return unicodedata.category(char) in ("Cc", "Cf", "Cs") and char not in "\n\t"


@pytest.mark.parametrize("text", ["[/INST]", "[bold]x", "\x1b[31mx", "a\rb", ":cat:", "größe", "\udcff"])
@pytest.mark.parametrize(
    "command", ["plan {}", "list {}", "{}", "train {} -x", "train x.yaml --{}", "resume {}", "inspect {}", "report {}"]
)
def test_what_a_person_has_typed_comes_back_as_it_is_in_an_error(cli: Cli, command: str, text: str) -> None:
    ended = cli(*(word.replace("{}", text) for word in command.split()))
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert not any(is_acted_upon(char) for char in ended.err)


def test_names_in_tables_titles_bars_and_logs_are_not_markup(
    cli: Cli, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary: Any = {"run": "[/run]", "method": ":cat:", "metrics": {}, "tasks": [{"majority": 0.5}]}
    console.out.print(console.comparison([summary]))
    console.out.rule("[/rule]\x1b")
    assert "[/run] (:cat:)" in (shown := capsys.readouterr().out)
    assert r"[/rule]\x1b" in shown
    watch = Watch()
    with watch:
        watch({"ts": "2026-01-01T00:00:00", "event": "stage_start", "kind": "x", "stage": "00-[/x]\x1b/train"})
        done = {"[/t]\x1b": 0.5}
        watch({"ts": "2026-01-01T00:00:00", "event": "stage_done", "stage": "00-[/x]\x1b/train", "accuracy": done})
    console.start_logging(verbose=True)
    with driver_log(tmp_path):
        logging.getLogger("cl_dist.run").warning("label %s", "[/x]\x1b\ud800")
    assert r"[/x]\x1b\ud800" in (tmp_path / "logs" / "driver.log").read_text(encoding="utf8")
    assert "\x1b" not in capsys.readouterr().err


@pytest.mark.parametrize("locale", [LATIN, ASCII])
def test_a_locale_without_a_character_shows_its_escape_and_programs_get_ascii(
    tmp_path: Path, locale: dict[str, str]
) -> None:
    run = labelled(tmp_path, ("良い", "größe"))
    ended, _ = in_locale(locale, "data", "check", run, "--json", cwd=tmp_path)
    assert (ended.code, ended.err.count("Traceback")) == (0, 0), ended.err
    assert ended.json()["food"]["labels"] == ["größe", "良い"]
    ended, out = in_locale(locale, "data", "check", run, cwd=tmp_path)
    assert (ended.code, ended.err.count("Traceback")) == (0, 0), ended.err
    assert rb"\u826f\u3044" in out
    ended, _ = in_locale(locale, "plan", run, "science.tasks.0.id='[/良]'", "--json", cwd=tmp_path)
    assert ended.code == 2
    assert ended.json()["kind"] == "ConfigError"
    tree = yaml.safe_load(run.read_text(encoding="utf8"))
    del tree["cluster"]
    tree["science"]["tasks"][0]["question"] = "良い ?"
    save_run(run, tree)
    ended, out = in_locale(locale, "render", "slurm", run, cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert "良い ?".encode() in out  # as it would be in a file


def test_a_path_that_a_locale_cannot_spell_is_told(tmp_path: Path) -> None:
    run = labelled(tmp_path, ("good", "bad"))
    tree = yaml.safe_load(run.read_text(encoding="utf8"))
    tree["science"]["tasks"][0]["source"]["path"] = "良い.jsonl"
    ended, _ = in_locale(ASCII, "data", "check", save_run(run, tree), cwd=tmp_path)
    assert ended.code == 2
    assert "LC_ALL=C.UTF-8" in ended.err


def test_a_whole_run_in_a_narrow_locale_writes_utf8(tmp_path: Path) -> None:
    run = labelled(tmp_path, ("良い", "größe"))
    ended, _ = in_locale(ASCII, "train", run, "science.train.epochs=1", cwd=tmp_path)
    assert ended.code == 0, ended.err
    folder = tmp_path / "runs" / "tiny"
    assert "良い" in (folder / "metrics/summary.json").read_text(encoding="utf8")
    assert "良い" in (folder / "report/index.html").read_text(encoding="utf8")
    ended, out = in_locale(ASCII, "predict", folder, "--task", "food", cwd=tmp_path, stdin=b'{"text": "the cake"}\n')
    assert ended.code == 0, ended.err
    assert out.isascii()
    assert set(json.loads(out)["scores"]) == {"良い", "größe"}


def piped(reads: int, *args: object, cwd: Path, to: str = "stdout") -> int:
    """Return the exit code of `cl-dist` whose reader takes so many lines and goes."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if to == "stdout" else subprocess.DEVNULL,
        stderr=subprocess.PIPE if to == "stderr" else subprocess.DEVNULL,
    )
    pipe = process.stdout if to == "stdout" else process.stderr
    assert pipe is not None
    for _ in range(reads):
        pipe.readline()
    pipe.close()
    return process.wait(timeout=200)


@pytest.mark.parametrize(
    ("command", "code"),
    [
        *(
            ("list recipes", 0),
            ("list metrics --json", 0),
            ("schema", 0),
            ("env", 0),
            ("--help", 0),
            ("data --help", 0),
        ),
        *(("data check tiny.yaml", 0), ("data show tiny.yaml", 0), ("plan tiny.yaml --no-memory", 0)),
        *(("status runs/tiny", 0), ("report runs/tiny", 0), ("inspect runs/tiny --json", 0)),
        ("report runs/tiny --fail-if cl/avg_acc<2", 8),
        ("plan tiny.yaml science.seed=-1 --json", 2),
    ],
)
def test_a_reader_that_goes_ends_the_output_and_nothing_else(finished: Path, command: str, code: int) -> None:
    assert piped(0, *command.split(), cwd=finished) == code


def test_a_run_goes_on_when_nobody_reads_its_progress(tmp_path: Path) -> None:
    run = labelled(tmp_path, ("good", "bad"))
    assert piped(1, "train", run, "science.train.epochs=1", cwd=tmp_path, to="stderr") == 0


def test_a_full_or_closed_stdout_is_no_fault_of_ours(tmp_path: Path) -> None:
    for redirection, code, said in ((">/dev/full", 6, "stdout cannot be written"), (">&-", 0, "")):
        done = subprocess.run(
            ["bash", "-c", f'exec "$@" {redirection}', "-", sys.executable, "-m", "launcher", "list", "recipes"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=100,
        )
        assert (done.returncode, "Traceback" in done.stderr) == (code, False)
        assert said in done.stderr


def test_usage_errors_are_one_json_document_when_asked_for(cli: Cli) -> None:
    for command in ("plan --json --bogus", "nothing --json", "plan --json", "report --json --reference"):
        ended = cli(*command.split())
        assert ended.code == 2
        assert ended.json()["code"] == 2
        assert ended.json()["message"]


def test_the_exit_codes_of_the_help_are_those_of_the_errors_and_of_the_page(cli: Cli) -> None:
    found = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ClDistError)]
    assert {kind.exit_code for kind in found} | {0, console.INTERRUPTED} == set(EXIT_CODES)
    shown = re.sub(r"\s+", " ", cli("--help").out)
    assert all(f"{code} {meaning.split()[0]}" in shown for code, meaning in EXIT_CODES.items())
    page = (ROOT / "launcher/README.md").read_text(encoding="utf8")
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, flags=re.MULTILINE)} == set(EXIT_CODES)


@settings(max_examples=200 * TIMES, deadline=None)
@given(text=st.text(max_size=40))
def test_nothing_that_is_shown_acts_upon_a_terminal(text: str) -> None:
    shown = printable(text)
    assert not any(is_acted_upon(char) for char in shown if char not in (*errors.JOINERS, "\n", "\t"))
    with console.out.capture() as captured:
        console.out.print(text, soft_wrap=True)
    if "\t" not in text:  # rich fills up to the next tab stop
        assert captured.get() == f"{shown}\n"
