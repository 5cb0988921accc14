"""Hostile input: run files, rows, manifests and checkpoints with anything in them are refused by name, or work.

`make fuzz` tries many more.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cl_dist import checks
from cl_dist.checks import check_data, check_tokens
from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.data.labels import likeness
from cl_dist.data.load import check_task, load_task
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.data.unlabelled import read_unlabelled
from cl_dist.errors import CheckpointError, ClDistError, StageConflictError
from cl_dist.models.backbone import load_tokenizer
from cl_dist.parallel.world import World
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_folder import reopen
from cl_dist.stage import StageRef, ref
from cl_dist.stages import checkpoint
from cl_dist.stages.weights import ShardedWeights
from tests.integration.test_step_checkpoints import made, train_until

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
pytestmark = pytest.mark.timeout(300 * TIMES)


def tries(count: int) -> settings:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count * TIMES, deadline=None, suppress_health_check=quiet)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(
        [
            *("../x", "/etc/passwd", "a/b", "..", "", "0", "1e400", "\x00", "${env:HOME}", "!!python/object:os.system"),
            *("~no.such.user/x", "/dev/null/x", "\ud800", "x" * 300, "x.py", "2024-02-30"),
        ]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a tree."""
    found = [path] if path else []
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in pairs:
        found += places(value, (*path, key))
    return found


