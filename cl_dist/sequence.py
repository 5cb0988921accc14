"""Main loop: runs every stage of every task once, in order."""

import logging
from typing import Protocol

from cl_dist.run import Run
from cl_dist.run_events import Tracker
from cl_dist.stage import Stage, ref
from cl_dist.stages.stage_job import Job
from cl_dist.storage import storage_errors

log = logging.getLogger(__name__)


class Dispatcher(Protocol):
    """Runs one stage, and returns when its files are in the output folder."""

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        """Run a stage, write its files to `out`, and send progress events to the tracker.

        Raises:
            ClDistError: If the stage cannot be computed, after retries.
        """


def run_stages(run: Run, dispatcher: Dispatcher, tracker: Tracker) -> None:
    """Run the stages of a run that have no result yet.

    Skips stages that are finished with the current settings. If the settings of a finished stage differ, raises before
    any stage starts. After an interruption the same call resumes at the first stage without a result.
    """
    with storage_errors(run.ledger.folder):
        _run(run, dispatcher, tracker)


def _run(run: Run, dispatcher: Dispatcher, tracker: Tracker) -> None:
    done = {ref(stage) for stage in run.stages() if run.ledger.is_done(stage) or run.ledger.rescue(stage)}
    tracker.begin(list(run.stages()), done)
    for stage in run.stages():
        if ref(stage) in done:
            continue
        run.check_inputs(stage)
        with tracker.stage(stage), run.ledger.publish(stage) as out:
            dispatcher.run(run.job(stage), str(out), tracker)
        tracker.stage_done(stage)
    tracker.finish()


def remaining(run: Run) -> list[Stage]:
    """Return the stages of a run that have no result yet."""
    return [stage for stage in run.stages() if not run.ledger.is_done(stage)]
