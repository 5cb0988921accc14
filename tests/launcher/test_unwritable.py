"""Places that cannot be written or read: told with the path and what to do, as another user would meet them."""

import encodings.utf_8_sig  # noqa: F401  # before another user needs it, who may not read this one's Python
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import matplotlib.figure  # noqa: F401
import pytest

from cl_dist.contract import tiny
from cl_dist.storage import refused, written
from launcher import runs
from tests.launcher.commands import TASKS, Cli, Ended, save_run

NOBODY = 65534


@contextmanager
def another_user() -> Iterator[None]:
    """Be one whom permissions bind: root is not."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that every user may enter and read; what is in it belongs to whoever makes it."""
    folder = Path(tempfile.mkdtemp(prefix="cl-dist-unwritable-"))
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.fixture
def run(place: Path, finished: Path) -> Path:
    """A finished run that may be read and not written, with its data and model."""
    shutil.copytree(finished, place / "all")
    folder = place / "all" / "runs" / "tiny"
    for path in (place / "all").rglob("*.yaml"):
        path.write_text(path.read_text(encoding="utf8").replace(str(finished), str(place / "all")), encoding="utf8")
    for path in (place / "all", *(place / "all").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def assert_refused(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err.replace("\n", " ")


def test_a_report_that_cannot_be_written_shows_its_table_and_exits_6(cli: Cli, run: Path, place: Path) -> None:
    os.chdir(place)
    with another_user():
        ended, document = cli("report", run), cli("report", run, "--json", "--fail-if", "cl/avg_acc<2")
    assert_refused(ended, 6, str(run / "metrics"), "cannot be written", "move the run folder")
    assert "tiny (ctr)" in ended.out
    assert document.code == 6
    assert document.json()["report"] is None
    assert "cannot be written" in document.json()["unwritten"]
    assert len(document.json()["runs"]) == 3
    assert document.json()["broken"]


def test_a_broken_gate_is_told_beside_a_report_that_cannot_be_written(cli: Cli, run: Path, place: Path) -> None:
    os.chdir(place)
    with another_user():
        assert_refused(
            cli("report", run, "--fail-if", "cl/avg_acc<2"), 6, "cannot be written", "--fail-if 'cl/avg_acc<2'"
        )


@pytest.mark.parametrize("verb", ["resume {run}", "train all/tiny.yaml", "train all/tiny.yaml run.dir=/proc/x"])
def test_a_run_that_cannot_be_written_is_not_begun(cli: Cli, run: Path, place: Path, verb: str) -> None:
    os.chdir(place)
    with another_user():
        assert_refused(cli(*verb.replace("{run}", str(run)).split()), 6, "cannot be written", "run.dir=...")


def test_what_writes_nothing_works_without_a_place_to_write(cli: Cli, run: Path, place: Path) -> None:
    os.chdir(place)
    with another_user():
        for verb in ("status {run}", "inspect {run}", "eval {run}", "plan all/tiny.yaml --no-memory"):
            ended = cli(*verb.replace("{run}", str(run)).split())
            assert ended.code == 0, ended.err
        ended = cli("predict", run, "--task", "food", stdin=b'{"text": "the cake"}\n')
        assert ended.code == 0, ended.err


def test_an_export_or_a_manifest_that_cannot_be_written_is_told(cli: Cli, run: Path, place: Path) -> None:
    os.chdir(place)
    with another_user():
        assert_refused(cli("export", run, place / "new", "--task", "food"), 6, str(place / "new"))
        assert_refused(
            cli("render", "slurm", "all/tiny.yaml", "cluster.dispatcher=ray", "-o", place / "manifests"),
            6,
            str(place / "manifests"),
        )
    assert not (place / "new").exists()


@pytest.mark.parametrize(
    ("hidden", "verb", "code"),
    [
        ("runs/tiny/stages/01-film/train/trainable.safetensors", "predict {run} --task film", 6),
        ("runs/tiny/stages/01-film/evaluate/scores.json", "report {run}", 6),
        ("runs/tiny/stages/01-film/evaluate/manifest.json", "status {run}", 6),
        ("runs/tiny/stages", "inspect {run}", 6),
        ("runs/tiny/run.json", "status {run}", 6),
        ("runs/tiny/config.yaml", "report {run}", 2),
        ("runs/tiny", "status {run}", 6),
        ("food.jsonl", "data check all/tiny.yaml", 3),
        ("tiny.yaml", "plan all/tiny.yaml", 2),
        ("model/model.safetensors", "train all/tiny.yaml run.dir={place}/free", 2),
        ("model/model.safetensors", "eval {run}", 2),
        ("model/config.json", "plan all/tiny.yaml", 2),
        ("model", "train all/tiny.yaml run.dir={place}/free", 2),
    ],
)
def test_what_may_not_be_read_is_named(cli: Cli, run: Path, place: Path, hidden: str, verb: str, code: int) -> None:
    os.chdir(place)
    (place / "free").mkdir()
    (place / "free").chmod(0o777)
    (place / "all" / hidden).chmod(0)
    with another_user():
        ended = cli(*verb.replace("{run}", str(run)).replace("{place}", str(place)).split())
    assert_refused(ended, code, hidden.rpartition("/")[2])


def test_a_run_needs_no_place_but_its_own(cli: Cli, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the working directory nor a home is written, which a container may lack."""
    source = save_run(place / "tiny.yaml", tiny.tree(place, tasks=TASKS[:1]))
    (place / "runs").mkdir()
    (place / "runs").chmod(0o777)
    (place / "model" / "model.safetensors").chmod(0o644)
    monkeypatch.setenv("HOME", str(place / "none"))
    with another_user():
        ended = cli("train", source, "science.train.epochs=1")
        assert ended.code == 0, ended.err
        shutil.rmtree(place / "runs" / "tiny")


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "call", ["matplotlib.figure.Figure.savefig", "cl_dist.stored_run.write_json", "pathlib.Path.mkdir"]
)
def test_a_full_disk_under_a_report_is_told(
    cli: Cli, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    run = shutil.copytree(finished / "runs" / "tiny", tmp_path / "tiny")
    monkeypatch.setattr(call, full)
    ended = cli("report", run)
    assert_refused(ended, 6, str(run), "No space left on device", "Free space")
    assert "tiny (ctr)" in ended.out


@pytest.mark.parametrize(
    "spoil", [lambda report: report.write_text("a file"), lambda report: (report / "index.html").mkdir(parents=True)]
)
def test_a_report_whose_place_is_taken_is_told(
    cli: Cli, finished: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    run = shutil.copytree(finished / "runs" / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("report"))
    spoil(run / "report")
    assert_refused(cli("report", run), 6, str(run / "report"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT])
def test_any_refusal_of_the_file_system_is_told_whatever_the_verb(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse() -> None:
        raise OSError(number, os.strerror(number), "/tmp/somewhere")

    monkeypatch.setattr(runs, "recipes", refuse)
    assert_refused(cli("list", "recipes"), 6, "/tmp/somewhere", os.strerror(number))
    assert refused(FileNotFoundError(errno.ENOENT, "x")) is None
    assert "['/tmp']" in str(
        refused(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"))
    )


def test_what_fails_while_a_folder_is_written_is_told_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=str(tmp_path)), written(tmp_path):
        raise OSError("no number, no name")
