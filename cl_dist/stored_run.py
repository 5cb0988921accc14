"""Stored runs: the settings, scores and models of a run folder and of its baselines."""

import os
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cl_dist.data.rows import Row
from cl_dist.data.unlabelled import rows_of_texts
from cl_dist.errors import ConfigError, DataError
from cl_dist.html_table import results_html
from cl_dist.ledger import write_json
from cl_dist.metrics import majority_accuracy
from cl_dist.model_lookup import answering, last_learned, number_of
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_events import last_progress, read_state, summary, with_references
from cl_dist.run_folder import reopen
from cl_dist.run_intervals import score_interval
from cl_dist.stage import StageRef, ref
from cl_dist.storage import written

if TYPE_CHECKING:
    from cl_dist.stages.predict import Predictor

REFERENCES = ("individual", "joint")
"""Methods whose runs serve as reference for others: one model per task, and one model for all tasks at once."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """The model's answer to one row."""

    answer: str
    """The likeliest label, or the text that a language model generates."""
    scores: Mapping[str, float] | None
    """Probability of each label; None where a language model generates the answer."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The state of a run or baseline."""

    run: str
    status: str
    """"not begun", "running", "running on HOST", "killed", "stopped", "interrupted", "failed" or "finished"."""
    done: int
    """Finished stages."""
    stages: int
    next: str | None
    """The first unfinished stage."""
    attempts: int
    seconds: float
    """Time spent in finished stages."""
    step: int | None = None
    """The last known step of the next stage if it is in progress, else the step that it resumes from; shards, where the
    stage does not train."""
    total_steps: int | None = None
    loss: float | None = None
    """The last reported training loss of that stage."""
    left_s: int | None = None
    """Estimated seconds until the run and its baselines are finished; see `cl_dist.pace`."""


