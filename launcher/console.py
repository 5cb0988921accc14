"""Output for people: the two streams, the log, the table of results, and errors."""

import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any, TextIO

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_dist.errors import ClDistError, ConfigError, StorageError, printable
from cl_dist.logs import LINE, PrintableFormatter
from cl_dist.metrics import DEFINITIONS
from cl_dist.storage import refused
from launcher.scores import WIDE, score_text

INTERRUPTED = 130


class Screen(Console):
    """A console that prints users' texts without markup, emoji codes or control characters.

    Writing to a closed stream has no effect: a run continues after its terminal closes. A full disk under stdout is an
    error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        stream = sys.stderr if stderr else sys.stdout
        is_terminal = stream is not None and stream.isatty()
        super().__init__(
            stderr=stderr, markup=False, emoji=False, highlight=False, width=None if stderr or is_terminal else 140
        )

    def render_str(self, text: str, **options: Any) -> Text:
        """Return a text for printing, with control characters escaped."""
        return super().render_str(printable(text), **options)

    def _check_buffer(self) -> None:
        try:
            self._write_buffer()
        except OSError as error:
            del self._buffer[:]
            lost(self.file, error)


out = Screen()
"""Results go to stdout."""
err = Screen(stderr=True)
"""Everything else goes to stderr."""


def prepare_streams() -> None:
    """Escape characters that the locale's encoding lacks, and ignore errors of a closed stderr.

    Libraries write progress to stderr and fail if it is closed, which must not end a long run.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stderr, io.TextIOWrapper) and sys.stderr is sys.__stderr__:
        raw = io.BufferedWriter(_Lossy(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, "backslashreplace", line_buffering=True)


class _Lossy(io.FileIO):
    """A file that discards all output after the first failed write."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            _send_nowhere(self.fileno())
            return len(data)


def _send_nowhere(number: int) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, number)
    os.close(devnull)


def lost(stream: Any, error: OSError) -> None:
    """Discard the rest of the output of a stream that cannot be written.

    Raises:
        StorageError: If it is stdout, unless its reader has closed it.
    """
    with suppress(OSError, AttributeError):  # flush the buffer too, or Python fails at exit
        _send_nowhere(stream.fileno())
        stream.flush()
    if stream is not sys.stderr and not isinstance(error, BrokenPipeError):
        raise StorageError(f"stdout cannot be written: {error}; free space, or redirect it elsewhere") from error


def write(text: str, stream: TextIO | None = None, *, utf8: bool = False) -> bool:
    """Write a text to stdout without changes, for programs; return False if the reader has closed stdout.

    With utf8, encode it as UTF-8 in every locale.
    """
    stream = stream or sys.stdout
    if stream is None:  # closed before the process started
        return False
    try:
        if utf8 and hasattr(stream, "buffer"):
            stream.flush()
            stream.buffer.write(text.encode())
        else:
            stream.write(text)
        stream.flush()
    except OSError as error:
        lost(stream, error)
        return False
    return True


def document(data: Any) -> None:
    """Write one JSON document to stdout, in ASCII, which is the same in every locale."""
    write(json.dumps(data, indent=2, allow_nan=False) + "\n")


class _ToScreen(logging.Handler):
    """Prints log records above the live part of a terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            err.print(self.format(record), soft_wrap=True)
        except Exception:
            self.handleError(record)


def quiet_libraries() -> None:
    """Silence progress bars and notices of libraries that are about to be imported; their errors stay visible.

    Environment variables that the user has set win.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it too
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)


def start_logging(verbose: bool) -> None:
    """Print cl-dist's warnings to stderr, or its whole log and the notices of libraries with -v."""
    if not verbose:
        quiet_libraries()
    handler = _ToScreen()
    handler.setFormatter(PrintableFormatter(LINE, "%H:%M:%S"))
    handler.setLevel(logging.DEBUG if verbose else logging.WARNING)
    root = logging.getLogger("cl_dist")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False


@contextmanager
def results_only() -> Iterator[TextIO]:
    """Yield stdout, and keep the output and progress bars of libraries away from it."""
    from transformers.utils import logging as untyped

    noise: Any = untyped
    stdout, bars = sys.stdout, noise.is_progress_bar_enabled()
    noise.disable_progress_bar()
    try:
        with redirect_stdout(sys.stderr):  # DeepSpeed, which transformers may import, logs to stdout
            yield stdout
    finally:
        if bars:
            noise.enable_progress_bar()


COLUMNS = {
    "cl/avg_acc": "acc",
    "cl/f1_macro": "F1",
    "cl/learning_acc": "",
    "cl/forgetting_max": "forget",
    "cl/bwt": "BWT",
    "cl/fwt_one": "vs own",
}
"""Metrics of the table of results with their headings on a narrow terminal; "" leaves one out."""


def comparison(summaries: list[dict[str, Any]], width: int | None = None) -> Table:
    """Return the table of runs: the main one first, then its baselines; it fits a terminal of 80 columns."""
    width = out.width if width is None else width
    is_wide = width >= WIDE
    columns = {
        name: DEFINITIONS[name].word if is_wide else short for name, short in COLUMNS.items() if is_wide or short
    }
    title = "Average over tasks, after the last one"
    table = Table(title=title if not is_wide else f"{title} (± half of the 95 % interval over test rows)")
    names = [each["run"] + (f" ({each['method']})" if each["run"] != each["method"] else "") for each in summaries]
    label = "always the commonest label" if is_wide else "majority"
    longest = max(cell_len(printable(name)) for name in (*names, label))
    table.add_column("run", overflow="fold", min_width=min(longest, 40 if is_wide else 30))
    for heading in columns.values():
        table.add_column(heading, justify="right", min_width=7 if is_wide else 6)
    for name, summary in zip(names, summaries, strict=True):
        found = [summary["metrics"].get(metric, {}) for metric in columns]
        cells = (score_text(metric.get("value"), metric.get("interval"), width) for metric in found)
        table.add_row(name, *cells)
    majority = [task["majority"] for task in summaries[0]["tasks"]]
    table.add_row(label, f"{sum(majority) / len(majority):.4f}", *[""] * (len(columns) - 1))
    return table


def show_error(error: BaseException, verbose: bool, as_json: bool) -> int:
    """Print an error for a person or, as JSON, for a program; return the exit code."""
    error = refused(error) or error
    code, kind, message = 1, type(error).__name__, str(error)
    if isinstance(error, ClDistError):
        code = error.exit_code
    elif isinstance(error, KeyboardInterrupt | typer.Abort):
        code, message = INTERRUPTED, "interrupted"
    elif hasattr(error, "format_message"):  # a usage error; typer brings its own copy of click's classes
        if kind == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]  # the help
            return ConfigError.exit_code
        code, message, context = ConfigError.exit_code, error.format_message(), getattr(error, "ctx", None)
        if context is not None and not as_json:
            err.print(f"{context.get_usage()}\nTry '{context.command_path} --help'.", soft_wrap=True)
    if code == 1 or (verbose and code != INTERRUPTED):
        err.print("".join(traceback.format_exception(error)), soft_wrap=True)
    if as_json:
        document({"code": code, "kind": kind, "message": message})
    elif code == 1:
        err.print("This is a bug in cl-dist; please report it with the lines above and the output of `cl-dist env`.")
    elif code == INTERRUPTED:
        err.print(message, style="bold red")
    else:
        err.print(kind, style="bold red", end=": ")
        err.print(message, soft_wrap=True)
    return code
