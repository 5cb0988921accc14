"""The run file as a whole: run, science (decides results) and cluster (must not), and its baselines."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from cl_dist.config import Section, Tree, apply_overrides, did_you_mean, merged, parse, read_yaml
from cl_dist.data.orders import check_order, read_orders
from cl_dist.data.tasks import DataConfig, TaskConfig
from cl_dist.errors import ConfigError, DataError
from cl_dist.methods import METHODS, capabilities_of, get_method, installed, method_config
from cl_dist.methods.base import MethodConfig, TaskSequence
from cl_dist.models.config import ModelConfig, check_length, known_sizes, max_positions
from cl_dist.parallel.config import EngineConfig
from cl_dist.paths import Place, home
from cl_dist.sinks import Name
from cl_dist.stage import EvaluateConfig, GenerateConfig, TrainConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
NAME_TEXT = "up to 100 letters, digits, '_', '.' and '-', the first a letter or digit"


class RunSection(Section):
    """Name and place of the run."""

    name: Annotated[str, Field(pattern=NAME)]
    """Name of the run and of its folder; a run file without it gives its own file name."""
    dir: Place = "runs"
    """Folder that holds run folders, `~` is expanded; on a cluster, one that every node sees."""
    mirror: str | None = None
    """Where finished stages are copied as well, to <mirror>/<name>: s3://bucket/runs, gs://..., file:///... A run whose
    folder is not there starts from the copy. Needs the fsspec package of that store, such as s3fs."""
    trackers: list[Name] = []
    """Also send numbers to tensorboard, mlflow or wandb; the run folder holds all of them without. Needs
    `pip install 'cl-dist[tracking]'`."""
    log_every: int = Field(10, ge=0)
    """Report learning rate, loss terms, gradient norm, throughput and peak memory every N optimizer steps, and after
    the last step of a stage: to metrics/events.jsonl, the trackers and the log. 0 disables it."""

    @model_validator(mode="after")
    def _can_be_a_folder(self) -> "RunSection":
        try:
            folder = home(self.dir).absolute() / self.name
        except DataError as error:
            raise ValueError(f"dir={error}") from None
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"dir={self.dir!r}: the run folder would be {ascii(str(folder))[1:-1]}, whose name is no UTF-8; "
                "weights cannot be read from there: name another run.dir, or start in another folder"
            ) from None
        there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
        if not there.is_dir():
            raise ValueError(f"dir={self.dir!r}: {there} is no folder; name one that is there, or a new one")
        return self


class Science(Section):
    """Everything that decides results, and nothing else: what stages are identified by."""

    schema_version: Literal[1] = 1
    """Version of the run file's format."""
    seed: int = Field(0, ge=0)
    """Seed of all random draws of the run."""
    model: ModelConfig
    method: SerializeAsAny[MethodConfig]
    tasks: list[TaskConfig] = Field(min_length=1)
    orders: dict[str, list[str]] = {}
    """Task orders by name."""
    order_file: Place | None = None
    """File of orders: one task id per line, or PyContinual's lines of one whole order each; named row0, row1, ..."""
    order: list[str] | str | None = None
    """Task ids in the order they are learned, or the name of an order; None takes the tasks as listed."""
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    data: DataConfig = DataConfig()

    @field_validator("method", mode="before")
    @classmethod
    def _method_by_name(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        name = given.get("name")
        if not isinstance(name, str):
            raise ValueError(f"name={name!r} is no method{did_you_mean(str(name), list(METHODS))}")
        try:
            return method_config(name, given)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _tasks_fit_together(self) -> "Science":
        ids = [task.id for task in self.tasks]
        if len(set(ids)) != len(ids):
            raise ValueError(f"tasks: ids must be distinct, got {ids}")
        output = get_method(self.method.name).output(self.model.output)
        for task in self.tasks:
            self.train_of(task)
            if task.output == "text" and output == "classifier":
                raise ValueError(f"tasks.{task.id}.output='text': method {self.method.name!r} picks one of some labels")
        return self

    def train_of(self, task: TaskConfig) -> TrainConfig:
        """Return the training settings of one task."""
        try:
            return self.train.updated(task.train) if task.train else self.train
        except ConfigError as error:
            raise ValueError(f"tasks.{task.id}.train: {error}") from None

    def sequence(self) -> TaskSequence:
        """Return the tasks in learned order.

        Raises:
            ConfigError: If the order names an unknown task, or one twice.
        """
        by_id = {task.id: task for task in self.tasks}
        order = self._order(list(by_id))
        check_order(order, list(by_id))
        return TaskSequence(tuple(by_id[name] for name in order))

    def named_orders(self) -> dict[str, list[str]]:
        """Return the orders that the run file names, and those of its order file."""
        found = dict(self.orders)
        if self.order_file is not None:
            found |= {f"row{number}": order for number, order in enumerate(read_orders(self.order_file))}
        return found

    def _order(self, ids: list[str]) -> list[str]:
        orders = self.named_orders()
        if self.order is None:
            return orders["row0"] if self.order_file is not None else ids
        if isinstance(self.order, list):
            return self.order
        if self.order not in orders:
            raise ConfigError(
                f"science.order={self.order!r}: no such order{did_you_mean(self.order, list(orders))}. "
                "A list of task ids is written in brackets: [a, b]"
            )
        return orders[self.order]


class ClusterConfig(EngineConfig):
    """Where and on how many workers the run is computed. Nothing here enters a fingerprint."""

    dispatcher: Literal["ray", "local"] = "ray"
    """ray: a gang and an actor pool on a Ray cluster; local: everything in this process, on one worker."""
    address: str | None = None
    """Ray cluster to join ('auto' finds one on this machine); None starts a local one for the run."""
    workers: int = Field(1, gt=0)
    """Number of training processes, each with its own device."""
    min_workers: int | None = Field(None, gt=0)
    """With it the gang is elastic: it goes on with so few workers where nodes are lost, and grows to `workers` when
    they come back, each time from the last checkpoint (see checkpoint_minutes)."""
    elastic_interval_s: float = Field(60.0, gt=0)
    """How often an elastic gang looks whether it can grow."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs that Ray reserves for a worker; 0 trains on CPUs."""
    workers_per_model: int = Field(1, gt=0)
    """How many workers' resources hold one model where it has to be whole: when it writes, votes or is scored. With
    more than 1 a model that the first of these GPUs cannot hold lies on all of them, by layers; same bits."""
    max_failures: int = Field(3, ge=0)
    """How often a crashed gang or shard is started again before the run fails."""
    stop_timeout_s: float = Field(60.0, ge=0)
    """How long a run that is told to stop waits for the stage to be saved."""
    progress_timeout_s: float = Field(1800.0, ge=0)
    """Longest time for one optimizer step, with the scoring of dev rows and saving where they follow, for loading
    before the first and all that comes after the last, and for one shard of what comes in shards; processes that take
    longer write their stacks to their logs and end themselves, and are started again. 0 waits for ever."""
    lost_node_timeout_s: float = Field(300.0, ge=0)
    """How long a run waits for nodes without which the cluster cannot hold the gang any more."""
    start_timeout_s: float = Field(300.0, gt=0)
    """How long to wait for the gang, or for any actor, to start before the cluster is reported as too busy."""

    @model_validator(mode="after")
    def _engine_fits(self) -> "ClusterConfig":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers}: expected at most workers={self.workers}")
        if self.workers_per_model > 1 and (self.gpus_per_worker < 1 or self.gpus_per_worker % 1):
            raise ValueError(
                f"workers_per_model={self.workers_per_model} with gpus_per_worker={self.gpus_per_worker:g}: it is for "
                "models that whole GPUs hold together"
            )
        if self.min_workers is not None and self.min_workers < self.workers_per_model:
            raise ValueError(
                f"min_workers={self.min_workers}: expected workers_per_model={self.workers_per_model} or more"
            )
        if self.workers % self.workers_per_model:
            raise ValueError(
                f"workers={self.workers}: expected a multiple of workers_per_model={self.workers_per_model}"
            )
        if self.workers > 1 and (self.dispatcher == "local" or self.engine == "torch"):
            culprit = "dispatcher: local" if self.dispatcher == "local" else "engine: torch"
            raise ValueError(f"workers={self.workers} does not work with {culprit}; expected workers: 1")
        return self


