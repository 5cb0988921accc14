import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from cl_dist.config import Section, Tree, apply_overrides, merged, parse, plain_yaml, read_yaml
from cl_dist.errors import ConfigError


class Inner(Section):
    """An inner section."""

    rate: float = Field(1.0, gt=0)
    name: str | None = None


class Outer(Section):
    """An outer section."""

    inner: Inner = Inner()
    """What is inside."""
    count: int = 3
    items: list[int] = []


TREE: Tree = {"x": 1, "y": {"z": 2}}
TASKS: Tree = {"tasks": [{"id": "laptop", "n": 1}, {"id": "phone", "n": 2}], "train": {"lr": 0.1}, "seed": 0}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_unknown_key_is_named_by_its_path_and_the_nearest_key_suggested() -> None:
    with pytest.raises(ConfigError, match=r"^inner: unknown key 'rat'; did you mean 'rate'\?$"):
        parse(Outer, {"inner": {"rat": 1}})


def test_unknown_key_unlike_any_other_lists_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'zzz'; known: name, rate"):
        parse(Inner, {"zzz": 1})


def test_every_fault_is_told_with_its_value() -> None:
    with pytest.raises(ConfigError) as caught:
        parse(Outer, {"inner": {"rate": -1}, "count": "many"}, "file.yaml: ")
    rate, count = str(caught.value).splitlines()
    assert rate.startswith("file.yaml: inner.rate=-1: ")
    assert "greater than 0" in rate
    assert count.startswith("file.yaml: count='many': ")


def test_settings_are_frozen_and_their_docstrings_are_in_the_schema() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Outer().count = 4  # type: ignore[misc]
    assert Outer.model_json_schema()["properties"]["inner"]["description"] == "What is inside."


def test_only_what_differs_from_a_default_is_changed() -> None:
    assert parse(Outer, {"count": 3, "inner": {"rate": 1.0}}).changed() == {}
    assert parse(Outer, {"count": 4, "inner": {"rate": 1.0, "name": "a"}}).changed() == {
        "count": 4,
        "inner": {"name": "a"},
    }


def test_updated_keeps_what_was_set_and_checks_again() -> None:
    old = parse(Outer, {"count": 5, "inner": {"name": "a"}})
    new = old.updated({"inner": {"rate": 2.0}})
    assert (new.count, new.inner) == (5, Inner(rate=2.0, name="a"))
    assert old.inner.rate == 1.0
    with pytest.raises(ConfigError, match=r"inner.rate=0"):
        old.updated({"inner": {"rate": 0}})


def test_extends_is_laid_underneath_key_by_key_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "root.yaml", "{a: {x: 1, y: 1, z: [1, 2]}, b: 1}")
    write(tmp_path / "base" / "middle.yaml", "{extends: root.yaml, a: {y: 2}}")
    top = write(tmp_path / "top.yaml", "{extends: base/middle.yaml, a: {z: [3]}, c: 1}")
    assert read_yaml(top) == {"a": {"x": 1, "y": 2, "z": [3]}, "b": 1, "c": 1}


def test_a_file_that_extends_itself_is_refused_with_the_way_round(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml")
    write(tmp_path / "b.yaml", "extends: a.yaml")
    with pytest.raises(ConfigError, match=r"extends itself through a.yaml -> b.yaml -> a.yaml"):
        read_yaml(tmp_path / "a.yaml")


def test_environment_variables_are_filled_in_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_DATA", "there")
    path = write(tmp_path / "run.yaml", "{a: {b: ['${env:CL_DATA}/x', 1]}, c: '$CL_DATA'}")
    assert read_yaml(path) == {"a": {"b": ["there/x", 1]}, "c": "$CL_DATA"}


def test_an_unset_environment_variable_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CL_DATA", raising=False)
    with pytest.raises(ConfigError, match=r"run.yaml: uses \$\{env:CL_DATA\}, but CL_DATA is not set"):
        read_yaml(write(tmp_path / "run.yaml", "a: ${env:CL_DATA}"))


def bomb(form: str) -> str:
    """Nine lines of YAML, each with ten times the values of the one before."""
    lines = (form.format(n=n, last=", ".join([f"*b{n - 1}"] * 10)) for n in range(1, 9))
    return "b0: &b0 {x: 1}\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: [", "not valid YAML"),
        ("extends: [a.yaml]", "extends=.*expected the path"),
        ("extends: gone.yaml", "gone.yaml: no such file"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),  # nothing in a run file is executed
        ("run: x", r"run: expected a mapping with the keys name and dir, got 'x'"),
        ("run: &a {name: x, y: *a}", r"\*a is used inside the value that it refers to\n.*line 1, column 22"),
        ("a: &a {<<: *a}", r"\*a is used inside"),
        (bomb("b{n}: &b{n} [{last}]"), "more than 100000 values"),
        (bomb("b{n}: &b{n} {{<<: [{last}]}}"), "more than 100000 values"),
        ("a: " + "[" * 2000, "nested too deeply"),
        ("a: {x: 1, y: 2,\n x: 3}", r"duplicate key 'x'\n.*line 2, column 2"),
        ('a: 1\n"a": 1', r"duplicate key 'a'\n.*line 2"),
        ("a: 2024-02-30", "not valid YAML: day is out of range"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: !!bool x", "not valid YAML"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: !!set {x}", "could not determine a constructor"),
    ],
)
def test_a_file_that_is_no_run_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path / "run.yaml", text))


