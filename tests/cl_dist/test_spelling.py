"""How values are spelled in run files and overrides: numbers, truth values, dates, comments, ids with points."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from cl_dist.config import Section, Tree, apply_overrides, parse, plain_yaml
from cl_dist.contract import tiny
from cl_dist.errors import ConfigError
from cl_dist.run_config import RunConfig, read_run_file
from cl_dist.strict_yaml import yaml_text

TIMES = int(os.environ.get("FUZZ_TIMES", "1"))
many = settings(max_examples=200 * TIMES, deadline=None)


class Inner(Section):
    """Numbers inside of something."""

    shares: list[float] = []
    counts: dict[str, int] = {}


class Numbers(Section):
    """A number of each kind, and what is no number."""

    count: int = 0
    rate: float = 0.0
    bound: int | None = None
    flag: bool = False
    text: str = ""
    words: list[str] | str | None = None
    free: dict[str, Any] = {}
    inner: Inner = Inner()
    limit: float = Field(1.0, gt=0)


def read(tmp_path: Path, text: str) -> Tree:
    """Return a file's tree, and see that an override reads a value just as the file does."""
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf8")
    return plain_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-05", 1e-5), ("1E5", 1e5), ("2e-2", 0.02), (".5", 0.5), ("5.", 5.0), ("-1.5E+3", -1500.0), ("+3", 3)),
        *(("0", 0), ("-0", 0), ("10", 10), ("6.02e23", 6.02e23), ("1e1", 10.0)),
    ],
)
def test_numbers_are_those_of_json_and_yaml_1_2_wherever_they_stand(tmp_path: Path, text: str, value: float) -> None:
    expected = {"rate": value, "free": {"deep": [value]}}
    assert read(tmp_path, f"{{rate: {text}, free: {{deep: [{text}]}}}}") == expected
    assert apply_overrides({}, [f"rate={text}", f"free.deep=[{text}]"]) == expected
    assert parse(Numbers, expected).rate == value


@pytest.mark.parametrize("field", ["count", "rate", "bound", "limit", "inner.shares.0", "inner.counts.x"])
@pytest.mark.parametrize(
    "text",
    [
        *("010", "0o10", "0x1f", "0b11", "1_000", "1:30", "1:30.5", "'010'", "00", "-07", "1__0.5", "٣"),
        *("yes", "no", "on", "Off", "true", "FALSE"),
        *(".inf", "-.inf", ".nan", "inf", "nan", "1e999", "Infinity"),
    ],
)
def test_no_other_spelling_is_taken_for_a_number(tmp_path: Path, field: str, text: str) -> None:
    base = {"inner": {"shares": [0.5], "counts": {"x": 1}}}
    if field == "inner.shares.0":
        told = [["inner.shares.0=" + text], ["inner.shares=[" + text + "]"]]
    else:
        told = [[f"{field}={text}"]]
    for overrides in told:
        with pytest.raises(ConfigError, match=field.replace(".", r"\.")) as caught:
            parse(Numbers, apply_overrides(base, overrides))
        assert "number" in str(caught.value) or "integer" in str(caught.value)


@pytest.mark.parametrize("text", ["010", "0o10", "0x1f", "1_000", "1:30", "=", "1e", "1.2.3"])
def test_what_is_no_number_is_a_text_as_it_was_written(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, f"{{text: {text}}}") == {"text": text}
    assert apply_overrides({}, [f"text={text}"]) == {"text": text}


def test_truth_values_and_whole_floats_still_serve_where_they_belong() -> None:
    made = parse(Numbers, apply_overrides({}, ["flag=yes", "count=1e1", "rate=3", "bound='7'", "limit='1e-3'"]))
    assert (made.flag, made.count, made.rate, made.bound, made.limit) == (True, 10, 3.0, 7, 1e-3)


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        *(("yes", "quote it: 'yes'"), ("off", "'off'"), ("true", "'true'"), ("2024-01-01", "quote it: '2024-01-01'")),
        *(("5", "quote it: '5'"), ("1.5", "quote it: '1.5'"), ("~", "quote it if it is text: 'null'")),
        ("which: one", "quote it"),
    ],
)
def test_what_yaml_makes_of_a_text_is_shown_with_the_quotes_that_it_needs(text: str, quoted: str) -> None:
    for override, place in ((f"text={text}", "text="), (f"words=[{text}]", r"words\.0=")):
        with pytest.raises(ConfigError, match=f"^{place}") as caught:
            parse(Numbers, apply_overrides({}, [override]))
        assert quoted in str(caught.value)
        assert str(caught.value).count("\n") == 0
    if ":" not in text:
        with pytest.raises(ConfigError, match=r"^inner\.counts: key ") as caught:
            parse(Numbers, apply_overrides({}, [f"inner.counts={{{text}: 1}}"]))
        assert quoted in str(caught.value)