def put(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy with a value put in a place; a value of Ellipsis takes the place away."""
    copy = json.loads(json.dumps(tree))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def trees(folder: Path) -> list[Any]:
    """Run files of an encoder and of a decoder."""
    methods = ("ctr", "rational_lamol")
    return [
        json.loads(json.dumps(tiny.tree(folder / m, {"science": {"method": dict(tiny.METHODS[m])}}))) for m in methods
    ]


@tries(600)
@given(data=st.data())
def test_a_run_file_with_anything_in_it(trees: list[Any], folder: Path, data: st.DataObject) -> None:
    tree = data.draw(st.sampled_from(trees))
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(tree)))
        tree = put(tree, path, data.draw(st.one_of(st.just(...), VALUES, st.dictionaries(st.text(max_size=6), VALUES))))
        if not isinstance(tree, dict) or not places(tree):
            return
    try:
        opened = Run(parse(RunConfig, tree))
        check_data(opened)
        for task in range(len(opened.tasks)):
            for stage in opened.plan(task):
                opened.ledger.is_done(stage)
        assert ".." not in opened.config.run.name.split("/")
        assert "/" not in opened.config.run.name
    except ClDistError:
        pass


@tries(300)
@given(
    text=st.one_of(
        st.text(max_size=200),
        VALUES.map(yaml.safe_dump),
        st.dictionaries(st.sampled_from(["run", "science", "cluster", "tasks"]), VALUES).map(yaml.safe_dump),
        st.binary(max_size=100),
    )
)
def test_a_folder_that_claims_to_be_a_run(folder: Path, text: Any) -> None:
    run = folder / "claimed"
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf8", "surrogatepass"))
    (run / "more.yaml").write_bytes(text if isinstance(text, bytes) else text.encode("utf8", "surrogatepass"))
    for added in (None, run / "more.yaml"):
        with pytest.raises(ClDistError):
            reopen(run, [], added)


ROW = {"id": "1", "text": "the soup is tasty", "label": "good", "split": "train", "rationale": [[1, 2]]}


@tries(500)
@given(data=st.data())
def test_rows_with_anything_in_them(folder: Path, data: st.DataObject) -> None:
    lines = [json.dumps({**row, "rationale": [[0, 1]]}) for row in tiny.rows("food", 6, 2, 2)]
    harmed = data.draw(st.sampled_from(["row", "text", "bytes"]))
    if harmed == "row":
        row = {**ROW, data.draw(st.sampled_from(list(ROW))): data.draw(VALUES)}
        lines.append(json.dumps(row))
    elif harmed == "text":
        lines.append(data.draw(st.text(max_size=50)))
    path = folder / "rows.jsonl"
    path.write_bytes(
        "\n".join(lines).encode("utf8", "surrogatepass")
        + (data.draw(st.binary(max_size=30)) if harmed == "bytes" else b"")
    )
    source = {"kind": "jsonl", "path": str(path), "split": {"by": "field"}}
    task = TaskConfig.model_validate({"id": "food", "row_id": "id", "rationale": "rationale", "source": source})
    said = ""
    try:
        loaded = load_task(task, DataConfig())
        assert all(0 <= start < end <= len(row.text) for row in loaded.train for start, end in row.rationale)
    except ClDistError as error:
        said = str(error)
    assert not said or "task food" in said or "rows.jsonl" in said


ODD_TEXTS = st.one_of(
    st.text(max_size=12),
    st.text(
        st.sampled_from("gG oO0d1.\t\u00a0\u200b\u00ad\ufe0f\u0301\u00e9\u0435[/]\x1b\x00\ud83d\udca9"), max_size=6
    ),
    st.sampled_from(
        [
            "[/INST]",
            "[bold]",
            ":smile:",
            "nan",
            "null",
            "1",
            "1.0",
            "\uff11",
            "true",
            "good ",
            "+",
            "-",
            "ba\ud83d",
            "\u200b",
        ]
    ),
)
NUMBERS: st.SearchStrategy[object] = st.one_of(
    st.integers(), st.floats(), st.booleans(), st.integers(0, 3).map(float), st.just(10**4000)
)
FIELDS = ("id", "text", "pair", "label", "split", "author", "unread")


@tries(400)
@given(data=st.data())
def test_fields_of_every_alphabet_and_number(folder: Path, data: st.DataObject) -> None:
    """Faults and warnings can be printed anywhere, and rows without a fault can be digested, stored and tokenized."""
    lines = [json.dumps({"pair": "", "author": "a", **row}) for row in tiny.rows("food", 4, 2, 2)]
    for number in range(data.draw(st.integers(1, 4))):
        row: dict[str, object] = {
            "id": f"n{number}",
            "text": "the soup",
            "pair": "",
            "label": "good",
            "split": "train",
            "author": "a",
        }
        for field in data.draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3)):
            row[field] = data.draw(st.one_of(ODD_TEXTS, NUMBERS, st.none()))
        line = json.dumps(row)
        if data.draw(st.integers(0, 9)) == 0:
            line = line[:-1] + ', "label": "good"}'
        if data.draw(st.integers(0, 9)) == 0:
            line = line[:-1] + f', "huge": {"9" * 5000}}}'
        lines.append(line)
    path = folder / "odd.jsonl"
    path.write_text("\n".join(lines), encoding="ascii")
    given = {"id": "food", "row_id": "id", "text_pair": "pair", "environment": "author"}
    limits = {"train": data.draw(st.integers(1, 9)), "balance": data.draw(st.booleans())}
    source = {"kind": "jsonl", "path": str(path), "split": {"by": "field"}}
    task = TaskConfig.model_validate({**given, "source": source, "rows": limits})
    found, again = (check_task(task, DataConfig()) for _ in (0, 1))
    for said in (*map(str, found.faults), *found.warnings):
        assert all(character.isprintable() or character in "\n\t" for character in said)
        said.encode()
    assert found.data.digests == again.data.digests
    for each in (*found.data.train, *found.data.dev, *found.data.test):
        "".join([each.id, each.text, each.text_pair or "", each.label, each.environment or ""]).encode()
        assert each.label.strip()
        assert likeness(each.label)
        assert each.where is not None
    assert sum(found.label_counts("train").values()) == min(len(found.data.train), limits["train"])


@tries(400)
@given(
    lines=st.lists(
        st.one_of(
            st.dictionaries(st.sampled_from(["text", "id", "more"]), st.one_of(ODD_TEXTS, NUMBERS)).map(json.dumps),
            st.just('{"text": "a", "text": "b"}'),
            st.just('{"text": "a", "n": ' + "9" * 5000 + "}"),
            st.text(max_size=10),
        ),
        max_size=3,
    )
)
def test_lines_to_be_answered_with_anything_in_them(lines: list[str]) -> None:
    task = TaskConfig.model_validate({"id": "food", "source": {"kind": "planted", "path": "food"}})
    said = ""
    try:
        for given_id, row in read_unlabelled([line.encode("utf8", "surrogatepass") for line in lines], task):
            json.dumps({"id": given_id}, ensure_ascii=False, allow_nan=False).encode()
            row.text.encode()
    except ClDistError as error:
        said = str(error)
    assert not said or said.startswith("line ")


STARTS = [b"PAR1", b"PK\x03\x04", b"\x1f\x8b", b"BZh91AY&SY", b"\xfd7zXZ\x00", b"\xff\xfe", b"\x80\x04", b"<html>"]
STARTS += [
    b"version https://git-lfs.github.com/spec/v1\n",
    b"[",
    b"{",
    b"sep=;\n",
    b"text;label\n",
    b'text,label\n"',
    b"",
]


@tries(300)
@given(
    kind=st.sampled_from(["jsonl", "csv", "tsv", "lines", "parquet"]),
    content=st.tuples(st.sampled_from(STARTS), st.binary(max_size=60)).map(b"".join),
)
def test_files_that_begin_like_anything(folder: Path, kind: str, content: bytes) -> None:
    path = folder / "begins"
    path.write_bytes(content)
    given = {"kind": kind, "path": str(path), "pattern": "(?P<text>.*)" if kind == "lines" else None}
    found = check_task(TaskConfig.model_validate({"id": "a", "source": given}), DataConfig())
    assert found.faults
    assert all(fault.file == str(path) for fault in found.faults)
    assert len({(fault.line, fault.field, fault.message) for fault in found.faults}) == len(found.faults)


@tries(25)
@given(data=st.data())
def test_tokenizers_with_anything_in_them(folder: Path, data: st.DataObject) -> None:
    """What passes the check gives every row tokens, and each of them an embedding; what does not is named."""
    model = tiny.save_model(folder / "odd-model") if not (folder / "odd-model").exists() else folder / "odd-model"
    source = folder / "odd-tokenizer"
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(model, source)
    path = source / "tokenizer.json"
    tokenizer = json.loads(path.read_text("utf8"))
    vocabulary = tokenizer["model"]["vocab"]
    for word in data.draw(st.lists(st.sampled_from([word for word in tiny.WORDS if word[0] != "["]), max_size=3)):
        if data.draw(st.booleans()):
            vocabulary.pop(word, None)
        else:
            vocabulary[word] = data.draw(st.integers(len(tiny.WORDS), len(tiny.WORDS) + 9))
    if data.draw(st.booleans()):
        dropped = {
            "type": "Replace",
            "pattern": {"Regex": data.draw(st.sampled_from(["soup", ".", "x"]))},
            "content": "",
        }
        tokenizer["normalizer"] = dropped
    for name in data.draw(st.lists(st.sampled_from(["<new>", "soup", "<image>"]), max_size=2, unique=True)):
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        entry = {"id": len(tiny.WORDS) + len(tokenizer["added_tokens"]), "content": name, **flags}
        tokenizer["added_tokens"].append(entry | {"special": data.draw(st.booleans())})
    path.write_text(json.dumps(tokenizer), "utf8")
    for name in data.draw(st.lists(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]), max_size=1)):
        (source / name).unlink()
    checks._REPORTS.clear()
    opened = tiny.make_run(
        folder / "odd", {"science": {"model": {"source": str(source)}, "method": {"name": "sequential"}}}
    )
    said = ""
    try:
        check_tokens(opened)
        reads = load_tokenizer(opened.config.science.model)
        for task in range(len(opened.tasks)):
            for row in (*opened.data(task).train, *opened.data(task).dev, *opened.data(task).test):
                assert reads(row.text, add_special_tokens=False)["input_ids"]
                assert max(reads(row.text)["input_ids"]) < len(tiny.WORDS)
    except ClDistError as error:
        said = str(error)
    assert not said or "science.model" in said or "field text" in said


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Train stage that was stopped after two steps."""
    folder = tmp_path_factory.mktemp("begun")
    job = made(folder / "run", "ctr")
    (folder / "out").mkdir()
    train_until(0, 1, job, str(folder / "out"), 2)
    return folder / "out"


@tries(300)
@given(data=st.data())
def test_a_checkpoint_with_anything_in_it(begun: Path, folder: Path, data: st.DataObject) -> None:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(begun, out)
    newest = checkpoint._checkpoints(out)[0]
    name = data.draw(st.sampled_from(["checkpoint.json", "trainable.safetensors", "exp_avg.safetensors"]))
    path = newest / name
    whole = path.read_bytes()
    if name == "checkpoint.json" and data.draw(st.booleans()):
        index = json.loads(whole)
        put_there = data.draw(st.one_of(st.just(...), VALUES))
        path.write_text(json.dumps(put(index, data.draw(st.sampled_from(places(index))), put_there)))
    else:
        place = data.draw(st.integers(0, min(len(whole), 3000) - 1))
        path.write_bytes(
            whole[:place] + data.draw(st.binary(max_size=8)) + whole[data.draw(st.integers(place, len(whole))) :]
        )
    harmed = path.read_bytes()
    found = checkpoint.latest(out, World.current())
    if found is not None and harmed != whole:
        assert name == "checkpoint.json"
        assert json.loads(harmed) == json.loads(whole)  # spelled in another way


@tries(300)
@given(data=st.data())
def test_weights_with_anything_in_them(begun: Path, folder: Path, data: st.DataObject) -> None:
    whole = (checkpoint._checkpoints(begun)[0] / "trainable.safetensors").read_bytes()
    place = data.draw(st.integers(0, min(len(whole), 3000) - 1))
    harmed = whole[:place] + data.draw(st.binary(max_size=8)) + whole[data.draw(st.integers(place, len(whole))) :]
    (folder / "trainable.safetensors").write_bytes(harmed)
    said = ""
    try:
        for name, tensor in ShardedWeights(folder).items():
            assert isinstance(name, str)
            assert tensor.numel() >= 0
    except ClDistError as error:
        said = str(error)
    assert not said or str(folder) in said


@tries(300)
@given(text=st.one_of(st.text(max_size=100), VALUES.map(json.dumps), st.binary(max_size=60)))
def test_a_manifest_with_anything_in_it(folder: Path, trees: list[Any], text: Any) -> None:
    opened = Run(parse(RunConfig, trees[0]))
    path = opened.ledger.path(StageRef(task=0, stage="train")) / "manifest.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf8", "surrogatepass"))
    try:
        with pytest.raises(ClDistError):
            opened.ledger.is_done(opened.plan(0)[0])
        with pytest.raises(ClDistError):
            opened.ledger.verify(StageRef(task=0, stage="train"))
    finally:
        path.unlink()


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, str]:
    """A run with one finished stage, and its manifest."""
    opened = tiny.make_run(tmp_path_factory.mktemp("published"))
    with opened.ledger.publish(opened.plan(0)[0]) as out:
        (out / "train.json").write_text('{"loss": 1}')
    return opened, (out.with_name("train") / "manifest.json").read_text("utf8")


