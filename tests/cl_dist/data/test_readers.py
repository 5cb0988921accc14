"""A data source of another package, by module and function or by entry point."""

from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config import parse
from cl_dist.data.load import load_task
from cl_dist.data.published import source_key
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import ConfigError, DataError

CODE = """
def read(path):
    for number in range(9):
        split = ("train", "dev", "test")[number % 3]
        yield {"text": f"{path} {number}", "label": "good" if number % 2 else "bad", "split": split}

def words(path):
    yield "no mapping"

def broken(path):
    yield {"text": "a", "label": "b", "split": "train"}
    raise RuntimeError("the server hung up")
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "other_rows.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def task(reader: str, **more: Any) -> TaskConfig:
    source = {"kind": "reader", "reader": reader, "path": "table one", "split": {"by": "field"}, **more}
    return parse(TaskConfig, {"id": "other", "source": source})


def test_a_function_of_another_package_yields_the_rows(package: Path) -> None:
    data = load_task(task("other_rows:read"), DataConfig())
    assert [row.text for row in data.train] == ["table one 0", "table one 3", "table one 6"]
    assert data.labels == ("bad", "good")


def test_an_entry_point_names_a_reader(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("warehouse", "other_rows:read", "cl_dist.sources")
    monkeypatch.setattr("cl_dist.data.readers.entry_points", lambda group: EntryPoints([point]).select(group=group))
    assert len(load_task(task("warehouse"), DataConfig()).test) == 3
    with pytest.raises(DataError, match=r"no entry point of this name .*did you mean 'warehouse'\?"):
        load_task(task("warehose"), DataConfig())


@pytest.mark.parametrize(
    ("reader", "complaint"),
    [
        ("other_rows:absent", "other_rows has no 'absent'"),
        ("no_such_rows:read", "no module 'no_such_rows' on this machine; install its package"),
        ("other_rows:words", "row 0 is a str; expected a mapping of column names to values"),
        ("other_rows:broken", "failed: RuntimeError: the server hung up"),
    ],
)
def test_a_faulty_reader_is_a_fault_of_the_task(package: Path, reader: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        load_task(task(reader), DataConfig())


def test_rows_of_a_reader_are_read_again_at_every_start(package: Path) -> None:
    assert source_key(task("other_rows:read"), DataConfig()) is None


@pytest.mark.parametrize("source", [{"kind": "reader"}, {"kind": "jsonl", "reader": "a:b"}])
def test_a_reader_belongs_to_its_kind(source: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="kind: reader needs `reader`; other kinds do not take it"):
        parse(TaskConfig, {"id": "other", "source": {"path": "x", **source}})
