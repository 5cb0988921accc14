import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from cl_dist.errors import CheckpointError, StageConflictError
from cl_dist.ledger import Ledger, write_json
from cl_dist.stage import Stage, StageRef, Train, ref

STAGE = Train(task=1, data=(1,))
Make = Callable[..., Ledger]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def ledger(**facts: Any) -> Ledger:
        def facts_of(stage: Stage) -> dict[str, Any]:
            return {"seed": 0, "train.lr": 0.1} | facts

        return Ledger(tmp_path / "run", ["food", "film"], facts_of)

    return ledger


def publish(ledger: Ledger, text: str = '{"loss": 1}') -> Path:
    with ledger.publish(STAGE) as out:
        (out / "deep").mkdir()
        (out / "train.json").write_text(text)
        (out / "deep" / "rows.jsonl").write_text("{}\n")
    return ledger.path(ref(STAGE))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_stage_lies_under_the_number_and_id_of_its_task(make: Make, tmp_path: Path) -> None:
    assert make().path(ref(STAGE)) == tmp_path / "run" / "stages" / "01-film" / "train"


def test_a_result_appears_by_one_rename_with_its_manifest_written_before(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger, renamed = make(), list[tuple[list[str], bool]]()
    final, rename = ledger.path(ref(STAGE)), Path.rename

    def watch(self: Path, target: Path) -> Path:
        renamed.append((names(self), final.exists()))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", watch)
    with ledger.publish(STAGE) as out:
        (out / "train.json").write_text("{}")
        assert not ledger.is_done(STAGE)
        assert out.parent == final.parent  # on the same file system
    assert renamed == [(["manifest.json", "train.json"], False)]
    assert ledger.is_done(STAGE)
    assert names(final.parent) == ["train"]


def test_the_manifest_names_stage_settings_and_every_file_with_its_digest(make: Make) -> None:
    ledger = make()
    publish(ledger)
    manifest = ledger.manifest(ref(STAGE))
    assert manifest is not None
    assert manifest["stage"] == STAGE.model_dump(mode="json")
    assert manifest["fingerprint"] == ledger.fingerprint(STAGE)
    assert manifest["facts"] == {"seed": 0, "train.lr": 0.1}
    # printf '{}\n' | sha256sum
    assert manifest["files"]["deep/rows.jsonl"] == "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356"
    assert sorted(manifest["files"]) == ["deep/rows.jsonl", "train.json"]


def test_a_failure_inside_leaves_no_stage(make: Make) -> None:
    ledger = make()
    with pytest.raises(FileNotFoundError), ledger.publish(STAGE) as out:
        (out / "train.json").write_text("{}") and (out / "gone").read_text()
    assert not ledger.is_done(STAGE)
    assert not ledger.path(ref(STAGE)).exists()
    with ledger.publish(STAGE) as out:
        assert names(out) == []  # nothing of the failed attempt is gone on with


def test_partial_folders_are_named_after_the_settings_and_stale_ones_removed(make: Make) -> None:
    old, new = make(seed=1), make(seed=2)
    with pytest.raises(RuntimeError), old.publish(STAGE) as begun:
        raise RuntimeError
    assert begun.exists()
    assert old.fingerprint(STAGE)[:12] in begun.name
    with new.publish(STAGE) as out:
        assert out.name != begun.name
        assert not begun.exists()


def test_a_folder_without_a_manifest_is_no_result_and_is_replaced(make: Make) -> None:
    ledger = make()
    folder = ledger.path(ref(STAGE))
    folder.mkdir(parents=True)
    (folder / "rubbish").write_text("")
    assert not ledger.is_done(STAGE)
    publish(ledger)
    assert names(folder) == ["deep", "manifest.json", "train.json"]


def test_a_result_of_other_settings_is_a_conflict_that_names_the_keys_that_differ(make: Make) -> None:
    publish(make(**{"method.share": False}))
    with pytest.raises(StageConflictError) as caught:
        make(**{"train.lr": 0.2, "method.name": "ctr"}).is_done(STAGE)
    assert caught.value.stage == "01-film/train"
    assert caught.value.changed == {
        "method.name": ("(default)", "ctr"),
        "method.share": (False, "(default)"),
        "train.lr": (0.1, 0.2),
    }


def test_a_finished_file_is_read_back(make: Make) -> None:
    ledger = make()
    publish(ledger)
    assert ledger.read(ref(STAGE), "train.json") == {"loss": 1}


def test_json_lines_are_read_whatever_line_ends_their_texts_have(make: Make) -> None:
    ledger, texts = make(), ["one\u2028two", "a\x85b", "c\rd"]
    with ledger.publish(STAGE) as out:
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        (out / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")
    assert [line["text"] for line in ledger.read_lines(ref(STAGE), "rows.jsonl")] == texts
    (ledger.path(ref(STAGE)) / "rows.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match="damaged"):
        ledger.read_lines(ref(STAGE), "rows.jsonl")


def test_a_stage_that_is_not_computed_is_named(make: Make) -> None:
    with pytest.raises(CheckpointError, match=r"00-food/evaluate has not been computed"):
        make().read(StageRef(task=0, stage="evaluate"), "scores.json")


def test_one_flipped_byte_is_found_and_its_file_named(make: Make) -> None:
    ledger = make()
    file = publish(ledger) / "train.json"
    file.write_bytes(file.read_bytes().replace(b"1", b"2"))
    with pytest.raises(CheckpointError, match=r"01-film/train/train.json: missing or damaged"):
        ledger.read(ref(STAGE), "train.json")


def test_a_missing_file_is_named(make: Make) -> None:
    ledger = make()
    (publish(ledger) / "train.json").unlink()
    with pytest.raises(CheckpointError, match=r"train.json: missing or damaged"):
        ledger.read(ref(STAGE), "train.json")


DAMAGE: Mapping[str, Callable[[dict[str, Any]], object]] = {
    "another fingerprint": lambda whole: whole | {"fingerprint": "0" * 64},
    "facts are a list": lambda whole: whole | {"facts": []},
    "facts of others": lambda whole: whole | {"facts": {"seed": 1}},
    "no seconds": lambda whole: {key: value for key, value in whole.items() if key != "seconds"},
    "endless seconds": lambda whole: whole | {"seconds": float("inf")},
    "begun at no time": lambda whole: whole | {"started": "noon"},
    "stage is a name": lambda whole: whole | {"stage": "train"},
    "files are a list": lambda whole: whole | {"files": ["train.json"]},
    "digest is a number": lambda whole: whole | {"files": {"train.json": 1}},
    "a file elsewhere": lambda whole: whole | {"files": {"../../../run.json": "0"}},
}


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"fingerprint": ""}', "null", "[" * 100_000, *DAMAGE])
def test_a_damaged_manifest_is_named_and_never_taken_for_a_missing_one(make: Make, damage: str) -> None:
    ledger = make()
    path = publish(ledger) / "manifest.json"
    path.write_text(json.dumps(DAMAGE[damage](json.loads(path.read_text()))) if damage in DAMAGE else damage)
    for ask in (
        lambda: ledger.manifest(ref(STAGE)),
        lambda: ledger.is_done(STAGE),
        lambda: ledger.read(ref(STAGE), "train.json"),
    ):
        with pytest.raises(
            CheckpointError, match=r"01-film/train/manifest.json: damaged .*; remove the folder"
        ) as caught:
            ask()
        assert not isinstance(caught.value, StageConflictError)


def test_a_manifest_that_cannot_be_read_is_named(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run folder should be")
    with pytest.raises(CheckpointError, match=r"01-film/train/manifest.json: cannot be read: .*move the run folder"):
        make().is_done(STAGE)


def test_a_reader_sees_the_old_json_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"status": "running"})
    seen: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: seen.append(path.read_text()))
    write_json(path, {"status": "done"})
    assert [json.loads(text) for text in seen] == [{"status": "running"}]
    assert json.loads(path.read_text()) == {"status": "done"}
    assert names(tmp_path) == ["run.json"]