@tries(300)
@given(data=st.data())
def test_a_whole_manifest_with_a_fault_put_in(published: tuple[Run, str], data: st.DataObject) -> None:
    opened, whole = published
    stage = opened.plan(0)[0]
    path = opened.ledger.path(ref(stage)) / "manifest.json"
    if data.draw(st.booleans()):
        manifest = json.loads(whole)
        put_there = data.draw(st.one_of(st.just(...), VALUES))
        path.write_text(json.dumps(put(manifest, data.draw(st.sampled_from(places(manifest))), put_there)), "utf8")
    else:
        harmed, place = bytearray(whole.encode()), data.draw(st.integers(0, len(whole) - 1))
        harmed[place] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(harmed)
    told: CheckpointError | None = None
    try:
        assert opened.ledger.is_done(stage)
        found, before = opened.ledger.manifest(ref(stage)), json.loads(whole)
        assert found is not None
        assert [found[key] for key in ("fingerprint", "facts")] == [before[key] for key in ("fingerprint", "facts")]
        json.dumps([found["started"], round(found["seconds"], 1)], allow_nan=False)  # what a summary tells of it
        opened.ledger.verify(ref(stage))
        assert opened.ledger.read(ref(stage), "train.json") == {"loss": 1}
    except CheckpointError as error:
        told = error
    assert told is None or (str(path.parent) in str(told) and not isinstance(told, StageConflictError))
