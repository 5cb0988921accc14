"""From the run file to what identifies a stage (facts) and what a worker is given (job)."""

import logging
from collections.abc import Iterable
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from cl_dist.data.load import load_task
from cl_dist.data.rows import TaskData
from cl_dist.data.sources import listing
from cl_dist.data.votes import voting_rows
from cl_dist.errors import ConfigError, DataError, StageConflictError
from cl_dist.ledger import Ledger, sha256
from cl_dist.methods import capabilities_of, get_method
from cl_dist.models.config import ModelConfig, absent, is_local
from cl_dist.paths import resolve
from cl_dist.run_config import RunConfig
from cl_dist.stage import (
    SCHEMA_VERSION,
    Choose,
    Evaluate,
    Generate,
    Rationalise,
    Record,
    Stage,
    StageRef,
    Train,
    Vote,
    digest_of,
    flat,
    ref,
)
from cl_dist.stages.stage_job import Job

if TYPE_CHECKING:
    from cl_dist.data.language import TextCodec
    from cl_dist.data.reading import Reading

log = logging.getLogger(__name__)
ON_HUB = "@"
"""Between the name and the commit of a model on the hub, in the place of a digest."""


class Run:
    """A run's tasks with their rows, its plan, its ledger, and the facts and jobs of its stages."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.tasks = config.science.sequence()
        self.ledger = Ledger(config.folder, [task.id for task in self.tasks.tasks], self.facts)
        self._plans: dict[int, list[Stage]] = {}
        self._facts: dict[tuple[int, str], dict[str, Any]] = {}

    @property
    def output(self) -> str:
        """What the method puts on the backbone: "classifier" or "lm"."""
        return get_method(self.config.science.method.name).output(self.config.science.model.output)

    def plan(self, task: int) -> list[Stage]:
        """Return the stages of a task."""
        if task not in self._plans:
            method = self.config.science.method
            self._plans[task] = get_method(method.name).plan(method, self.tasks, task)
        return self._plans[task]

    def stage(self, ref: StageRef) -> Stage:
        """Return the planned stage of a name."""
        return next(stage for stage in self.plan(ref.task) if stage.name == ref.stage)

    def data(self, task: int) -> TaskData:
        """Return the rows of a task, read once.

        Raises:
            DataError: With every fault, by file, line and field.
        """
        return _load(self.tasks.tasks[task].model_dump_json(), self.config.science.data.overlap)

    def num_rows(self, stage: Stage) -> int:
        """Return how many rows a stage trains on, writes or scores."""
        if isinstance(stage, Evaluate):
            return sum(len(self.data(task).test) for task in stage.tasks)
        new = len(self.data(stage.task).train)
        if isinstance(stage, Rationalise | Record | Vote | Choose):
            return sum(len(voting_rows(self.data(u), stage.vote.max_examples)) for u in stage.sources)
        if isinstance(stage, Generate):
            return len(stage.sources) * stage.budget.per_task(new, len(stage.sources))
        kept = stage.replay_rows if stage.budget is None else stage.budget.per_task(new, len(stage.replay))
        written = 0 if stage.samples is None else self.num_rows(self.stage(stage.samples))
        replayed = sum(min(kept, len(self.data(task).train)) for task in stage.replay)
        return sum(len(self.data(task).train) for task in stage.data) + replayed + written

    def check_data(self) -> None:
        """Read the rows of every task.

        Raises:
            DataError: With the faults of all tasks.
        """
        faults = []
        for task in range(len(self.tasks)):
            try:
                self.data(task)
            except DataError as error:
                faults.append(str(error))
        if faults:
            raise DataError("\n".join(faults))

    def check_tokens(self) -> None:
        """Check that the tokenizer reads the rows of every task, and the backbone their tokens; that imports torch.

        Raises:
            ConfigError: If there is no tokenizer, or it has tokens that the backbone does not know.
            DataError: With the rows of all tasks that they cannot read.
        """
        self.check_model()
        faults = []
        for task in range(len(self.tasks)):
            found, name = self.reading(task), self.tasks.tasks[task].id
            if found.faults:
                faults.append(f"task {name}: {len(found.faults)} row(s) cannot be read\n{listing(found.faults)}")
            elif (warning := found.warning(self.config.science.model.source)) is not None:
                log.warning("data task=%s %s", name, warning)
        if faults:
            raise DataError("\n".join(faults))

    def check_model(self) -> None:
        """Check that there is a tokenizer, and that the backbone knows its tokens; that imports torch.

        Raises:
            ConfigError: If not.
        """
        from cl_dist.models.backbone import check_vocabulary, load_tokenizer

        tokenizer = load_tokenizer(self.config.science.model)
        if not self._grows:
            check_vocabulary(self.config.science.model, tokenizer, is_whole=self.output == "lm")

    @property
    def _grows(self) -> bool:
        """Whether the model gets embeddings for tokens that the backbone lacks."""
        science = self.config.science
        return self.output == "lm" and not capabilities_of(science.method, science.model).freezes_backbone

    def reading(self, task: int) -> "Reading":
        """Return what the run's tokenizer makes of the rows of a task, read once.

        Raises:
            ConfigError: If there is no tokenizer.
        """
        science, config = self.config.science, self.tasks.tasks[task]
        length = science.train_of(config).max_length
        parts = (config.model_dump_json(), science.data.overlap, science.model.model_dump_json())
        return _reading(*parts, length, self._grows)

    @cached_property
    def _codec(self) -> "TextCodec":
        from cl_dist.data.language import TextCodec
        from cl_dist.models.backbone import load_tokenizer

        return TextCodec(load_tokenizer(self.config.science.model))

    def check_writing(self) -> None:
        """Check that a model that writes can write the labels of every task and read its rows; that imports torch.

        Raises:
            DataError: With labels that the tokenizer spells alike, and rows whose question and answer are too long.
            ConfigError: If a metric's package is not installed.
        """
        faults = [fault for task in range(len(self.tasks)) if (fault := self.writing_fault(task)) is not None]
        if faults:
            raise DataError("\n".join(faults))

    def writing_fault(self, task: int) -> str | None:
        """Return what keeps the run's model from writing the answers of a task; None where it classifies.

        Raises:
            ConfigError: If the package of the task's metric is not installed.
        """
        if self.output != "lm":
            return None
        from cl_dist.data.spelling import label_faults, length_faults
        from cl_dist.data.text_metrics import check_library

        config, data = self.tasks.tasks[task], self.data(task)
        try:
            check_library(config.metric)
        except ConfigError as error:
            raise ConfigError(f"tasks.{config.id}.{error}") from None
        lines = label_faults(data.labels, self._codec)
        is_tried = any(isinstance(stage, Choose) for t in range(len(self.tasks)) for stage in self.plan(t))
        blind = ("test", "dev" if data.dev else "train") if is_tried else ("test",)  # candidates answer rows that vote
        if too_long := list(length_faults(config, data, self._codec, self._length(task), blind)):
            lines.append(listing(too_long).lstrip())
        return f"task {config.id}: " + "\n  ".join(lines) if lines else None

    def facts(self, stage: Stage) -> dict[str, Any]:
        """Return everything that decides a stage's result, flat, so that a difference can be named.

        Settings at their default and tasks that the stage does not see are left out; inputs enter as fingerprints.
        Nothing of `run` or `cluster` is in it.
        """
        key = (stage.task, stage.name)
        if key not in self._facts:
            match stage:
                case Train():
                    self._facts[key] = self._train_facts(stage)
                case Generate():
                    self._facts[key] = self._generate_facts(stage)
                case Rationalise() | Record() | Vote() | Choose():
                    self._facts[key] = self._vote_facts(stage)
                case Evaluate():
                    self._facts[key] = self._evaluate_facts(stage)
        return self._facts[key]

    def _train_facts(self, stage: Train) -> dict[str, Any]:
        science, task = self.config.science, self.tasks.tasks[stage.task]
        facts = {
            "schema_version": SCHEMA_VERSION,
            "stage": stage.changed(),
            "seed": science.seed,
            "model": self._backbone_facts(stage),
            "method": science.method.changed() | {"name": science.method.name},
            "train": {} if stage.settings is not None else science.train_of(task).changed(),
            "evaluate": {"batch": science.evaluate.batch},  # dev rows are scored in batches of this size
            **self._rows(stage),
            "max_length": {} if stage.settings is not None else self._lengths(stage, (*stage.data, *stage.replay)),
        }
        if version := get_method(science.method.name).version:
            facts["method_version"] = version
        if stage.role == "invrat":
            facts["environments"] = [self.data(u).digests.get("environments") for u in stage.data]
        if self.output == "lm":
            facts["questions"] = {self.tasks.tasks[u].id: self.data(u).question for u in (*stage.data, *stage.replay)}
        if stage.budget is not None:
            facts["new_rows"] = len(self.data(stage.task).train)
        return flat(facts | self._inputs(stage))

    def _backbone_facts(self, stage: Stage) -> dict[str, Any]:
        """Return what decides the backbone of a stage.

        Raises:
            DataError: If the stage was computed with a folder, and there is none of that name here.
        """
        model = self.config.science.model
        facts = _model_facts(model)
        manifest = self.ledger.manifest(ref(stage)) if ON_HUB in facts["digest"] else None
        if manifest is not None and ON_HUB not in str(manifest["facts"].get("model.digest", ON_HUB)):
            raise absent(model.source)
        return facts

    def _generate_facts(self, stage: Generate) -> dict[str, Any]:
        science = self.config.science
        facts = {
            "schema_version": SCHEMA_VERSION,
            "stage": stage.changed(),
            "generate": science.generate.changed(),
            "seed": science.seed,
            "max_length": {self.tasks.tasks[u].id: self._length(u) for u in stage.sources},
            "new_rows": len(self.data(stage.task).train),
            **self._rows(stage),
            "questions": {self.tasks.tasks[u].id: self.data(u).question for u in stage.sources},
        }
        return flat(facts | self._inputs(stage))

    def _vote_facts(self, stage: Rationalise | Record | Vote | Choose) -> dict[str, Any]:
        names = [self.tasks.tasks[u].id for u in stage.sources]
        facts = {
            "schema_version": SCHEMA_VERSION,
            "stage": stage.changed(),
            "max_length": self._length(stage.task),
            "max_lengths": self._lengths(stage, stage.sources),
            **self._rows(stage),
            "questions": {name: self.data(u).question for name, u in zip(names, stage.sources, strict=True)},
        }
        return flat(facts | self._inputs(stage))

    def _evaluate_facts(self, stage: Evaluate) -> dict[str, Any]:
        science = self.config.science
        facts = {
            "schema_version": SCHEMA_VERSION,
            "stage": stage.changed(),
            "evaluate": science.evaluate.changed(),
            "max_length": self._lengths(stage, stage.tasks),
            **self._rows(stage),
        }
        if self.output == "lm":
            facts["questions"] = {self.tasks.tasks[u].id: self.data(u).question for u in stage.tasks}
            facts["metrics"] = {self.tasks.tasks[u].id: self.tasks.tasks[u].metric for u in stage.tasks}
        return flat(facts | self._inputs(stage))

    def _length(self, task: int) -> int:
        return self.config.science.train_of(self.tasks.tasks[task]).max_length

    def _lengths(self, stage: Stage, tasks: Iterable[int]) -> dict[str, int]:
        """Return where rows are cut, by task id; the length of the stage's own task has come in with its settings."""
        own = self._length(stage.task)
        return {self.tasks.tasks[u].id: self._length(u) for u in tasks if self._length(u) != own}

    def _rows(self, stage: Stage) -> dict[str, Any]:
        """Return the facts of a stage that its rows decide."""
        match stage:
            case Train():
                seen = [self.data(u) for u in (*stage.data, *stage.replay)]
                return {
                    "rows": {self._id(u): [self.data(u).digests[s] for s in ("train", "dev")] for u in stage.data},
                    "replay_rows": {self._id(u): self.data(u).digests["train"] for u in stage.replay},
                    "labels": {data.id: list(data.labels) for data in seen},
                }
            case Generate():
                return {"labels": {self._id(u): list(self.data(u).labels) for u in stage.sources}}
            case Evaluate():
                return {"rows": {self._id(u): self.data(u).digests["test"] for u in stage.tasks}}
            case _:
                return {"rows": {self._id(u): self.data(u).digests for u in stage.sources}}

    def _id(self, task: int) -> str:
        return self.tasks.tasks[task].id

    def check_rows(self, *stages: Stage) -> None:
        """Compare the rows that finished stages have learned and scored with those that are there now.

        stages: those to look at; all of the run if there are none.

        Raises:
            StageConflictError: If they are others.
        """
        for stage in stages or [stage for t in range(len(self.tasks)) for stage in self.plan(t)]:
            manifest = self.ledger.manifest(ref(stage))
            if manifest is None:
                continue
            old, now = manifest["facts"], flat(self._rows(stage))
            if changed := {key: (old.get(key), now[key]) for key in now if old.get(key) != now[key]}:
                raise StageConflictError(self.ledger.key(ref(stage)), changed)

    def _inputs(self, stage: Stage) -> dict[str, Any]:
        return {"inputs": {self.ledger.key(ref): digest_of(self.facts(self.stage(ref))) for ref in stage.inputs}}

    def job(self, stage: Stage) -> Job:
        """Return what a worker needs to run a stage."""
        science = self.config.science
        return Job(
            stage=stage,
            method=science.method,
            model=science.model,
            tasks=self.tasks.tasks[: stage.task + 1],
            digests=tuple(self.data(u).digests for u in range(stage.task + 1)),
            data=science.data,
            train=(isinstance(stage, Train) and stage.settings) or science.train_of(self.tasks.tasks[stage.task]),
            max_length=tuple(self._length(task) for task in range(stage.task + 1)),
            evaluate=science.evaluate,
            generate=science.generate,
            folders={ref: str(self.ledger.path(ref).absolute()) for ref in stage.inputs},
            engine=self.config.cluster,
            seed=science.seed,
            chain=tuple(str(self.ledger.path(ref).absolute()) for ref in self._chain(stage)),
        )

    def check_inputs(self, stage: Stage) -> None:
        """Compare the files of all stages that a stage reads with their manifests.

        Raises:
            CheckpointError: If one is missing or damaged.
        """
        for read in {*stage.inputs, *self._chain(stage)}:
            self.ledger.verify(read)

    def _chain(self, stage: Stage) -> list[StageRef]:
        """Return the Train stages whose weights make up the model that a stage starts from, oldest first."""
        chain: list[StageRef] = []
        while (before := _start(stage)) is not None:
            chain.insert(0, before)
            stage = self.stage(before)
        return chain


