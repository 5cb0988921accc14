"""The loop: every stage of every task, in order, each once."""

import logging
from typing import Protocol

from cl_dist.run import Run
from cl_dist.run_events import Tracker
from cl_dist.stage import Stage, ref
from cl_dist.stages.stage_job import Job
from cl_dist.storage import storage_errors

log = logging.getLogger(__name__)


class Dispatcher(Protocol):
    """Runs one stage somewhere and returns when its files lie in a folder."""

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        """Run a stage and write its files to out; progress events go to the tracker.

        Raises:
            ClDistError: If the stage cannot be computed, after retries.
        """


def run_stages(run: Run, dispatcher: Dispatcher, tracker: Tracker) -> None:
    """Compute what is missing of a run.

    A finished stage is skipped when its settings are those asked for now, and refused when they are not, before any
    other stage is begun. Killed anywhere, the same call goes on at the first stage without a result.
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
    """Return the stages that a run has no result of yet."""
    return [stage for stage in run.stages() if not run.ledger.is_done(stage)]
