"""Run file: the sections run, science (decides results), cluster (never affects results) and baselines."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from cl_dist.config import Section, Tree, apply_overrides, did_you_mean, merged, parse, read_yaml
from cl_dist.data.orders import check_order, read_orders
from cl_dist.data.tasks import DataConfig, RowLimits, TaskConfig
from cl_dist.errors import ConfigError, DataError
from cl_dist.methods import METHODS, capabilities_of, get_method, installed, method_config
from cl_dist.methods.base import MethodConfig, TaskSequence
from cl_dist.models.config import ModelConfig, check_length, known_sizes, max_positions
from cl_dist.parallel.config import EngineConfig
from cl_dist.paths import ConfigPath, home
from cl_dist.sinks import Name
from cl_dist.stage import EvaluateConfig, GenerateConfig, TrainConfig

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
NAME_TEXT = "up to 100 letters, digits, '_', '.' and '-', starting with a letter or digit"


class RunSection(Section):
    """Name and location of the run."""

    name: Annotated[str, Field(pattern=NAME)]
    """Name of the run and of its folder; the default is the name of the run file."""
    dir: ConfigPath = "runs"
    """Parent of the run folder; `~` is expanded. On a cluster, a folder that every node can access."""
    mirror: str | None = None
    """URL to which finished stages are also copied, as <mirror>/<name>: s3://bucket/runs, gs://..., file:///... A run
    without a local folder starts from the copy. Needs the fsspec package of that store, such as s3fs."""
    trackers: list[Name] = []
    """Send metrics to tensorboard, mlflow or wandb, in addition to the run folder. Needs
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
                f"dir={self.dir!r}: the run folder {ascii(str(folder))[1:-1]} is not valid UTF-8, so weights cannot be "
                "read from it; choose another run.dir or working directory"
            ) from None
        existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not existing.is_dir():
            raise ValueError(f"dir={self.dir!r}: {existing} is not a directory; choose a directory or a new path")
        return self


class Science(Section):
    """Settings that decide results; stages are identified by them."""

    schema_version: Literal[1] = 1
    """Version of the run file's format."""
    seed: int = Field(0, ge=0)
    """Seed of all random draws of the run."""
    model: ModelConfig
    method: SerializeAsAny[MethodConfig]
    tasks: list[TaskConfig] = Field(min_length=1)
    orders: dict[str, list[str]] = {}
    """Task orders by name."""
    order_file: ConfigPath | None = None
    """File of orders: one task id per line, or, as in PyContinual, one order per line; named row0, row1, ..."""
    order: list[str] | str | None = None
    """Task ids in learning order, or the name of an order; None uses the order of `tasks`."""
    rows: RowLimits = RowLimits()
    """Maximum number of rows per split, for every task: {train: 80, test: 30}. A task's own `rows` take precedence, key
    by key."""
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
            raise ValueError(f"name={name!r} is not a method{did_you_mean(str(name), list(METHODS))}")
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
            self._with_rows(task)
            if task.output == "text" and output == "classifier":
                raise ValueError(f"tasks.{task.id}.output='text': method {self.method.name!r} predicts labels only")
        return self

    def train_of(self, task: TaskConfig) -> TrainConfig:
        """Return the training settings of one task."""
        try:
            return self.train.updated(task.train) if task.train else self.train
        except ConfigError as error:
            raise ValueError(f"tasks.{task.id}.train: {error}") from None

    def sequence(self) -> TaskSequence:
        """Return the tasks in learning order, with the row limits that apply to them.

        Raises:
            ConfigError: If the order has an unknown or a repeated task.
        """
        by_id = {task.id: self._with_rows(task) for task in self.tasks}
        order = self._order(list(by_id))
        check_order(order, list(by_id))
        return TaskSequence(tuple(by_id[name] for name in order))

    def _with_rows(self, task: TaskConfig) -> TaskConfig:
        """Return a task whose row limits are those of all tasks, updated with its own."""
        if not self.rows.model_fields_set:
            return task
        try:
            rows = self.rows.updated(task.rows.model_dump(mode="json", exclude_unset=True))
        except ConfigError as error:
            raise ValueError(f"tasks.{task.id}.rows: {error}") from None
        return task.model_copy(update={"rows": rows})

    def named_orders(self) -> dict[str, list[str]]:
        """Return the orders of the run file and of its order file."""
        orders = dict(self.orders)
        if self.order_file is not None:
            orders |= {f"row{number}": order for number, order in enumerate(read_orders(self.order_file))}
        return orders

    def _order(self, ids: list[str]) -> list[str]:
        orders = self.named_orders()
        if self.order is None:
            return orders["row0"] if self.order_file is not None else ids
        if isinstance(self.order, list):
            return self.order
        if self.order not in orders:
            raise ConfigError(
                f"science.order={self.order!r}: no such order{did_you_mean(self.order, list(orders))}. "
                "Write a list of task ids in brackets: [a, b]"
            )
        return orders[self.order]