def test_a_json_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text()) == {"loss": 1.0}


@pytest.fixture
def cut_off(make: Make, monkeypatch: pytest.MonkeyPatch) -> tuple[Ledger, Path]:
    """A ledger, and the folder of a stage that was finished but for the last rename."""

    def killed(partial: Path, final: Path) -> None:
        raise OSError("killed")

    ledger = make()
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_move", staticmethod(killed))
        with pytest.raises(OSError, match="killed"):
            publish(ledger)
    (partial,) = ledger.folder.rglob("*.partial-*")
    return ledger, partial


def test_what_was_finished_but_for_the_last_rename_is_published(make: Make, cut_off: tuple[Ledger, Path]) -> None:
    ledger, partial = cut_off
    (partial / "checkpoints").mkdir()
    assert not make(**{"method.share": False}).rescue(STAGE)  # of other settings
    assert ledger.rescue(STAGE)
    assert ledger.is_done(STAGE)
    assert not partial.exists()
    assert not list(ledger.folder.rglob("checkpoints"))
    assert not ledger.rescue(STAGE)


@pytest.mark.parametrize(("name", "text"), [("train.json", "{}"), ("manifest.json", "[" * 100_000)])
def test_a_damaged_rest_is_not_published(cut_off: tuple[Ledger, Path], name: str, text: str) -> None:
    ledger, partial = cut_off
    (partial / name).write_text(text)
    assert not ledger.rescue(STAGE)


@pytest.mark.parametrize("inside", ["", "shards", "checkpoints", "checkpoints/step-00000002.partial"])
def test_a_link_in_what_was_begun_is_refused_and_not_gone_through(
    make: Make, cut_off: tuple[Ledger, Path], tmp_path: Path, inside: str
) -> None:
    ledger, partial = cut_off
    elsewhere = tmp_path / "elsewhere"
    partial.rename(elsewhere)
    link = partial / inside
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(elsewhere)
    before = names(elsewhere)
    for each in (ledger, make(seed=1)):  # to the second one it is stale
        for go_on in (lambda each=each: each.rescue(STAGE), lambda each=each: publish(each)):
            with pytest.raises(CheckpointError, match=r"is a symbolic link .*remove the link") as caught:
                go_on()
            assert f"{link}:" in str(caught.value)
    assert names(elsewhere) == before
    link.unlink()  # as the message says
    publish(ledger)


@pytest.mark.parametrize("name", ["stages/01-film", "stages/01-film/train"])
def test_a_link_in_place_of_a_stage_is_refused(make: Make, tmp_path: Path, name: str) -> None:
    ledger, link, elsewhere = make(), tmp_path / "run" / name, tmp_path / "elsewhere"
    elsewhere.mkdir()
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    for ask in (lambda: ledger.is_done(STAGE), lambda: ledger.rescue(STAGE), lambda: publish(ledger)):
        with pytest.raises(CheckpointError, match=f"{link}: is a symbolic link"):
            ask()
    assert names(elsewhere) == []


def test_a_run_folder_may_be_a_link(make: Make, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "elsewhere")
    publish(make())
    assert make().is_done(STAGE)
