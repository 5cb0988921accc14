"""Finished stages are copied to another store, and a machine that has never seen the run starts from the copy."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cl_dist import session
from cl_dist.config import merged, parse
from cl_dist.contract import tiny
from cl_dist.errors import CheckpointError, ConfigError, StorageError
from cl_dist.mirror import Mirror, Mirroring
from cl_dist.run import Run
from cl_dist.run_config import RunConfig

FAST = {"train": {"epochs": 1, "min_round_steps": 1}, "method": {"name": "sequential"}}


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Stores of two kinds; the one in memory has no folders and no rename, as buckets have none."""
    yield f"memory://bucket{tmp_path.name}/runs" if request.param == "memory" else f"file://{tmp_path}/store/runs"
    fsspec.filesystem("memory").store.clear()


def config(folder: Path, url: str, **over: object) -> RunConfig:
    tree = tiny.tree(folder, {"science": FAST, "run": {"mirror": url}}, tasks=("food", "film"))
    tree["baselines"] = {"alone": {"method": {"name": "individual"}}}
    return parse(RunConfig, merged(tree, over))


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("stages/**/*") if path.is_file()}


def test_a_run_whose_folder_is_lost_comes_back_whole(tmp_path: Path, url: str) -> None:
    run = config(tmp_path, url)
    session.train(run)
    before = bytes_of(run.folder)
    assert any(name.startswith("baselines/alone/stages/") for name in before)
    shutil.rmtree(run.folder)
    summaries = session.train(run).summaries()
    assert bytes_of(run.folder) == before  # manifests hold times: nothing was computed again
    assert [summary["status"] for summary in summaries.values()] == ["finished", "finished"]


def test_what_is_missing_in_the_copy_is_computed(tmp_path: Path, url: str) -> None:
    run = config(tmp_path, url)
    session.train(run, baselines=False)
    before = bytes_of(run.folder)
    store, root = fsspec.core.url_to_fs(url)
    store.rm(f"{root}/tiny/stages/01-film/evaluate/manifest.json")  # half copied
    shutil.rmtree(run.folder)
    session.train(run, baselines=False)
    after = bytes_of(run.folder)
    assert after.keys() == before.keys()
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"stages/01-film/evaluate/manifest.json"}
    assert store.exists(f"{root}/tiny/stages/01-film/evaluate/manifest.json")


def test_a_damaged_copy_is_refused_by_name(tmp_path: Path, url: str) -> None:
    run = config(tmp_path, url)
    session.train(run, baselines=False)
    store, root = fsspec.core.url_to_fs(url)
    store.pipe_file(f"{root}/tiny/stages/00-food/train/trainable.safetensors", b"other")
    shutil.rmtree(run.folder)
    with pytest.raises(CheckpointError, match=r"00-food/train: trainable\.safetensors missing or damaged; remove"):
        session.train(run, baselines=False)
    assert not list(run.folder.glob("stages/00-food/train*"))


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[RunConfig, Any]]:
    """A run, and the names and bytes of the store that holds its first stage: any names, as in a bucket."""
    run, memory = config(tmp_path / "here", "memory://bucket/runs"), fsspec.filesystem("memory")
    opened = Run(run)
    with opened.ledger.publish(opened.plan(0)[0]) as out:
        (out / "train.json").write_text("{}")
    Mirror(run).push()
    shutil.rmtree(run.folder)
    yield run, memory
    memory.store.clear()


STAGE = "/bucket/runs/tiny/stages/00-food/train"


def test_only_what_a_manifest_names_is_brought_back(tmp_path: Path, bucket: tuple[RunConfig, Any]) -> None:
    run, memory = bucket
    for name in ("more.json", "../../../../ESCAPED", f"..{tmp_path}/ESCAPED"):
        memory.store[f"{STAGE}/{name}"] = memory.store[f"{STAGE}/train.json"]
    assert Mirror(run).pull() == 1
    assert sorted(bytes_of(run.folder)) == ["stages/00-food/train/manifest.json", "stages/00-food/train/train.json"]
    assert not list(tmp_path.rglob("ESCAPED"))


