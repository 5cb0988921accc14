"""Signals that stop a run so that it can be resumed, and their handling while a stage is saved.

A signal that is ignored when the process starts stays ignored: SIGINT in background jobs of a script, SIGHUP under
nohup. SIGQUIT and SIGKILL end a run at once; it resumes from its last checkpoint. SIGTSTP and SIGCONT pause it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from cl_dist.errors import StoppedError

STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""Signals that schedulers, a closed terminal and a CPU time limit send before SIGKILL."""


def stop_on_signals() -> None:
    """Install a handler that raises StoppedError in the main thread for each of STOPS that is not ignored."""
    for number in _not_ignored(STOPS):
        signal.signal(number, _stop)


def _stop(signum: int, frame: object) -> NoReturn:
    ignore_stops()  # schedulers repeat them; shutdown must not be interrupted
    raise StoppedError(f"stopped by {signal.Signals(signum).name}; `cl-dist resume` continues from here")


def ignore_stops() -> None:
    """Ignore STOPS from now on; SIGINT still interrupts."""
    if threading.current_thread() is threading.main_thread():
        for number in _not_ignored(STOPS):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_noted() -> Iterator[list[signal.Signals]]:
    """Yield a list that collects SIGINT and STOPS, so that they do not interrupt a step."""
    noted: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in _not_ignored((signal.SIGINT, *STOPS))}
    for number in before:
        signal.signal(number, lambda received, _: noted.append(signal.Signals(received)))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Block STOPS except SIGTERM; child processes started in the context inherit this, and signals arrive here later.

    Terminals and schedulers signal all processes of a group, but the processes of a run's own Ray have to live until
    the stage is saved. Ray ends its processes with SIGTERM.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPS) - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _not_ignored(numbers: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """Return the signals that are not ignored."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