class RunConfig(Section):
    """One run file."""

    run: RunSection
    science: Science
    cluster: ClusterConfig = ClusterConfig()
    baselines: dict[Annotated[str, Field(pattern=NAME)], Tree] = {}
    """Runs to compare with, by name: what differs from `science`. {sequential: {method: {name: sequential}}}"""

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        if self.science.model.dtype == "bfloat16" and (self.cluster.zero_stage == 0 or self.cluster.engine == "torch"):
            raise ValueError(
                "science.model.dtype='bfloat16' needs cluster.engine='deepspeed' and zero_stage 1, 2 or 3: "
                "the others keep no float32 master weights"
            )
        method = self.science.method.name
        able = capabilities_of(self.science.method, self.science.model)
        if able.penalties and self.cluster.offload and self.cluster.zero_stage < 3:
            raise ValueError(
                f"method {method!r} adds penalties to gradients, which DeepSpeed holds out of reach with offload under "
                f"zero_stage {self.cluster.zero_stage}; expected zero_stage 3, or no offload"
            )
        bits = self.science.model.weight_bits
        if bits is not None and not able.takes_quantized:
            names = ", ".join(name for name in METHODS if self._takes_quantized(name))
            raise ValueError(
                f"science.model.weight_bits={bits}: method {method!r} trains the backbone's layers, or wraps them; "
                f"take one of {names}, or in a baseline model: {{weight_bits: null}}"
            )
        for name in self.baselines:
            self.baseline(name)
        return self

    def _takes_quantized(self, method: str) -> bool:
        """Return whether a method, with its default settings, works on quantized weights."""
        return capabilities_of(METHODS[method].config(name=method), self.science.model).takes_quantized

    @property
    def folder(self) -> Path:
        """The run folder."""
        return home(self.run.dir) / self.run.name

    def baseline(self, name: str) -> "RunConfig":
        """Return the run file of a baseline: the same tasks and cluster, in a folder inside this run's.

        Raises:
            ConfigError: If its settings do not parse.
        """
        tree = self.tree()
        over = self.baselines[name]
        science = merged(tree["science"], over)
        if "method" in over:
            science["method"] = over["method"]  # another method has other settings: replaced, not merged
        run = {**tree["run"], "name": name, "dir": str(self.folder / "baselines")}
        if self.run.mirror is not None:
            run["mirror"] = f"{self.run.mirror.rstrip('/')}/{self.run.name}/baselines"
        parts = {"run": run, "science": science, "cluster": tree.get("cluster", {})}
        return parse(RunConfig, parts, f"baselines.{name}.")

    def check_lengths(self, sizes: Mapping[str, Any]) -> None:
        """Check that the backbone, of which this is config.json, can read rows as long as every task says.

        Raises:
            ConfigError: If it cannot.
        """
        writes = get_method(self.science.method.name).output(self.science.model.output) == "lm"
        told = sizes.get("max_position_embeddings", sizes.get("n_positions")) if writes else max_positions(sizes)
        for task in self.science.tasks:
            check_length(self.science.train_of(task).max_length, told if isinstance(told, int) else None)

    def tree(self) -> Tree:
        """Return what was set, as plain data that parses back to an equal run file."""
        return self.model_dump(mode="json", exclude_unset=True)


