"""Task orders: reading from text files, and checks."""

from collections.abc import Sequence

from cl_dist.config import did_you_mean
from cl_dist.errors import ConfigError
from cl_dist.paths import resolve


def read_orders(path: str) -> list[list[str]]:
    """Read the orders in a text file; `#` starts a comment.

    A file with one task id per line has one order. In a file with several ids per line, separated by tabs or spaces,
    each line is an order, as in PyContinual's `asc_random`; a leading index is removed. A file has an index if every
    line starts with a number and not all ids are numbers.

    Raises:
        ConfigError: If the file cannot be read as UTF-8, or has no task.
    """
    try:
        text = resolve(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; expected one task id or one order per line") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    lines = [line.partition("#")[0].split() for line in text.splitlines()]
    lines = [line for line in lines if line]
    if not lines:
        raise ConfigError(f"{path}: has no task; expected one task id or one order per line")
    if all(len(line) == 1 for line in lines):
        return [[task for line in lines for task in line]]
    if all(line[0].isdigit() for line in lines) and not all(task.isdigit() for line in lines for task in line):
        if bare := next((line for line in lines if len(line) == 1), None):
            raise ConfigError(f"{path}: no task after index {bare[0]}")
        return [line[1:] for line in lines]
    return lines


def check_order(order: Sequence[str], ids: Sequence[str], where: str = "order") -> None:
    """Check that an order is not empty and has only known tasks, each at most once; it may omit tasks.

    Raises:
        ConfigError: With one line per fault.
    """
    if not order:
        raise ConfigError(f"{where}: has no task; known: {', '.join(ids)}")
    first: dict[str, int] = {}
    lines = []
    for position, task in enumerate(order):
        if task not in ids:
            lines.append(f"{where}[{position}]={task!r}: no such task{did_you_mean(task, ids)}")
        elif task in first:
            lines.append(f"{where}[{position}]={task!r}: already at position {first[task]}; a task is learned once")
        first.setdefault(task, position)
    if lines:
        raise ConfigError("\n".join(lines))
