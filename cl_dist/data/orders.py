"""Orders in which the tasks are learned, read from text files and checked."""

from collections.abc import Sequence

from cl_dist.config import did_you_mean
from cl_dist.errors import ConfigError
from cl_dist.paths import resolve


def read_orders(path: str) -> list[list[str]]:
    """Read the orders in a text file; `#` starts a comment.

    One task id per line is one order. Lines of several ids, separated by tabs or spaces, are one order each, as
    in PyContinual's `asc_random`; an index before them is left out. It is an index where every line starts with
    a number and not all the ids are numbers themselves.

    Raises:
        ConfigError: If the file cannot be read as UTF-8, or names no task.
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
        raise ConfigError(f"{path}: names no task; expected one task id or one order per line")
    if all(len(line) == 1 for line in lines):
        return [[task for line in lines for task in line]]
    if all(line[0].isdigit() for line in lines) and not all(task.isdigit() for line in lines for task in line):
        if bare := next((line for line in lines if len(line) == 1), None):
            raise ConfigError(f"{path}: index {bare[0]} is followed by no task")
        return [line[1:] for line in lines]
    return lines


def check_order(order: Sequence[str], ids: Sequence[str], where: str = "order") -> None:
    """Check that an order is not empty, names only known tasks, and names none twice; it may leave tasks out.

    Raises:
        ConfigError: With one line per fault.
    """
    if not order:
        raise ConfigError(f"{where}: names no task; known: {', '.join(ids)}")
    first: dict[str, int] = {}
    lines = []
    for place, task in enumerate(order):
        if task not in ids:
            lines.append(f"{where}[{place}]={task!r}: no such task{did_you_mean(task, ids)}")
        elif task in first:
            lines.append(f"{where}[{place}]={task!r}: already at place {first[task]}; a task is learned once")
        first.setdefault(task, place)
    if lines:
        raise ConfigError("\n".join(lines))
