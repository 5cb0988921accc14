"""Kills at drawn points, and damage of every kind: the undisturbed result, or one error that names file and remedy."""

import os
import resource
import shutil
import signal
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cl_dist import ledger, sequence
from cl_dist import run_events as tracking
from cl_dist.contract import tiny
from cl_dist.dispatch_local import LocalDispatcher
from cl_dist.errors import CheckpointError, ClDistError, OrderError, RunInUseError, StoppedError, StorageError
from cl_dist.run import Run
from cl_dist.run_events import Tracker
from cl_dist.stage import StageRef
from cl_dist.stages import checkpoint
from cl_dist.storage import run_lock
from tests import chaos

pytestmark = pytest.mark.timeout(600)
SEED = int(os.environ.get("CHAOS_SEED", "0"))
POINTS = 7  # of each method, 21 in all


@pytest.fixture(scope="module", params=list(chaos.RUNS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any, int]:
    """(method, folder, digests of an undisturbed run, how much there is to count)."""
    folder = tmp_path_factory.mktemp(request.param)
    found, count = chaos.undisturbed(folder, request.param)
    return request.param, folder, found, count


def test_killed_anywhere_a_run_ends_as_if_undisturbed(whole: tuple[str, Path, Any, int]) -> None:
    method, folder, results, count = whole
    points = [(1,), *chaos.drawn(SEED, method, count, POINTS)]
    seen = [chaos.kill(folder, method, f"k{n}", kills, results) for n, kills in enumerate(points)]
    assert all(one.died_in for one in seen)
    assert seen[0].died_in == ("the start",)
    assert [one for one in seen if not one.equal] == [], f"CHAOS_SEED={SEED}, of {count}"


def test_a_checkpoint_without_moments_would_be_noticed(
    whole: tuple[str, Path, Any, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    method, folder, results, count = whole
    monkeypatch.setattr(checkpoint.Checkpoint, "load_moments", lambda self, engine: None)  # children inherit it
    seen = [chaos.kill(folder, method, f"lost{n}", (count * n // 10,), results) for n in (6, 7, 8, 9)]
    assert not all(one.equal for one in seen)


# ------------------------------------------------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return tiny.compute(chaos.made(tmp_path_factory.mktemp("finished"), "lamol", "whole"))


@pytest.fixture
def run(finished: Run, tmp_path: Path) -> Run:
    """A copy of a finished LAMOL run whose second task has still to be trained and scored."""
    folder = tmp_path / "run"
    shutil.copytree(finished.config.folder, folder)
    for stage in ("train", "evaluate"):
        shutil.rmtree(folder / "stages/01-film" / stage)
    tree = finished.config.model_copy(
        update={"run": finished.config.run.model_copy(update={"name": "run", "dir": str(tmp_path)})}
    )
    return Run(tree)


def go_on(opened: Run) -> None:
    sequence.run_stages(opened, LocalDispatcher(), Tracker(opened))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_an_unharmed_copy_ends_as_the_run_did(run: Run, finished: Run) -> None:
    go_on(run)
    assert chaos.digests(run.config.folder) == chaos.digests(finished.config.folder)


HARM: Mapping[str, tuple[str, Callable[[Path], None], str]] = {
    "weights, one bit flipped": ("00-food/train/trainable.safetensors", flip, "does not match its manifest"),
    "weights cut off": ("00-food/train/trainable.safetensors", lambda p: os.truncate(p, 100), "does not match"),
    "weights gone": ("00-food/train/trainable.safetensors", Path.unlink, "missing"),
    "samples, one bit flipped": ("01-film/generate/samples.jsonl", flip, "does not match its manifest"),
    "manifest cut off": ("00-food/train/manifest.json", lambda p: os.truncate(p, 50), "damaged"),
}


@pytest.mark.parametrize("harm", list(HARM))
def test_what_is_damaged_is_named_with_the_remedy_which_works(run: Run, finished: Run, harm: str) -> None:
    name, damage, message = HARM[harm]
    path = run.config.folder / "stages" / name
    damage(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        go_on(run)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 6
    assert str(path.parent) in str(caught.value)
    shutil.rmtree(path.parent)  # as the message says
    go_on(Run(run.config))
    assert chaos.digests(run.config.folder) == chaos.digests(finished.config.folder)


def test_a_stage_whose_manifest_is_gone_is_computed_again(run: Run, finished: Run) -> None:
    (run.config.folder / "stages/00-food/evaluate/manifest.json").unlink()
    go_on(run)
    assert chaos.digests(run.config.folder) == chaos.digests(finished.config.folder)


def test_a_clock_set_back_changes_nothing(run: Run, finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Early(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Early":
            return cls(1999, 12, 31, tzinfo=UTC)

    monkeypatch.setattr(ledger, "datetime", Early)
    monkeypatch.setattr(tracking, "datetime", Early)
    monkeypatch.setattr("time.time", lambda: 946_600_000.0)
    go_on(run)
    assert chaos.digests(run.config.folder) == chaos.digests(finished.config.folder)


@pytest.mark.parametrize("limit", [2000, 40_000])
def test_a_full_disk_is_named_and_the_run_goes_on_once_there_is_room(run: Run, finished: Run, limit: int) -> None:
    """Stood in for by a limit on the size of files: the system's error then is another number of the same kind."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(StorageError, match=r"cannot be written.*Free space.*`cl-dist resume` continues") as caught:
            go_on(run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(run.config.folder) in str(caught.value)
    go_on(Run(run.config))
    assert chaos.digests(run.config.folder) == chaos.digests(finished.config.folder)


@pytest.mark.parametrize("damage", [flip, lambda path: path.write_text("[" * 100_000)], ids=["one bit", "deep"])
def test_a_damaged_shard_is_computed_again(
    run: Run, finished: Run, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object]
) -> None:
    shutil.rmtree(run.config.folder / "stages/01-film/generate")
    merge = "cl_dist.stages.shards.ShardStore.merge"

    def stopped(self: Any) -> None:
        raise ClDistError("killed before the merge")

    monkeypatch.setattr(merge, stopped)
    with pytest.raises(ClDistError, match="killed before the merge"):
        go_on(run)
    kept = sorted(run.config.folder.rglob("shards/*.json"))
    assert len(kept) >= 2
    before = [path.stat().st_mtime_ns for path in kept]
    damage(kept[0])
    with pytest.raises(ClDistError, match="killed before the merge"):
        go_on(Run(run.config))
    after = [path.stat().st_mtime_ns for path in kept]
    assert [a == b for a, b in zip(after, before, strict=True)] == [False, *[True] * (len(kept) - 1)]
    monkeypatch.undo()
    go_on(Run(run.config))
    assert chaos.digests(run.config.folder) == chaos.digests(finished.config.folder)


def test_a_second_driver_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    refused = pytest.raises(RunInUseError, match=f"process {os.getpid()} on .* is working on this run")
    with run_lock(tmp_path), refused as caught, run_lock(tmp_path):
        pass
    assert caught.value.exit_code == 2
    with run_lock(tmp_path):
        pass


def test_finished_tasks_keep_their_places(finished: Run) -> None:
    tree = finished.config.model_dump(mode="json", exclude_unset=True)
    kind = type(finished.config)
    for order in (["film", "food"], ["food"]):
        tree["science"]["order"] = order
        with pytest.raises(
            OrderError, match=r"01-film.* is finished, but the tasks are now .*must keep their positions"
        ):
            Run(kind.model_validate(tree)).ledger.check_order()
    finished.ledger.check_order()
    assert finished.ledger.manifest(StageRef(task=1, stage="train")) is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_a_stage_is_saved_first(
    finished: Run, run: Run, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    def handler(received: int, frame: Any) -> None:
        raise StoppedError("told to")

    monkeypatch.setattr("cl_dist.stages.save_policy.POLL_S", 0.0)
    seen: list[str] = []

    def watch(event: Mapping[str, Any]) -> None:
        seen.append(event["event"])
        if event["event"] == "round" and seen.count("round") == 2:
            signal.raise_signal(number)

    before = signal.signal(number, handler)
    try:
        with pytest.raises(StoppedError, match="told to"):
            sequence.run_stages(run, LocalDispatcher(), Tracker(run, watch=watch))
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    assert seen[-1] == "saved"
    assert len(list(run.config.folder.rglob("checkpoint.json"))) >= 1
    seen.clear()
    go_on(Run(run.config))
    assert chaos.digests(run.config.folder) == chaos.digests(finished.config.folder)


def test_told_to_stop_at_its_end_a_stage_is_published_first(
    finished: Run, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(received: int, frame: Any) -> None:
        raise StoppedError("told to")

    def watch(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == event["total_steps"] and event["kind"] == "train":
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(StoppedError, match="told to"):
            sequence.run_stages(run, LocalDispatcher(), Tracker(run, watch=watch))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert run.ledger.manifest(StageRef(task=1, stage="train")) is not None
    assert run.ledger.manifest(StageRef(task=1, stage="evaluate")) is None
    go_on(Run(run.config))
    assert chaos.digests(run.config.folder) == chaos.digests(finished.config.folder)
