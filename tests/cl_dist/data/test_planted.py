from collections import Counter

from cl_dist.data.load import check_task
from cl_dist.data.planted import THEMES, planted
from cl_dist.data.tasks import DataConfig, TaskConfig


def loaded(theme: str, **source: object) -> TaskConfig:
    given = {"kind": "planted", "path": theme, "split": {"by": "field"}, **source}
    return TaskConfig.model_validate({"id": "t", "row_id": "id", "rationale": "rationale", "source": given})


def test_the_rationale_is_the_phrase_that_gives_the_label_away() -> None:
    for theme, labels in THEMES.items():
        data = check_task(loaded(theme), DataConfig()).data
        assert set(data.labels) == set(labels)
        assert len(data.train) > len(data.dev) + len(data.test)
        for row in data.train:
            ((start, end),) = row.rationale
            assert row.text[start:end] in labels[row.label]


def test_every_split_has_every_label_equally_often() -> None:
    for theme, labels in THEMES.items():
        counts = Counter((row["split"], row["label"]) for row in planted(theme))
        assert counts == {
            (split, label): share * 1200 // len(labels) // 10
            for split, share in (("train", 8), ("dev", 1), ("test", 1))
            for label in labels
        }


def test_rows_are_always_the_same_and_mostly_different() -> None:
    rows = list(planted("food"))
    assert rows == list(planted("food"))
    assert len({row["text"] for row in rows}) > 0.95 * len(rows)
    assert [row["text"] for row in planted("food", seed=1)] != [row["text"] for row in rows]


def test_an_unknown_theme_is_named() -> None:
    (fault, *_) = check_task(loaded("foot"), DataConfig()).faults
    assert "unknown theme; did you mean 'food'" in str(fault)