def _start(stage: Stage) -> StageRef | None:
    """Return the stage whose model another one starts from; None where it is the backbone, or chosen among several."""
    match stage:
        case Train():
            return stage.init
        case Rationalise():
            return None
        case _:
            return stage.model


@lru_cache(maxsize=256)
def _load(task: str, overlap: str) -> TaskData:
    from cl_dist.data.tasks import DataConfig, TaskConfig

    return load_task(TaskConfig.model_validate_json(task), DataConfig.model_validate({"overlap": overlap}))


@lru_cache(maxsize=256)
def _reading(task: str, overlap: str, model: str, max_length: int, grows: bool) -> "Reading":
    from cl_dist.data.reading import reading
    from cl_dist.data.tasks import TaskConfig
    from cl_dist.models.backbone import load_tokenizer, num_embeddings

    config = ModelConfig.model_validate_json(model)
    known = None if grows else num_embeddings(config)
    tokenizer = load_tokenizer(config)
    return reading(TaskConfig.model_validate_json(task), _load(task, overlap), tokenizer, max_length, known)


def _model_facts(model: ModelConfig) -> dict[str, Any]:
    """Return what decides a backbone: its bytes, wherever they lie, and how it is used."""
    used = {name: value for name, value in model.changed().items() if name not in ("source", "revision")}
    return used | {"digest": model_digest(model.source, model.revision, model.config is not None)}


@lru_cache(maxsize=8)
def model_digest(source: str, revision: str | None, drawn: bool = False) -> str:
    """Return what identifies a backbone: the digest of its files, or the commit of a hub name.

    drawn: whether its weights are, so that the files are a tokenizer's.

    Raises:
        ConfigError: If a folder holds no weights.
        DataError: If there is no such folder.
    """
    if not is_local(source):
        return f"{source}{ON_HUB}{revision}"
    folder = resolve(source)
    try:
        if folder.suffix == ".gguf" and folder.is_file():
            return sha256(folder)
        if not folder.is_dir():
            raise absent(source)
        patterns = ("tokenizer*", "vocab*", *(() if drawn else ("config.json", "*.safetensors")))
        files = [p for p in folder.iterdir() if any(p.match(pattern) for pattern in patterns)]
        if not drawn and not any(p.suffix == ".safetensors" for p in files):
            raise ConfigError(f"science.model.source={source!r}: expected a folder with config.json and *.safetensors")
        return digest_of({p.name: sha256(p) for p in sorted(files)})
    except PermissionError as error:
        raise ConfigError(f"science.model.source={source!r}: {error}; let this user read it") from error