def test_a_list_without_brackets_is_shown_with_them(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^inner.shares='1, 2'.* in brackets: \[1, 2\]$"):
        parse(Numbers, {"inner": {"shares": "1, 2"}})
    tree = tiny.tree(tmp_path, {"science": {"order": "food,film"}})
    with pytest.raises(
        ConfigError, match=r"science.order='food,film': no such order; known: none.* brackets: \[a, b\]"
    ):
        parse(RunConfig, tree).science.sequence()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("text=#2 String", "text='\"#2 String\"'"),
        ("text= # nothing", "after '#'"),
        ("count=5 # five", "after '#'"),
        ("text=is it good? #really", "after '#'"),
        ("inner=counts: {x: 1} # ones", "after '#'"),
        ("words=[a, # b\n c]", "after '#'"),
        ("text=", "write null for no value"),
        ("text=   ", "write null for no value"),
        ("count=\t5", "not valid YAML"),
        ("count=5\t", "not valid YAML"),
    ],
)
def test_an_override_of_which_yaml_would_drop_a_part_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({}, [override])
    assert repr(override) in str(caught.value)
    assert said in str(caught.value)


def test_a_number_sign_inside_of_a_text_is_none_of_a_comment() -> None:
    tree = apply_overrides({}, ["text=C#", 'words=["#2 String", a#b]', "free.x='# y'", "free.y=null", "free.z=~"])
    assert tree == {"text": "C#", "words": ["#2 String", "a#b"], "free": {"x": "# y", "y": None, "z": None}}


def test_a_file_whose_value_is_a_comment_is_refused_and_comments_are_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no value before the comment '#2 String'.*\n.*line 2"):
        read(tmp_path, "count: 1\ntext: #2 String\nrate: 2\n")
    text = "count: 1 #one\ntext: # none yet\ninner: #what is inside\n  shares: [1] # all\n"
    assert read(tmp_path, text) == {"count": 1, "text": None, "inner": {"shares": [1]}}


def test_ids_and_keys_with_points_are_named_as_they_are() -> None:
    tree = {"tasks": [{"id": "v1.0"}, {"id": "v1"}, {"id": "v1.0.2"}, {"id": 7}], "map": {"a.b": {"c": 1}, "a": {}}}
    overrides = ["tasks.v1.0.x=1", "tasks.v1.x=2", "tasks.v1.0.2.x=3", "tasks.7.id='7'", "map.a.b.c=5", "map.a.d.e=6"]
    assert apply_overrides(tree, overrides) == {
        "tasks": [{"id": "v1.0", "x": 1}, {"id": "v1", "x": 2}, {"id": "v1.0.2", "x": 3}, {"id": "7"}],
        "map": {"a.b": {"c": 5}, "a": {"d": {"e": 6}}},
    }
    assert apply_overrides(tree, ["tasks.v1.0={id: new}"])["tasks"][0] == {"id": "new"}


@pytest.mark.parametrize("name", ["my run (1).yaml", "größe.yaml", "-x.yaml", "x" * 120 + ".yaml"])
def test_a_run_file_whose_name_is_none_for_a_run_says_so(tmp_path: Path, name: str) -> None:
    tree = tiny.tree(tmp_path)
    del tree["run"]["name"]
    path = tmp_path / name
    path.write_text(yaml.safe_dump(tree), encoding="utf8")
    with pytest.raises(ConfigError, match=r"run.name is not set, .*: expected up to 100 letters") as caught:
        read_run_file(path)
    assert str(path) in str(caught.value)
    assert read_run_file(path, ["run.name=fine"]).run.name == "fine"


@many
@given(value=st.one_of(st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False)))
def test_any_number_is_read_back_from_how_json_and_python_write_it(value: float) -> None:
    assert apply_overrides({}, [f"x={json.dumps(value)}"]) == {"x": value}
    assert apply_overrides({}, [f"x={value:e}"])["x"] == float(f"{value:e}")


SPELLINGS = st.one_of(
    st.text("0123456789eE+-._:xob", min_size=1, max_size=8),
    st.text(max_size=12),
    st.sampled_from(
        ["yes", "no", "~", "null", "#x", "a: b", "1e5", "1e-05", ".5", "=", "<<", "2024-01-01", "- a", "?"]
    ),
)


@many
@given(text=SPELLINGS)
def test_any_text_that_is_written_to_a_run_file_is_read_back(tmp_path_factory: Any, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    path = tmp_path_factory.getbasetemp() / "spelled.yaml"
    path.write_bytes(yaml_text({"text": text, "words": [text], "free": {"key": {text or "k": text}}}).encode())
    assert plain_yaml(path) == {"text": text, "words": [text], "free": {"key": {text or "k": text}}}


@many
@given(text=SPELLINGS.filter(lambda text: "\n" not in text))
def test_whatever_is_written_where_a_number_belongs_is_that_number_or_refused(text: str) -> None:
    try:
        made = parse(Numbers, apply_overrides({}, [f"rate={text}"]))
    except ConfigError:
        return
    said = text.strip().strip("'\"")
    assert math.isclose(made.rate, float(said), rel_tol=1e-12)
    assert "_" not in said
    assert not said.lstrip("+-").startswith(tuple(f"0{digit}" for digit in range(10)))
