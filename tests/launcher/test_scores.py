import pytest

from launcher.scores import WIDE, score_text


@pytest.mark.parametrize(
    ("value", "interval", "width", "expected"),
    [
        (0.8625, (0.8412, 0.8838), WIDE, "0.8625 ±.0213"),
        (0.8625, [0.8412, 0.8838], WIDE - 1, "0.8625"),
        (-0.02, (-1.0, 1.5), 200, "-0.0200 ±1.2500"),
        (0.5, None, 200, "0.5000"),
        (None, None, 200, "-"),
        (0.0, (0.0, 0.0), 200, "0.0000 ±.0000"),
    ],
)
def test_a_score_has_half_of_its_interval_where_there_is_room(
    value: float | None, interval: list[float] | None, width: int, expected: str
) -> None:
    assert score_text(value, interval, width) == expected
