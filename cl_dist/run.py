"""Run: tasks, plan, rows and ledger, and the fingerprint inputs and job of each stage."""

import logging
from collections.abc import Iterator
from errno import EACCES, EPERM, EROFS
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cl_dist.data.load import load_task
from cl_dist.data.published import HEADER, publish, published, source_key
from cl_dist.data.rows import TaskData
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import StageConflictError
from cl_dist.kinds import kind_of
from cl_dist.ledger import Ledger
from cl_dist.methods import get_method
from cl_dist.models.config import absent
from cl_dist.models.digest import ON_HUB, model_facts
from cl_dist.run_config import RunConfig, Science
from cl_dist.stage import SCHEMA_VERSION, Stage, StageRef, Train, digest_of, flat, ref
from cl_dist.stages.stage_job import Job

log = logging.getLogger(__name__)


class Run:
    """One sequence of tasks, learned with one method, in one run folder."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.tasks = config.science.sequence()
        self.ledger = Ledger(config.folder, [task.id for task in self.tasks.tasks], self.facts)
        self._plans: dict[int, list[Stage]] = {}
        self._facts: dict[StageRef, dict[str, Any]] = {}
        self._data: dict[int, TaskData] = {}
        self._scratch: TemporaryDirectory[str] | None = None

    @property
    def science(self) -> Science:
        """The settings that decide results."""
        return self.config.science

    @property
    def output(self) -> str:
        """Output layer that the method puts on the backbone: "classifier" or "lm"."""
        return get_method(self.science.method.name).output(self.science.model.output)

    def plan(self, task: int) -> list[Stage]:
        """Return the stages of a task, in order."""
        if task not in self._plans:
            method = self.science.method
            self._plans[task] = get_method(method.name).plan(method, self.tasks, task)
        return self._plans[task]

    def stages(self) -> Iterator[Stage]:
        """Yield the stages of all tasks, in order."""
        for task in range(len(self.tasks)):
            yield from self.plan(task)

    def stage(self, ref: StageRef) -> Stage:
        """Return a planned stage."""
        return next(stage for stage in self.plan(ref.task) if stage.name == ref.stage)

    def max_length(self, task: int) -> int:
        """Return the longest input of a task in tokens."""
        return self.science.train_of(self.tasks.tasks[task]).max_length

    def data(self, task: int) -> TaskData:
        """Return the checked rows of a task, memory-mapped from the run folder if its source has not changed.

        Raises:
            DataError: With every fault, by file, line and field.
            CheckpointError: If the published rows are damaged.
        """
        if task not in self._data:
            self._data[task] = _load(self.tasks.tasks[task], self.science.data, self._rows)
        return self._data[task]

    def publish(self, task: int) -> Path:
        """Write the checked rows of a task to the run folder for workers to map, and return their folder.

        If this user may not write there, as when a finished run of another user is scored, the folder is a temporary
        one that lives as long as this object.

        Raises:
            DataError: With every fault, by file, line and field.
            OSError: If the disk is full.
        """
        loaded, config = self.data(task), self.tasks.tasks[task]
        key = source_key(config, self.science.data) or digest_of([config.model_dump(mode="json"), loaded.digests])
        folder = self._rows / f"{config.id}-{key[:16]}"
        try:
            publish(loaded, folder)
        except OSError as error:
            if error.errno not in (EACCES, EPERM, EROFS):
                raise
            if self._scratch is None:
                self._scratch = TemporaryDirectory(prefix="cl-dist-rows-")
            folder = Path(self._scratch.name) / folder.name
            publish(loaded, folder)
        return folder

    @property
    def _rows(self) -> Path:
        """Folder of published rows; baselines share that of their run."""
        folder = self.config.folder
        return (folder.parent.parent if folder.parent.name == "baselines" else folder) / "rows"

    def num_rows(self, stage: Stage) -> int:
        """Return the number of rows that a stage trains on, generates or scores."""
        return kind_of(stage).num_rows(self, stage)

    def facts(self, stage: Stage) -> dict[str, Any]:
        """Return the fingerprint inputs of a stage, everything that decides its result, as a flat mapping.

        Omits defaults and tasks that the stage does not read; stages it reads enter as fingerprints. Contains nothing
        from `run` or `cluster`.
        """
        key = ref(stage)
        if key not in self._facts:
            kind = kind_of(stage)
            inputs = {self.ledger.key(each): digest_of(self.facts(self.stage(each))) for each in stage.inputs}
            facts = {"schema_version": SCHEMA_VERSION, "stage": stage.changed(), "inputs": inputs}
            self._facts[key] = flat(facts | kind.facts(self, stage) | kind.row_facts(self, stage))
        return self._facts[key]

    def backbone_facts(self, stage: Stage) -> dict[str, Any]:
        """Return the fingerprint inputs of the backbone of a stage.

        Raises:
            DataError: If the stage was computed with a local folder that does not exist here.
        """
        model = self.science.model
        facts = model_facts(model)
        manifest = self.ledger.manifest(ref(stage)) if ON_HUB in facts["digest"] else None
        if manifest is not None and ON_HUB not in str(manifest["facts"].get("model.digest", ON_HUB)):
            raise absent(model.source)
        return facts

    def check_rows(self, *stages: Stage) -> None:
        """Check that the rows used by finished stages have not changed.

        Args:
            stages: Stages to check; by default all of the run.

        Raises:
            StageConflictError: If they have.
        """
        for stage in stages or self.stages():
            manifest = self.ledger.manifest(ref(stage))
            if manifest is None:
                continue
            old, now = manifest["facts"], flat(kind_of(stage).row_facts(self, stage))
            if changed := {key: (old.get(key), now[key]) for key in now if old.get(key) != now[key]}:
                raise StageConflictError(self.ledger.key(ref(stage)), changed)

    def job(self, stage: Stage) -> Job:
        """Return the job of a stage for workers; publishes the rows of the tasks so far.

        Raises:
            DataError: If rows are invalid.
            OSError: If the run folder cannot be written.
        """
        science, seen = self.science, range(stage.task + 1)
        return Job(
            stage=stage,
            method=science.method,
            model=science.model,
            tasks=self.tasks.tasks[: stage.task + 1],
            rows=tuple(str(self.publish(task).absolute()) for task in seen),
            digests=tuple(self.data(task).digests for task in seen),
            train=(isinstance(stage, Train) and stage.settings) or science.train_of(self.tasks.tasks[stage.task]),
            max_length=tuple(self.max_length(task) for task in seen),
            evaluate=science.evaluate,
            generate=science.generate,
            folders={ref: str(self.ledger.path(ref).absolute()) for ref in stage.inputs},
            engine=self.config.cluster,
            seed=science.seed,
            chain=tuple(str(self.ledger.path(ref).absolute()) for ref in self._chain(stage)),
            log_every=self.config.run.log_every,
            profiles=str((self.config.folder / "profile").absolute()),
        )

    def check_inputs(self, stage: Stage) -> None:
        """Verify the files of all stages that a stage reads.

        Raises:
            CheckpointError: If one is missing or damaged.
        """
        for read in {*stage.inputs, *self._chain(stage)}:
            self.ledger.verify(read)

    def _chain(self, stage: Stage) -> list[StageRef]:
        """Return the Train stages whose weights compose the model that a stage starts from, oldest first."""
        chain: list[StageRef] = []
        while (before := kind_of(stage).starts_from(stage)) is not None:
            chain.insert(0, before)
            stage = self.stage(before)
        return chain


def _load(task: TaskConfig, data: DataConfig, folder: Path) -> TaskData:
    key = source_key(task, data)
    if key is not None and (mapped := folder / f"{task.id}-{key[:16]}" / HEADER).exists():
        loaded = published(mapped.parent, verify=True)
        _warn(mapped, task.id, loaded.warnings)
        return loaded
    return _checked(task.model_dump_json(), data.model_dump_json(), key)


@lru_cache(maxsize=256)
def _warn(rows: Path, task: str, warnings: tuple[str, ...]) -> None:
    """Log the warnings of a task; cached, since a run and its baselines read the same rows."""
    for warning in warnings:
        log.warning("data task=%s %s", task, warning)


@lru_cache(maxsize=256)
def _checked(task: str, data: str, key: str | None) -> TaskData:
    """Load and check the rows of a task; cached, since a run and its baselines read the same ones."""
    return load_task(TaskConfig.model_validate_json(task), DataConfig.model_validate_json(data))