def test_mappings_are_merged_and_aliases_stand_for_copies(tmp_path: Path) -> None:
    text = "{a: &a {x: 1, y: {z: 2}}, b: &b {<<: *a, x: 3}, c: {<<: [*b, *a]}, d: *a}"
    tree = read_yaml(write(tmp_path / "run.yaml", text))
    assert tree == {"a": TREE, "b": TREE | {"x": 3}, "c": TREE | {"x": 3}, "d": TREE}
    assert apply_overrides(plain_yaml(tmp_path / "run.yaml"), ["d.y.z=5"]) == tree | {"d": {"x": 1, "y": {"z": 5}}}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"name": "a\ud800"}, r"^inner.name: contains half a surrogate pair, '\\ud800', at position 1$"),
        ({"\ud800": 1}, r"^inner: key '\\ud800': contains half a surrogate pair"),
        ({"free": {"rate": [1.0, float("nan")]}}, r"^inner.free.rate.1=nan: expected a finite number$"),
        (json.loads('{"a":' * 60 + "1" + "}" * 60), r"^inner(\.a){49}: nested more than 50 levels deep$"),
    ],
)
def test_what_nothing_can_be_made_of_is_refused_whatever_the_type_of_its_field(tree: Tree, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(Outer, {"inner": tree})


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.lr=5e-5", {"train": {"lr": 5e-5}}),  # YAML 1.1 wants a dot
        ("train.lr=5.0e-5", {"train": {"lr": 5e-5}}),
        ("train.max_grad_norm=[1, 2]", {"train": {"lr": 0.1, "max_grad_norm": [1, 2]}}),
        ("cluster.workers=2", {"cluster": {"workers": 2}}),
        ("seed=null", {"seed": None}),
        ("note=a=b", {"note": "a=b"}),
        ("tasks.1.n=7", {"tasks": [{"id": "laptop", "n": 1}, {"id": "phone", "n": 7}]}),
        ("tasks.laptop.n=7", {"tasks": [{"id": "laptop", "n": 7}, {"id": "phone", "n": 2}]}),
        ("tasks.phone.train.lr=1", {"tasks": [TASKS["tasks"][0], {"id": "phone", "n": 2, "train": {"lr": 1}}]}),
        ("tasks.0={id: x}", {"tasks": [{"id": "x"}, {"id": "phone", "n": 2}]}),
    ],
)
def test_an_override_sets_one_place(override: str, expected: dict[str, Any]) -> None:
    assert apply_overrides(TASKS, [override]) == TASKS | expected


def test_overrides_leave_the_given_tree_alone() -> None:
    before = yaml.safe_dump(TASKS)
    apply_overrides(TASKS, ["tasks.0.n=9", "train.lr=9"])
    assert yaml.safe_dump(TASKS) == before


def test_an_id_goes_before_an_index() -> None:
    tree = {"tasks": [{"id": "1"}, {"id": "0"}]}
    assert apply_overrides(tree, ["tasks.0.n=5"]) == {"tasks": [{"id": "1"}, {"id": "0", "n": 5}]}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "expected dotted.key=value"),
        ("=3", "expected dotted.key=value"),
        ("train.lr=[", "not valid YAML"),
        ("run.name=2024-02-30", "not valid YAML: day is out of range"),
        ("train.lr={x: 1, x: 2}", "not valid YAML: duplicate key 'x'"),
        ("train.lr=" + "[" * 2000, "not valid YAML: nested too deeply"),
        ("tasks.lapto.n=1", "no list item 'lapto'; did you mean 'laptop'"),
        ("tasks.2.n=1", "no list item '2'"),
        ("tasks.-1.n=1", "no list item '-1'"),
        ("tasks.2=1", "no list item '2'"),
        ("tasks.0.n.deep.er=1", None),  # a single value gives way to a mapping
    ],
)
def test_a_bad_override_is_shown_with_the_reason(override: str, message: str | None) -> None:
    if message is None:
        assert apply_overrides(TASKS, [override])["tasks"][0]["n"] == {"deep": {"er": 1}}
        return
    with pytest.raises(ConfigError, match=message) as caught:
        apply_overrides(TASKS, [override])
    assert repr(override) in str(caught.value)


KEYS = st.text("abcdefgh_", min_size=1, max_size=5)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-999, 999)
    | st.floats(allow_nan=False)
    | st.text("aZ0 :#'\"\n-é~", max_size=8)
)
TREES = st.dictionaries(
    KEYS, st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3), max_leaves=8)
)


def leaves(tree: Tree, prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        found += leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


@given(TREES)
def test_a_tree_written_as_overrides_reads_back_as_itself(tree: Tree) -> None:
    overrides = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in leaves(tree)]
    assert apply_overrides({}, overrides) == tree
    assert apply_overrides(tree, overrides) == tree


@given(TREES, TREES)
def test_what_is_laid_on_top_wins_and_the_rest_stays(base: Tree, over: Tree) -> None:
    result = merged(base, over)
    assert merged(result, over) == result
    for key in base.keys() - over.keys():
        assert result[key] == base[key]
    for key, value in over.items():
        if not isinstance(value, dict):
            assert result[key] == value