@pytest.mark.parametrize("name", ["../../../../ESCAPED", "{}/ESCAPED", "a/../../ESCAPED", "..\\ESCAPED", "./x", "\0"])
def test_a_manifest_that_names_files_elsewhere_is_refused(
    tmp_path: Path, bucket: tuple[RunConfig, Any], name: str
) -> None:
    run, memory = bucket
    name = name.format(tmp_path)
    manifest = json.loads(memory.cat_file(f"{STAGE}/manifest.json"))
    manifest["files"][name] = manifest["files"]["train.json"]
    memory.pipe_file(f"{STAGE}/manifest.json", json.dumps(manifest).encode())
    memory.store[f"{STAGE}/{name}"] = memory.store[f"{STAGE}/train.json"]
    with pytest.raises(CheckpointError, match=r"00-food/train: manifest\.json .*files.* missing or damaged; remove"):
        Mirror(run).pull()
    assert not list(tmp_path.rglob("*ESCAPED"))
    assert not bytes_of(run.folder)


@pytest.mark.parametrize("key", ["../train", "00-food/.."])
def test_a_stage_folder_elsewhere_is_refused(tmp_path: Path, bucket: tuple[RunConfig, Any], key: str) -> None:
    run, memory = bucket
    for name in ("manifest.json", "train.json"):
        memory.store[f"/bucket/runs/tiny/stages/{key}/{name}"] = memory.store.pop(f"{STAGE}/{name}")
    with pytest.raises(CheckpointError, match="not the name of a stage's folder: remove that folder from the store"):
        Mirror(run).pull()
    assert not run.folder.exists()


def test_a_stage_is_not_brought_back_through_a_link(tmp_path: Path, bucket: tuple[RunConfig, Any]) -> None:
    run, _ = bucket
    (tmp_path / "elsewhere").mkdir()
    (run.folder / "stages").mkdir(parents=True)
    (run.folder / "stages/00-food").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="stages/00-food: is a symbolic link"):
        Mirror(run).pull()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_store_that_is_away_for_a_while_is_caught_up_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(tmp_path, f"file://{tmp_path}/store/runs")
    put, calls = Mirror._put, list[Path]()

    def flaky(self: Mirror, path: Path) -> None:
        calls.append(path)
        if len(calls) < 3:
            raise TimeoutError("away")
        put(self, path)

    monkeypatch.setattr(Mirror, "_put", flaky)
    session.train(run, baselines=False)
    assert bytes_of(tmp_path / "store/runs/tiny") == bytes_of(run.folder)


def test_a_store_that_stays_away_is_told(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(StorageError, match=r"run\.mirror: file://.*cannot be written"):
        session.train(config(tmp_path, f"file://{tmp_path}/store/runs"), baselines=False)


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("nowhere://bucket", ConfigError, r"run\.mirror='nowhere://bucket'.*nowhere"),
        ("github://bucket", ConfigError, r"run\.mirror='github://bucket'.*missing"),
        ("ftp://127.0.0.1:1/x", StorageError, r"run\.mirror: ftp://127\.0\.0\.1:1/x/tiny: cannot be reached"),
    ],
)
def test_a_store_that_cannot_be_opened_is_told(tmp_path: Path, url: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        session.train(config(tmp_path, url))


@pytest.mark.parametrize("how", ["stopped", "interrupted", "failed"])
def test_a_store_that_is_away_does_not_hide_why_a_run_ended(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "store").write_text("a file where a folder should be")
    mirroring = Mirroring(Mirror(config(tmp_path, f"file://{tmp_path}/store/runs")))
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with caplog.at_level("WARNING"):
        mirroring({"event": how})
    assert "cannot be written" in caplog.text
    with pytest.raises(StorageError):
        mirroring({"event": "finished"})