class ClusterConfig(EngineConfig):
    """Resources and fault tolerance of the run. Never affects results: nothing here enters a fingerprint."""

    dispatcher: Literal["ray", "local"] = "ray"
    """ray: a gang and an actor pool on a Ray cluster; local: one worker in this process."""
    address: str | None = None
    """Address of the Ray cluster ('auto' finds one on this machine); None starts a local one for the run."""
    workers: int = Field(1, gt=0)
    """Number of training processes, each with its own device."""
    min_workers: int | None = Field(None, gt=0)
    """Makes the gang elastic: it shrinks to at least this size when nodes are lost, and grows back to `workers` when
    they return, each time from the last checkpoint (see checkpoint_minutes)."""
    elastic_interval_s: float = Field(60.0, gt=0)
    """Interval at which an elastic gang checks whether it can grow."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that Ray reserves for a worker."""
    gpus_per_worker: float = Field(0.0, ge=0)
    """GPUs that Ray reserves for a worker; 0 trains on CPUs."""
    workers_per_model: int = Field(1, gt=0)
    """Number of workers whose resources one full model uses when it generates, votes or is scored. If a model does not
    fit on the first of these GPUs, its layers are distributed over all of them; results are bit-identical."""
    max_failures: int = Field(3, ge=0)
    """Restarts of a crashed gang or shard before the run fails."""
    stop_timeout_s: float = Field(60.0, ge=0)
    """Time that a stopping run waits for the stage to be saved."""
    progress_timeout_s: float = Field(1800.0, ge=0)
    """Longest time without progress: for one optimizer step with the dev scoring and saving that follow it, for loading
    before the first step, for everything after the last step, and for one shard. Processes that exceed it write their
    stacks to their logs, exit, and are restarted. 0 disables the limit."""
    lost_node_timeout_s: float = Field(300.0, ge=0)
    """Time to wait for lost nodes to return when the remaining ones cannot hold the gang."""
    start_timeout_s: float = Field(300.0, gt=0)
    """Time to wait for the gang, or for the first actor, to start before the run reports that the cluster is busy."""

    @model_validator(mode="after")
    def _engine_fits(self) -> "ClusterConfig":
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers={self.min_workers}: expected at most workers={self.workers}")
        if self.workers_per_model > 1 and (self.gpus_per_worker < 1 or self.gpus_per_worker % 1):
            raise ValueError(
                f"workers_per_model={self.workers_per_model} with gpus_per_worker={self.gpus_per_worker:g}: expected "
                "an integer gpus_per_worker of 1 or more"
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
            raise ValueError(f"workers={self.workers} is not supported with {culprit}; expected workers: 1")
        return self


class RunConfig(Section):
    """One run file."""

    run: RunSection
    science: Science
    cluster: ClusterConfig = ClusterConfig()
    baselines: dict[Annotated[str, Field(pattern=NAME)], Tree] = {}
    """Runs to compare with: settings that differ from `science`, by name. {sequential: {method: {name: sequential}}}"""

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        if self.science.model.dtype == "bfloat16" and (self.cluster.zero_stage == 0 or self.cluster.engine == "torch"):
            raise ValueError(
                "science.model.dtype='bfloat16' needs cluster.engine='deepspeed' and zero_stage 1, 2 or 3: "
                "otherwise there are no float32 master weights"
            )
        method = self.science.method.name
        able = capabilities_of(self.science.method, self.science.model)
        if able.penalties and self.cluster.offload and self.cluster.zero_stage < 3:
            raise ValueError(
                f"method {method!r} adds penalties to gradients, which DeepSpeed does not expose with offload and "
                f"zero_stage {self.cluster.zero_stage}; expected zero_stage 3, or no offload"
            )
        bits = self.science.model.weight_bits
        if bits is not None and not able.takes_quantized:
            names = ", ".join(name for name in METHODS if self._takes_quantized(name))
            raise ValueError(
                f"science.model.weight_bits={bits}: method {method!r} trains or wraps the backbone's layers; "
                f"use one of {names}, or, in a baseline, model: {{weight_bits: null}}"
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
        """Return the configuration of a baseline: same tasks and cluster, in a subfolder of the run folder.

        Raises:
            ConfigError: If its settings are invalid.
        """
        tree = self.tree()
        over = self.baselines[name]
        science = merged(tree["science"], over)
        if "method" in over:
            science["method"] = over["method"]  # replaced, not merged: each method has its own settings
        run = {**tree["run"], "name": name, "dir": str(self.folder / "baselines")}
        if self.run.mirror is not None:
            run["mirror"] = f"{self.run.mirror.rstrip('/')}/{self.run.name}/baselines"
        parts = {"run": run, "science": science, "cluster": tree.get("cluster", {})}
        return parse(RunConfig, parts, f"baselines.{name}.")

    def check_lengths(self, sizes: Mapping[str, Any]) -> None:
        """Check that the backbone with this config.json supports `max_length` of every task.

        Raises:
            ConfigError: If it does not.
        """
        is_lm = get_method(self.science.method.name).output(self.science.model.output) == "lm"
        limit = sizes.get("max_position_embeddings", sizes.get("n_positions")) if is_lm else max_positions(sizes)
        for task in self.science.tasks:
            check_length(self.science.train_of(task).max_length, limit if isinstance(limit, int) else None)

    def tree(self) -> Tree:
        """Return the settings that were set, as plain data that parses to an equal RunConfig."""
        return self.model_dump(mode="json", exclude_unset=True)


def read_run_file(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and apply dotted overrides.

    Raises:
        ConfigError: With one line per fault, or if a local model does not support `max_length`.
    """
    tree = apply_overrides(read_yaml(path), overrides)
    tree.setdefault("run", {})
    if isinstance(tree["run"], dict) and "name" not in tree["run"]:
        if not re.fullmatch(NAME, path.stem):
            raise ConfigError(
                f"{path}: run.name is not set, and the file name {path.stem!r} is not a valid name: expected "
                f"{NAME_TEXT}; set run.name=... or rename the file"
            )
        tree["run"]["name"] = path.stem
    return parse_run(tree)


def parse_run(tree: Mapping[str, Any]) -> RunConfig:
    """Return the run file that a tree of plain data describes.

    Raises:
        ConfigError: With one line per fault, or if rows may be longer than a model that is at hand can read.
    """
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
