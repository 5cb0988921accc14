"""A torch.profiler trace of some optimizer steps of a Train stage."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from cl_dist.parallel.config import ProfileConfig

log = logging.getLogger(__name__)


class StepProfiler:
    """Records a window of optimizer steps of this rank and writes it as a Chrome trace; to be closed after the last."""

    def __init__(
        self,
        config: ProfileConfig | None,
        path: Path,
        steps: range,
        report: Callable[[dict[str, Any]], None],
    ) -> None:
        """Prepare for the steps of this attempt at a stage; without settings nothing is recorded.

        Reports a warning if the stage has no such steps, or not all of them.
        """
        self._path, self._report = path, report
        self._profile: profile | None = None
        self._steps = range(0)
        if config is not None:
            first, last = config.steps
            self._steps = range(max(first, steps.start), min(last, steps.stop))
            if len(self._steps) < last - first:
                found = f"only {self._steps.start} to {self._steps.stop}" if self._steps else "none of them"
                text = (
                    f"cluster.profile.steps=[{first}, {last}]: this attempt runs steps {steps.start} to {steps.stop} "
                    f"of the stage; {found} profiled"
                )
                report({"event": "profile", "warning": text})

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Run an optimizer step, counted from 0, and record it if it is in the window."""
        if step not in self._steps:
            yield
            return
        if self._profile is None:
            has_cuda = torch.cuda.is_available()
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if has_cuda else [])],
            )
            self._profile.start()
        with record_function(f"optimizer step {step + 1}"):
            yield
        if step + 1 == self._steps.stop:
            self.close()

    def close(self) -> None:
        """Write what has been recorded. A disk that cannot take it is a warning: training goes on."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(self._path))
        except OSError as error:
            log.warning("profile not written path=%s: %s", self._path, error)
            return
        log.info("profile written path=%s", self._path)
        self._report({"event": "profile", "trace": str(self._path)})
