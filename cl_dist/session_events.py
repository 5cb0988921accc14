"""Events of a session before its stages: what runs, what goes on, and the stages of all runs with their work."""

from collections.abc import Mapping, Sequence
from typing import Any

from cl_dist.data.sampler import num_steps
from cl_dist.pace import Planned
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_events import matrix, now, stage_metrics
from cl_dist.stage import Train, ref


def opening(configs: Sequence[RunConfig]) -> dict[str, Any]:
    """Return the first event of a session: the run, as far as its run file tells."""
    main, cluster = configs[0], configs[0].cluster
    return {
        "ts": now(),
        "event": "open",
        "run": main.run.name,
        "method": main.science.method.name,
        "model": main.science.model.source,
        "task_ids": [task.id for task in main.science.sequence().tasks],
        "dispatcher": cluster.dispatcher,
        "engine": cluster.engine,
        "workers": 1 if cluster.dispatcher == "local" else cluster.workers,
        "address": cluster.address,
        "folder": str(main.folder),
        "baselines": [config.run.name for config in configs[1:]],
    }


def phase(doing: str) -> dict[str, Any]:
    """Return the event that names what goes on before the first stage."""
    return {"ts": now(), "event": "phase", "doing": doing}


def plan(runs: Sequence[Run], planned: Mapping[str, Sequence[Planned]]) -> dict[str, Any]:
    """Return the event that lists the stages of all runs, and the scores of finished tasks."""
    lines = [
        {
            "run": run.config.run.name,
            "method": run.config.science.method.name,
            "folder": str(run.config.folder),
            "stages": {each.key: each.seconds is not None for each in planned[str(run.config.folder)]},
            "accuracy": matrix(run, "score"),
        }
        for run in runs
    ]
    return {"ts": now(), "event": "plan", "runs": lines}


def planned(run: Run) -> list[Planned]:
    """Return the stages of a run with their work, and the seconds of finished ones."""
    found = []
    for stage in run.stages():
        work = run.num_rows(stage)
        if isinstance(stage, Train):
            train = stage.settings or run.science.train_of(run.tasks.tasks[stage.task])
            work = train.epochs * num_steps(work, train.global_batch)
        manifest = run.ledger.manifest(ref(stage))
        seconds = None
        if manifest is not None:
            seconds = stage_metrics(run, stage).get("perf/stage_s", manifest["seconds"])
        found.append(Planned(run.ledger.key(ref(stage)), stage.kind, max(1, work), seconds))
    return found
