"""Time estimates of a run in progress, from its own events.

The time left is the sum over the unfinished stages of all runs. A stage that has not begun takes its work times the
seconds per unit of work of its kind: measured on the finished stages of its run, else on those of all runs, else at the
speed of the stage in progress. The stage in progress takes its remaining steps at the speed of the last minute. There
is no estimate before every kind that is left has been measured. Work is the number of optimizer steps of a Train stage,
and the number of rows of the other kinds. Time for starting workers and loading models counts where it was measured.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WINDOW_S = 60.0
"""Span of the recent past over which speed is measured."""
EVIDENCE_S, EVIDENCE_STEPS = 3.0, 3
"""The shortest span, in seconds and steps, that gives a speed."""
EVERY_S = 30.0
"""Time between two progress events."""


@dataclass(frozen=True, slots=True)
class Planned:
    """A stage of a run, and how long it took if it is finished."""

    key: str
    kind: str
    work: int
    seconds: float | None = None


class Pace:
    """Measures speed from events, and estimates the time that is left."""

    def __init__(self, runs: Mapping[str, Sequence[Planned]], clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with the stages of every run, by a name of the run."""
        self._clock = clock
        self._stages = {(run, each.key): each for run, stages in runs.items() for each in stages}
        self._seconds = {name: each.seconds for name, each in self._stages.items() if each.seconds is not None}
        self._current: tuple[str, str] | None = None
        self._points: deque[tuple[float, int]] = deque()
        self._step = self._total = 0
        self._began = self._last_report = 0.0
        self._loss: float | None = None

    def take(self, run: str, event: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take an event of a run into account; return a progress event where one is due."""
        kind, now = event["event"], self._clock()
        if kind == "stage_start":
            self._current, self._loss = (run, event["stage"]), None
            self._points.clear()
            self._step = self._total = 0
            self._began = now
        elif kind in ("step", "telemetry", "round", "continued") and "total_steps" in event:
            self._loss = event.get("train/loss", self._loss)
            if event["step"] < self._step:  # a restarted gang repeats steps
                self._points.clear()
            self._step, self._total = event["step"], event["total_steps"]
            if kind == "step":
                if not self._points:
                    self._last_report = now  # the workers may have taken long to start
                self._points.append((now, self._step))
                while len(self._points) > 2 and now - self._points[1][0] >= WINDOW_S:
                    self._points.popleft()
                if now - self._last_report >= EVERY_S:
                    self._last_report = now
                    return self._progress()
        elif kind == "stage_end":
            self._finish((run, event["stage"]), event["seconds"])
        elif kind == "stage_done" and "perf/stage_s" in event.get("metrics", {}):
            self._finish((run, event["stage"]), event["metrics"]["perf/stage_s"])  # without the start of the workers
        return None

    def _finish(self, name: tuple[str, str], seconds: float) -> None:
        self._seconds[name] = seconds
        self._current = None

    def _progress(self) -> dict[str, Any]:
        found: dict[str, Any] = {"event": "progress", "step": self._step, "total_steps": self._total}
        if self._loss is not None:
            found["loss"] = self._loss
        return found | self.estimates()

    def estimates(self) -> dict[str, float]:
        """Return what is known: steps_per_s, stage_left_s (of the stage in progress) and left_s (of all runs)."""
        found: dict[str, float] = {}
        if (speed := self._speed()) is not None:
            found["steps_per_s"] = round(speed, 3)
        if (stage := self._stage_left()) is not None:
            found["stage_left_s"] = round(stage)
        if (left := self._left()) is not None:
            found["left_s"] = round(left)
        return found

    def _speed(self) -> float | None:
        """Return steps per second over the window; None without evidence."""
        if len(self._points) < 2:
            return None
        (first_s, first), (last_s, last) = self._points[0], self._points[-1]
        if last_s - first_s < EVIDENCE_S or last - first < EVIDENCE_STEPS:
            return None
        return (last - first) / (last_s - first_s)

    def _stage_left(self) -> float | None:
        if self._current is None:
            return None
        if (speed := self._speed()) is not None:
            return (self._total - self._step) / speed
        stage = self._stages.get(self._current)
        if stage is None or (seconds := self._measured(self._current[0], stage)) is None:
            return None
        done = self._step / self._total if self._total else 0.0
        return max(0.0, (1.0 - done) * seconds - (0.0 if done else self._clock() - self._began))

    def _measured(self, run: str, stage: Planned) -> float | None:
        """Return the expected seconds of a stage by finished ones of its kind."""
        done = [
            (name[0], self._stages[name].work, seconds)
            for name, seconds in self._seconds.items()
            if name in self._stages and self._stages[name].kind == stage.kind
        ]
        for found in ([each for each in done if each[0] == run], done):
            if found:
                return stage.work * math.fsum(each[2] for each in found) / sum(each[1] for each in found)
        return None

    def _left(self) -> float | None:
        left = 0.0
        if self._current is not None:
            if (stage_left := self._stage_left()) is None:
                return None
            left = stage_left
        for name, stage in self._stages.items():
            if name not in self._seconds and name != self._current:
                if (seconds := self._measured(name[0], stage) or self._at_current_speed(stage)) is None:
                    return None
                left += seconds
        return left

    def _at_current_speed(self, stage: Planned) -> float | None:
        """Return the expected seconds of a stage by the speed of the one in progress, if that has the same kind."""
        current, speed = self._stages.get(self._current) if self._current else None, self._speed()
        if current is None or speed is None or current.kind != stage.kind:
            return None
        return stage.work / current.work * self._total / speed


def duration(seconds: float) -> str:
    """Return an estimated time as text, as coarse as an estimate is: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 55:
        return f"{max(5, 5 * math.ceil(seconds / 5))} s"
    minutes = math.ceil(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(10 * round(minutes / 10), 60)
    return f"{hours} h {minutes:02d} min"