class StoredRun:
    """A run folder: its settings, scores and models, and those of its baselines."""

    def __init__(
        self,
        run: Run,
        others: Iterable[Run] = (),
        summaries: Mapping[Path, Mapping[str, Any]] | None = None,
        references: Mapping[str, Path | str] | None = None,
    ) -> None:
        """Wrap a run. `load_run` is the usual way to get one.

        Args:
            run: The main run.
            others: Baselines that are already open.
            summaries: Summaries that are already computed, by run folder; without references.
            references: Runs of the methods "individual" and "joint" to compare with, by method.
        """
        self.run = run
        self._others = {other.config.folder: other for other in others}
        self._plain = dict(summaries or {})
        self._references = {kind: Path(folder) for kind, folder in (references or {}).items()}
        self._summaries: dict[Path, dict[str, Any]] | None = None
        self._loaded: tuple[StageRef | None, Predictor] | None = None

    def __repr__(self) -> str:
        return f"StoredRun({str(self.folder)!r})"

    def _repr_html_(self) -> str:
        """Return the accuracy matrix and the metrics, which a notebook shows for the run."""
        return results_html(self.summary())

    @property
    def config(self) -> RunConfig:
        """The resolved run file."""
        return self.run.config

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.config.folder

    @property
    def tasks(self) -> list[str]:
        """Task ids in the order of training."""
        return [task.id for task in self.run.tasks.tasks]

    @property
    def baselines(self) -> list[Run]:
        """The baselines that have begun."""
        configs = [self.config.baseline(name) for name in self.config.baselines]
        begun = [config for config in configs if (config.folder / "run.json").exists()]
        for config in begun:
            if config.folder not in self._others:
                self._others[config.folder] = Run(config)
        return [self._others[config.folder] for config in begun]

    @property
    def matrix(self) -> list[list[float | None]]:
        """The accuracy matrix R: R[t][u] is the score on task u after training on task t; None if not measured."""
        cells: list[list[float | None]] = self.summary()["matrix"]["accuracy"]
        return cells

    def summary(self) -> dict[str, Any]:
        """Return the run's results as plain data: tasks, matrix, metrics, stages. See `summaries` for its errors."""
        return self.summaries()[self.folder]

    def summaries(self) -> dict[Path, dict[str, Any]]:
        """Return the summaries of the run and of its baselines by run folder, the run's own first.

        A baseline of the method "individual" or "joint" is a reference for the other runs.

        Raises:
            ConfigError: If a reference is a run of another method.
            DataError: If a reference was computed on other rows.
            StageConflictError: If rows have changed since a stage was trained or scored on them.
        """
        if self._summaries is None:
            self._summaries = self._compute_summaries()
        return self._summaries

    def _compute_summaries(self) -> dict[Path, dict[str, Any]]:
        baselines = self.baselines
        sources = {each.config.science.method.name: each for each in baselines}
        sources |= {kind: Run(reopen(folder)) for kind, folder in self._references.items()}
        for kind, folder in self._references.items():
            if (method := sources[kind].config.science.method.name) != kind:
                raise ConfigError(f"{kind}={folder}: its method is {method!r}; expected a run of the method {kind!r}")
        sources = {kind: source for kind, source in sources.items() if kind in REFERENCES}
        for each in dict.fromkeys((self.run, *baselines, *sources.values())):
            each.check_rows()
        return {each.config.folder: self._referred(each, sources) for each in (self.run, *baselines)}

    def _summary(self, run: Run) -> Mapping[str, Any]:
        """Return a run's summary without references, computed once."""
        if run.config.folder not in self._plain:
            self._plain[run.config.folder] = summary(run)
        return self._plain[run.config.folder]

    def _referred(self, run: Run, sources: Mapping[str, Run]) -> dict[str, Any]:
        """Return a run's summary with its references filled in; a run is not its own reference."""
        used = {kind: other for kind, other in sources.items() if run.config.science.method.name != kind}
        scores = {kind: self._reference(run, other, kind) for kind, other in used.items()}
        names = {kind: used[kind].config.run.name if kind in used else None for kind in REFERENCES}
        return with_references(self._summary(run), **scores) | {"references": names}

    def _reference(self, run: Run, other: Run, kind: str) -> list[float | None]:
        """Return a reference's score of each task of a run; None for tasks that the reference lacks."""
        cells = self._summary(other)["matrix"]["accuracy"]
        numbers = {task.id: number for number, task in enumerate(other.tasks.tasks)}
        scores: list[float | None] = []
        for number, task in enumerate(run.tasks.tasks):
            there = numbers.get(task.id)
            if there is None:
                scores.append(None)
                continue
            if run.data(number).digests != other.data(there).digests:
                raise DataError(
                    f"{kind}={other.config.run.name}: task {task.id} has other rows there; the scores do not compare"
                )
            scores.append(cells[there if kind == "individual" else -1][there])
        return scores

    def write_summaries(self) -> None:
        """Write metrics/summary.json of the run and its baselines, with references.

        Raises:
            StorageError: If they cannot be written.
        """
        for folder, found in self.summaries().items():
            with written(folder):
                if (folder / "metrics").is_dir():
                    write_json(folder / "metrics" / "summary.json", found)

    def progress(self) -> list[Progress]:
        """Return the progress of the run and of each of its baselines."""
        configs = [self.config.baseline(name) for name in self.config.baselines]
        return [_progress(self.run), *(_progress(Run(config)) for config in configs)]

    def evaluate(
        self,
        tasks: Sequence[str] | None = None,
        *,
        after: str | None = None,
        split: Literal["dev", "test"] = "test",
    ) -> list[dict[str, Any]]:
        """Score tasks again in this process, without writing anything.

        Args:
            tasks: Task ids; None takes every trained task.
            after: Use the model after this task; None takes the last trained one.
            split: The rows to score.

        Returns:
            Per task: task, model (a stage), rows, score, interval (95 %, of the score), accuracy, f1_macro, majority;
            text tasks have more metrics.

        Raises:
            ConfigError: If a task or its model does not exist, or the split has no rows.
            CheckpointError: If a model is missing or damaged, or its rows have changed.
        """
        from cl_dist.stages.evaluate import score_answers
        from cl_dist.stages.predict import Predictor

        run = self.run
        last = self.last_task(after)
        numbers = [number_of(run, name) for name in dict.fromkeys(tasks)] if tasks else list(range(last + 1))
        for number in numbers:
            if not run.data(number).rows(split):
                raise ConfigError(f"split {split}: task {run.data(number).id} has no {split} rows")
        models = answering(run, numbers, last)
        if split == "test":
            run.check_rows(*(stage for stage, _ in models))
        lines: dict[int, dict[str, Any]] = {}
        for stage, own in models:
            predictor = Predictor(run.job(stage))
            answers = {number: predictor.answers(number, run.data(number).rows(split)) for number in own}
            for number in own:
                data, rows = run.data(number), run.data(number).rows(split)
                lines[number] = {
                    "task": data.id,
                    "model": run.ledger.key(stage.model),
                    "rows": len(rows),
                    **score_answers(run.tasks.tasks[number], data.labels, rows, answers[number]),
                    "interval": score_interval(
                        run.tasks.tasks[number],
                        [(row.label, answer) for row, answer in zip(rows, answers[number], strict=True)],
                    ),
                    "majority": majority_accuracy([row.label for row in data.train], [row.label for row in rows]),
                }
        return [lines[number] for number in numbers]

    def last_task(self, after: str | None = None) -> int:
        """Return the number of the last trained task, or of the task `after`."""
        return last_learned(self.run) if after is None else number_of(self.run, after, "--after")

    def predict(self, task: str, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[Prediction]:
        """Return the last model's predictions of some texts.

        Args:
            task: Id of the task.
            texts: The texts.
            pairs: The second text of each row, for a task that reads two.

        Raises:
            ConfigError: If the run has no such task, or no model for it.
            DataError: If a text cannot be read.
            CheckpointError: If the model is missing or damaged.
        """
        rows = rows_of_texts(texts, pairs, self.run.tasks.tasks[number_of(self.run, task)])
        return list(self.predict_rows(task, rows))

    def predict_rows(self, task: str, rows: Iterable[Row]) -> Iterator[Prediction]:
        """Yield the last model's predictions of rows, which may be a stream; their labels are not read.

        Rows are taken in groups of the size of an evaluation shard, so a task's own rows get the batches, and bits, of
        its Evaluate stage.
        """
        number = number_of(self.run, task)
        predictor, remaining = self._predictor(number), iter(rows)
        while shard := list(islice(remaining, self.config.science.evaluate.shard_rows)):
            predictor.refuse_unreadable(number, shard)
            if predictor.writes:
                yield from (Prediction(text, None) for text in predictor.answers(number, shard))
            else:
                found = predictor.probabilities(number, shard)
                yield from (Prediction(max(own, key=own.__getitem__), own) for own in found)

    def _predictor(self, number: int) -> "Predictor":
        """Return the model that answers for a task; the last one used stays loaded."""
        from cl_dist.stages.predict import Predictor

        ((stage, _),) = answering(self.run, [number], last_learned(self.run))
        if self._loaded is None or self._loaded[0] != stage.model:
            self._loaded = stage.model, Predictor(self.run.job(stage))
        return self._loaded[1]

    def export(self, task: str, folder: Path | str) -> str:
        """Write the last model that answers for a task to a folder, for `load_exported`; return the stage's key.

        Raises:
            ConfigError: If the run has no such task or no model for it, or if the folder is not empty.
            CheckpointError: If the model is missing or damaged.
        """
        from cl_dist.stages.export import check_free, export

        number = number_of(self.run, task)
        ((stage, _),) = answering(self.run, [number], last_learned(self.run))
        check_free(Path(folder))
        fingerprint = self.run.ledger.fingerprint(self.run.stage(stage.model))
        export(self.run.job(stage), number, Path(folder), fingerprint)
        return self.run.ledger.key(stage.model)


def load_run(folder: Path | str, *, references: Mapping[str, Path | str] | None = None) -> StoredRun:
    """Open a run folder.

    Args:
        folder: The run folder.
        references: Runs of the methods "individual" and "joint" to compare with, by method.

    Raises:
        ConfigError: If the path is not a run folder.
    """
    return StoredRun(Run(reopen(Path(folder))), references=references)


def _progress(run: Run) -> Progress:
    state = read_state(run.config.folder)
    stages = [stage for task in range(len(run.tasks)) for stage in run.plan(task)]
    manifests = [run.ledger.manifest(ref(stage)) for stage in stages]
    finished = [manifest for manifest in manifests if manifest is not None]
    unfinished = (stage for stage, manifest in zip(stages, manifests, strict=True) if manifest is None)
    following, status = next((run.ledger.key(ref(stage)) for stage in unfinished), None), status_of(state)
    return Progress(
        run=run.config.run.name,
        status=status,
        done=len(finished),
        stages=len(stages),
        next=following,
        attempts=len(state.get("attempts", [])),
        seconds=round(sum(manifest["seconds"] for manifest in finished), 1),
        **({} if following is None else last_progress(run.config.folder, following, status.startswith("running"))),
    )


def status_of(state: Mapping[str, Any]) -> str:
    """Return a run's status; "killed" where run.json says "running" and its driver process is gone."""
    if state.get("status") != "running" or not state.get("attempts"):
        return str(state.get("status", "not begun"))
    attempt = state["attempts"][-1]
    if attempt["host"] != platform.node():
        return f"running on {attempt['host']}"
    try:
        os.kill(attempt["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return "killed"
    except PermissionError:
        pass
    return "running"