def load_run(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a run file and lay dotted overrides over it.

    Raises:
        ConfigError: With one line per fault, or if rows may be longer than a model that is at hand can read.
    """
    tree = apply_overrides(read_yaml(path), overrides or [])
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict) and "name" not in tree["run"]:
        if not re.fullmatch(NAME, path.stem):
            raise ConfigError(
                f"{path}: names its run {path.stem!r}, as it sets no run.name: expected {NAME_TEXT}; set run.name=..., "
                "or rename the file"
            )
        tree["run"]["name"] = path.stem
    run = parse(RunConfig, tree)
    for each in (run, *(run.baseline(name) for name in run.baselines)):
        each.check_lengths(known_sizes(each.science.model))
    return run


def json_schema() -> Tree:
    """Return the JSON Schema of a run file, with the settings of every method."""
    schema = RunConfig.model_json_schema()
    methods: list[Tree] = []
    for method in dict.fromkeys(entry.config for entry in METHODS.values()):
        inner = method.model_json_schema()
        schema["$defs"] |= inner.pop("$defs", {})
        schema["$defs"][method.__name__] = inner
        methods.append({"$ref": f"#/$defs/{method.__name__}"})
    other = {"anyOf": [{"pattern": r"^[\w.]+:\w+$"}, {"enum": sorted(installed())}]}
    methods.append(
        {
            "type": "object",
            "description": "A method of another package, by entry point or 'package.module:METHOD'.",
            "properties": {"name": {"type": "string", **other}},
            "required": ["name"],
        }
    )
    schema["$defs"]["Science"]["properties"]["method"] = {
        "oneOf": methods,
        "description": "The method and its settings.",
    }
    schema["$defs"].pop("MethodConfig", None)
    return schema
