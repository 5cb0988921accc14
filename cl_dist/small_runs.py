"""Variants of a run file for development: without Ray in one process, or cut down to a few rows."""

from collections.abc import Mapping
from typing import Any, get_args

from cl_dist.config import Section, Tree
from cl_dist.data.tasks import SplitName, TaskConfig
from cl_dist.run_config import RunConfig, parse_run

SMOKE_ROWS = 30
"""Rows of each split of each task in a smoke run."""
SUFFIX = "-smoke"


def without_ray(config: RunConfig) -> RunConfig:
    """Return a run in this process, with one worker: plain torch, or DeepSpeed if the weights are bfloat16.

    Plain torch has no float32 master weights, which bfloat16 needs. The results are the same beyond float rounding.
    """
    each = (config, *(config.baseline(name) for name in config.baselines))
    tree = config.tree()
    cluster: Tree = {"dispatcher": "local", "workers": 1, "workers_per_model": 1, "min_workers": None}
    if all(one.science.model.dtype == "float32" for one in each):
        cluster |= {"engine": "torch", "offload": None, "offload_folder": None}
    return parse_run(tree | {"cluster": {**tree.get("cluster", {}), **cluster}})


def smoke(config: RunConfig) -> RunConfig:
    """Return a run named NAME-smoke with at most SMOKE_ROWS rows of each split of each task, and one epoch.

    It tests whether a run gets to its end, so pseudo-samples of a model that has hardly trained do not stop it.
    """
    tree = config.tree()
    tree["run"]["name"] = f"{config.run.name[: 100 - len(SUFFIX)]}{SUFFIX}"
    tree["science"] = _cut(tree["science"], config)
    tree["science"]["train"] = {**tree["science"].get("train", {}), "epochs": 1}
    tree["science"]["generate"] = {**tree["science"].get("generate", {}), "min_yield": 0.0, "max_attempts": 2}
    if "baselines" in tree:
        tree["baselines"] = {name: _cut(over, config.baseline(name)) for name, over in tree["baselines"].items()}
    return parse_run(tree)


def _cut(science: Tree, config: RunConfig) -> Tree:
    """Return the settings of a run or baseline with one epoch everywhere and fewer rows in its tasks."""
    science = dict(science)
    if "tasks" in science:
        limited = {task.id: task for task in config.science.sequence().tasks}
        every = {task.id: limited.get(task.id, task) for task in config.science.tasks}
        science["tasks"] = [_cut_task(task, every[task["id"]]) for task in science["tasks"]]
    if "train" in science:
        science["train"] = _one_epoch(science["train"])
    if "generate" in science:
        science["generate"] = {**science["generate"], "min_yield": 0.0, "max_attempts": 2}
    if "method" in science:
        science["method"] = {**science["method"], **_one_epoch_of(config.science.method)}
    return science


def _cut_task(tree: Tree, task: TaskConfig) -> Tree:
    limits = {split: min(task.rows.of(split) or SMOKE_ROWS, SMOKE_ROWS) for split in get_args(SplitName)}
    cut = {**tree, "rows": {**tree.get("rows", {}), **limits}}
    if "train" in cut:
        cut["train"] = _one_epoch(cut["train"])
    return cut


def _one_epoch(train: Mapping[str, Any]) -> Tree:
    return {**train, "epochs": 1} if "epochs" in train else dict(train)


def _one_epoch_of(section: Section) -> Tree:
    """Return the fields of a method's sections with `epochs: 1`, for methods that train models of their own."""
    found: Tree = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section) and (inner := _one_epoch_of(value)):
            found[name] = {**value.model_dump(mode="json", exclude_unset=True), **inner}
        elif name == "epochs":
            found[name] = 1
    return found
