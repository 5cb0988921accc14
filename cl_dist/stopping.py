"""The signals that stop a run early but resumable, and what becomes of them while a stage is saved.

A signal that is ignored when the process starts stays ignored: SIGINT in the background jobs of a script, SIGHUP under
nohup. SIGQUIT and SIGKILL end a run at once, and leave its last checkpoint. SIGTSTP and SIGCONT pause it.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from cl_dist.errors import StoppedError

STOPS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
"""What schedulers, a closed terminal and a limit of CPU time send before they kill."""


def stop_on_signals() -> None:
    """Have each of STOPS that is not ignored raise StoppedError in the main thread."""
    for number in _heard(STOPS):
        signal.signal(number, _stop)


def _stop(signum: int, frame: object) -> NoReturn:
    ignore_stops()  # schedulers send them again, and the end of a run is not to be cut in two
    raise StoppedError(f"stopped by {signal.Signals(signum).name}; `cl-dist resume` goes on from here")


def ignore_stops() -> None:
    """Ignore STOPS from now on; Ctrl-C still interrupts."""
    if threading.current_thread() is threading.main_thread():
        for number in _heard(STOPS):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def signals_noted() -> Iterator[list[signal.Signals]]:
    """Note Ctrl-C and STOPS instead of acting on them, so that a step is not cut in two."""
    noted: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return
    before = {number: signal.getsignal(number) for number in _heard((signal.SIGINT, *STOPS))}
    for number in before:
        signal.signal(number, lambda received, _: noted.append(signal.Signals(received)))
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def kept_from_children() -> Iterator[None]:
    """Block STOPS but SIGTERM, which processes that are started in the meantime inherit; they arrive here afterwards.

    Terminals and schedulers send signals to all processes of a group: those of a run's own Ray have to live on until
    the stage is saved. Ray ends its processes by SIGTERM.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set(STOPS) - {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _heard(numbers: tuple[signal.Signals, ...]) -> list[signal.Signals]:
    """Return the signals that are not ignored."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
