from pathlib import Path

import pytest

from cl_dist.data.orders import check_order, read_orders
from cl_dist.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "orders"),
    [
        ("laptop\n# rest\n\nhotel # last\n", [["laptop", "hotel"]]),
        ("a\tb\tc\nc\tb\ta\n", [["a", "b", "c"], ["c", "b", "a"]]),
        ("0\ta\tb\n1\tb\ta\n", [["a", "b"], ["b", "a"]]),
        ("a b\r\nb a\r\n", [["a", "b"], ["b", "a"]]),
        ("3 a b\n", [["a", "b"]]),
        ("20 a\na 20\n", [["20", "a"], ["a", "20"]]),  # 20 is a task: not every line starts with a number
        ("0 1 2\n2 1 0\n", [["0", "1", "2"], ["2", "1", "0"]]),  # all ids are numbers: no index
        ("\ufeffa\nb\n", [["a", "b"]]),
    ],
)
def test_a_file_holds_one_order_by_lines_or_one_order_per_line(
    tmp_path: Path, text: str, orders: list[list[str]]
) -> None:
    path = tmp_path / "orders"
    path.write_bytes(text.encode())
    assert read_orders(str(path)) == orders


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"# nothing\n\n", "has no task"), (b"\xff\xfea\n", "cannot be read"), (b"0 a b\n1\n", "index 1")],
)
def test_a_file_without_a_usable_order_says_why(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "orders"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=complaint):
        read_orders(str(path))


def test_a_missing_order_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no_such_orders: no such file"):
        read_orders("no_such_orders")


def test_a_good_order_passes_and_may_leave_tasks_out() -> None:
    check_order(["b", "a"], ["a", "b", "c"])


def test_every_unknown_or_repeated_task_is_named_in_one_error() -> None:
    with pytest.raises(ConfigError) as caught:
        check_order(["laptop", "restarant", "laptop"], ["laptop", "restaurant"], where="science.order")
    unknown, repeated = str(caught.value).splitlines()
    assert unknown == "science.order[1]='restarant': no such task; did you mean 'restaurant'?"
    assert repeated == "science.order[2]='laptop': already at position 0; a task is learned once"


def test_an_empty_order_is_an_error() -> None:
    with pytest.raises(ConfigError, match="has no task; known: a, b"):
        check_order([], ["a", "b"])
