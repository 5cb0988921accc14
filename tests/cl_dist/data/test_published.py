"""Published rows: written once by the driver, mapped by workers, and written anew when their source changes."""

import json
import pickle
from errno import EACCES
from pathlib import Path

import datasets
import pytest

from cl_dist.data.load import load_task
from cl_dist.data.published import MappedRows, publish, published, source_key
from cl_dist.data.rows import SPLITS, TaskData
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import CheckpointError
from cl_dist.run import Run
from cl_dist.stages.stage_job import task_data
from tests import tiny


def task_of(folder: Path, count: int = 20) -> TaskConfig:
    rows = [row | {"pair": None if k % 3 else f"pair \u00e9 {k}"} for k, row in enumerate(tiny.rows("food", count))]
    tiny.save_rows(folder / "food.jsonl", [row | {"pair": row["pair"] or ""} for row in rows])
    source = {"kind": "jsonl", "path": str(folder / "food.jsonl"), "split": {"by": "field"}}
    settings = {"id": "food", "row_id": "id", "text_pair": "pair", "rationale": "rationale", "source": source}
    return TaskConfig.model_validate(settings)


@pytest.fixture
def loaded(tmp_path: Path) -> TaskData:
    return load_task(task_of(tmp_path), DataConfig())


def test_mapped_rows_are_the_checked_rows(loaded: TaskData, tmp_path: Path) -> None:
    publish(loaded, tmp_path / "rows")
    found = published(tmp_path / "rows", verify=True)
    for split in SPLITS:
        assert list(found.rows(split)) == list(loaded.rows(split))
        assert [row.where for row in found.rows(split)] == [row.where for row in loaded.rows(split)]
        assert len(found.rows(split)) == len(loaded.rows(split))
        assert found.rows(split)[-1] == loaded.rows(split)[-1]
        assert found.rows(split)[2:5] == tuple(loaded.rows(split)[2:5])
    assert (found.labels, found.digests, found.question) == (loaded.labels, loaded.digests, loaded.question)


def test_rows_of_several_batches_are_found_by_number(tmp_path: Path) -> None:
    loaded = load_task(task_of(tmp_path, count=9000), DataConfig())
    publish(loaded, tmp_path / "rows")
    rows = published(tmp_path / "rows").train
    for number in (0, 4095, 4096, 8191, 8192, 8999):
        assert rows[number] == loaded.train[number]
    with pytest.raises(IndexError):
        rows[9000]
    assert isinstance(rows, MappedRows)
    assert rows.column("label") == [row.label for row in loaded.train]
    assert pickle.loads(pickle.dumps(rows))[17] == loaded.train[17]


def test_datasets_opens_the_files(loaded: TaskData, tmp_path: Path) -> None:
    publish(loaded, tmp_path / "rows")
    found = datasets.Dataset.from_file(str(tmp_path / "rows" / "train.arrow"))
    assert found["text"][:] == [row.text for row in loaded.train]


@pytest.mark.parametrize("damage", ["cut", "flip", "gone", "header"])
def test_damaged_rows_are_named_with_their_folder(loaded: TaskData, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "rows"
    publish(loaded, folder)
    path = folder / ("task.json" if damage == "header" else "test.arrow")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "flip":
        path.write_bytes(bytes([*content[:-40], content[-40] ^ 1, *content[-39:]]))
    else:
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="published rows are missing or damaged"):
        published(folder, verify=True)


def test_the_key_follows_the_bytes_and_the_settings(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    first = source_key(task, DataConfig())
    assert source_key(task, DataConfig()) == first
    assert source_key(task.model_copy(update={"question": "which ?"}), DataConfig()) != first
    assert source_key(task, DataConfig(overlap="drop")) != first
    with (tmp_path / "food.jsonl").open("a") as file:
        file.write(json.dumps(tiny.rows("food", 21)[20] | {"pair": "", "split": "train"}) + "\n")
    assert source_key(task, DataConfig()) != first
    moved = tmp_path / "moved.jsonl"
    now = source_key(task, DataConfig())
    (tmp_path / "food.jsonl").rename(moved)
    assert source_key(task, DataConfig()) is None
    source = task.source.model_copy(update={"path": str(moved)})
    assert source_key(task.model_copy(update={"source": source}), DataConfig()) == now


def test_a_worker_parses_no_raw_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.make_run(tmp_path, tasks=("food", "film"))
    job = run.job(run.plan(1)[0])
    for name in ("food", "film"):
        (tmp_path / f"{name}.jsonl").unlink()
    monkeypatch.setattr("cl_dist.data.load.check_task", lambda *args: pytest.fail("a worker parsed raw rows"))
    assert len(task_data(job, 1).train) == 20
    assert isinstance(task_data(job, 0).train, MappedRows)


def test_a_second_run_object_maps_what_the_first_has_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny.make_run(tmp_path, tasks=("food",))
    first.publish(0)
    monkeypatch.setattr("cl_dist.run.load_task", lambda *args: pytest.fail("rows were checked twice"))
    second = Run(first.config)
    assert second.data(0) == first.data(0)
    assert second.facts(second.plan(0)[0]) == first.facts(first.plan(0)[0])


def test_a_run_folder_of_another_user_needs_no_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny.make_run(tmp_path, tasks=("food",))

    def refused(loaded: TaskData, folder: Path) -> None:
        if folder.is_relative_to(run.config.folder):
            raise PermissionError(EACCES, "Permission denied", str(folder))
        publish(loaded, folder)

    monkeypatch.setattr("cl_dist.run.publish", refused)
    job = run.job(run.plan(0)[0])
    assert list(task_data(job, 0).train) == list(run.data(0).train)
    assert not (run.config.folder / "rows").exists()
