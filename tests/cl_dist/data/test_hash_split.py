import random
from collections import Counter
from hashlib import sha256

import pytest

from cl_dist.data.hash_split import hashed_splits
from cl_dist.data.tasks import Split

Rows = list[tuple[str, str]]


def rows(counts: dict[str, int], prefix: str = "r") -> Rows:
    return [(f"{prefix}-{label}-{number}", label) for label, count in counts.items() for number in range(count)]


def assigned(data: Rows, split: Split | None = None) -> dict[tuple[str, str], str]:
    return dict(zip(data, hashed_splits(data, split or Split()), strict=True))


def by_threshold(row_id: str, split: Split) -> str:
    """The definition without stratification, with the hash as a fraction of its range."""
    fraction = int(sha256(row_id.encode()).hexdigest(), 16) / 16**64
    return "train" if fraction < split.train else "dev" if fraction < split.train + split.dev else "test"


@pytest.mark.parametrize("number", range(20))
def test_sixty_rows_of_three_labels_have_two_dev_and_two_test_rows_of_each(number: int) -> None:
    found = assigned(rows({"billing": 20, "refund": 20, "other": 20}, f"set{number}"))
    counts = Counter((split, label) for (_, label), split in found.items())
    assert {counts[split, label] for split in ("dev", "test") for label in ("billing", "refund", "other")} == {2}


@pytest.mark.parametrize(
    ("count", "least", "most"),
    [(1, 0, 0), (2, 0, 1), (3, 1, 1), (10, 1, 1), (20, 2, 2), (40, 3, 5), (300, 20, 40), (6000, 400, 800)],
)
def test_a_label_differs_from_its_fractions_by_a_third_at_most(count: int, least: int, most: int) -> None:
    for number in range(40 if count < 1000 else 4):
        found = Counter(assigned(rows({"a": count}, f"set{number}")).values())
        assert least <= found["dev"] <= most
        assert max(least, int(count > 1)) <= found["test"] <= most
        assert found["train"] >= 1


@pytest.mark.parametrize(("train", "dev"), [(0.4, 0.1), (0.5, 0.05), (0.1, 0.1), (0.1, 0.8)])
def test_three_rows_are_in_all_splits_whatever_the_fractions(train: float, dev: float) -> None:
    for count in range(3, 12):
        for number in range(10):
            found = Counter(assigned(rows({"a": count}, f"set{number}"), Split(train=train, dev=dev)).values())
            assert min(found[split] for split in ("train", "dev", "test")) >= 1


def test_a_label_that_fits_keeps_the_split_of_its_hash() -> None:
    split, data = Split(), rows({"often": 4000, "half": 2000})
    assert assigned(data, split) == {row: by_threshold(row[0], split) for row in data}
    few = Split(train=0.5, dev=0.25)
    found, wanted = assigned(rows({"a": 90}), few), {row: by_threshold(row[0], few) for row in rows({"a": 90})}
    assert found == wanted


def test_rows_that_move_are_those_next_to_a_boundary() -> None:
    split = Split()
    for number in range(30):
        data = rows({"a": 30}, f"set{number}")
        found = assigned(data, split)
        ordered = [found[row] for row in sorted(data, key=lambda row: sha256(row[0].encode()).digest())]
        assert ordered == sorted(ordered, key=["train", "dev", "test"].index)


def test_the_split_of_a_row_depends_on_ids_and_labels_of_its_label_alone() -> None:
    data = rows({"a": 30, "b": 25, "rare": 4})
    whole = assigned(data)
    shuffled = random.Random(0).sample(data, len(data))
    assert assigned(shuffled) == whole
    more = assigned([*data, *rows({"b": 50, "new": 9}, "more")])
    assert all(more[row] == whole[row] for row in data if row[1] != "b")


@pytest.mark.parametrize("split", [Split(), Split(train=0.5, dev=0.25), Split(train=0.3, dev=0.1), Split(dev=0)])
def test_another_row_moves_three_rows_at_most_and_few_of_a_large_label(split: Split) -> None:
    data = rows({"a": 900})
    random.Random(1).shuffle(data)
    before, moved = assigned(data[:3], split), Counter[bool]()
    for size in range(4, len(data) + 1):
        after = assigned(data[:size], split)
        crossed = sum(after[row] != there for row, there in before.items())
        assert crossed <= 3
        moved[size > 450] += crossed
        before = after
    exact = sum(_moved_by_ranks(data[:size], split) for size in range(4, len(data) + 1))
    assert moved[True] + moved[False] < exact / 2  # a cut at exact ranks moves a row or so for each new row
    assert moved[True] <= moved[False]


def _moved_by_ranks(data: Rows, split: Split) -> int:
    """The rows that the last one moves if a label's rows, ordered by hash, are cut at exact fractions."""

    def cut(part: Rows) -> dict[tuple[str, str], str]:
        ordered = sorted(part, key=lambda row: sha256(row[0].encode()).digest())
        ends = round(split.train * len(part)), round((split.train + split.dev) * len(part))
        return {row: "train" if k < ends[0] else "dev" if k < ends[1] else "test" for k, row in enumerate(ordered)}

    before, after = cut(data[:-1]), cut(data)
    return sum(after[row] != there for row, there in before.items())


def test_equal_ids_of_a_label_stay_together() -> None:
    data = rows({"a": 30}) * 2
    halves = hashed_splits(data, Split())
    assert halves[:30] == halves[30:]


def test_without_a_dev_split_every_label_is_in_train_and_test() -> None:
    found = Counter((split, label) for (_, label), split in assigned(rows({"a": 8, "b": 3}), Split(dev=0)).items())
    assert found == {("train", "a"): 6, ("test", "a"): 2, ("train", "b"): 2, ("test", "b"): 1}
