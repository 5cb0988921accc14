"""Checks before a run starts workers: settings, data, model, cluster, nodes, storage and time limits.

Each check returns findings; a finding other than `ok` has a remedy. With `cluster.address` the checks cover every node
of that cluster; without it a run starts its own Ray, and they cover this machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cl_dist.checks import check_model, step_hints, token_report, writing_fault
from cl_dist.data.sources import listing
from cl_dist.errors import ClDistError, ClusterError, ConfigError
from cl_dist.mirror import Mirror
from cl_dist.planning.planner import planned
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_events import versions
from cl_dist.storage import NodeResources, existing, room

if TYPE_CHECKING:
    from cl_dist.dispatch_ray.nodes import NodeInfo

State = Literal["ok", "warn", "fail"]
SHM_GB, OPEN_FILES = 1.0, 4096
"""A node with less gets a warning: Ray's object store is in /dev/shm, and each worker opens many sockets."""
SHORT_S = 600.0
"""A shorter remaining allocation gets a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check."""

    check: str
    state: State
    where: str
    found: str
    remedy: str = ""
    code: int = ClusterError.exit_code
    """Exit code of `cl-dist check` if this finding fails."""


def preflight(config: RunConfig) -> list[Finding]:
    """Run all checks."""
    findings = [*_data(config), *_model(config)]
    if not any(finding.state == "fail" for finding in findings):
        findings += _tokens(config)
        findings += _writing(config)
        findings += _steps(config)
    findings += [*_time(config), *_mirror(config)]
    needed_gb = 0.0 if any(finding.state == "fail" for finding in findings) else _needed_gb(config)
    if config.cluster.dispatcher == "ray" and config.cluster.address is not None:
        return [*findings, *_cluster(config, needed_gb)]
    return [*findings, *_machine(config, needed_gb)]


def _data(config: RunConfig) -> Iterator[Finding]:
    opened = Run(config)
    for task in range(len(opened.tasks)):
        name = f"task {opened.tasks.tasks[task].id}"
        try:
            data = opened.data(task)
        except ClDistError as error:
            yield Finding("data", "fail", name, str(error), "correct the rows; `cl-dist data check` lists all faults")
            continue
        rows = f"{len(data.train)} train, {len(data.dev)} dev, {len(data.test)} test rows"
        for warning in data.warnings:
            yield Finding(
                "data",
                "warn",
                name,
                f"{rows}; {warning}",
                "change the rows, or the settings that select and split them",
            )
        if not data.warnings:
            yield Finding("data", "ok", name, rows)


def _model(config: RunConfig) -> Iterator[Finding]:
    from cl_dist.models.backbone import load_config

    model = config.science.model
    try:
        known = load_config(model)
        check_model(Run(config))
    except ClDistError as error:
        remedy = "use a folder, package:NAME/path, or a hub name that is in the cache or can be downloaded"
        yield Finding("model", "fail", model.source, str(error), remedy, _code(error))
        return
    try:
        config.check_lengths(known.to_dict())
    except ClDistError as error:
        yield Finding("model", "fail", model.source, str(error), "lower train.max_length, or use another model")
        return
    yield Finding("model", "ok", model.source, f"model_type {known.model_type}, with its tokenizer")


def _tokens(config: RunConfig) -> list[Finding]:
    """Check that the tokenizers of a run and its baselines can read the rows, and the backbones their tokens."""
    found: list[Finding] = []
    for each in (config, *(config.baseline(name) for name in config.baselines)):
        opened, source = Run(each), each.science.model.source
        try:
            check_model(opened)
        except ClDistError as error:
            found.append(
                Finding("model", "fail", source, str(error), "correct the files of the model's folder", _code(error))
            )
            continue
        for number, task in enumerate(opened.tasks.tasks):
            reading = token_report(opened, number)
            if reading.faults:
                lines = f"rows that cannot be read:\n{listing(reading.faults)}"
                found.append(
                    Finding("data", "fail", f"task {task.id}", lines, "correct the rows, or use another model")
                )
            elif (warning := reading.warning(source)) is not None:
                remedy = "use the model's own tokenizer, or a model of this language"
                found.append(Finding("data", "warn", f"task {task.id}", warning, remedy))
    return list(dict.fromkeys(found))


def _code(error: ClDistError) -> int:
    return ConfigError.exit_code if isinstance(error, ConfigError) else ClusterError.exit_code


def _writing(config: RunConfig) -> list[Finding]:
    """Check that runs whose model generates text can generate each task's answers; return the faults."""
    found = []
    for each in (config, *(config.baseline(name) for name in config.baselines)):
        opened = Run(each)
        for number, task in enumerate(opened.tasks.tasks):
            remedy = "rename labels with source.label_map, raise train.max_length, or shorten the rows"
            try:
                fault = writing_fault(opened, number)
            except ClDistError as error:
                fault, remedy = str(error), "install the package, or use another metric"
            finding = Finding("data", "fail", f"task {task.id}", str(fault), remedy)
            if fault is not None and finding not in found:
                found.append(finding)
    return found


def _steps(config: RunConfig) -> list[Finding]:
    """Find tasks with too few optimizer steps for a method's slow parts, in a run and its baselines."""
    found = []
    for each in (config, *(config.baseline(name) for name in config.baselines)):
        where = f"method {each.science.method.name}"
        found += [Finding("steps", "warn", where, hint.found, hint.remedy) for hint in step_hints(Run(each))]
    return list(dict.fromkeys(found))


def _time(config: RunConfig) -> Iterator[Finding]:
    cluster = config.cluster
    if cluster.progress_timeout_s == 0:
        remedy = "set it above the time of the longest step, including the scoring of dev rows"
        yield Finding("time", "warn", "cluster.progress_timeout_s", "0: no timeout; a hung rank blocks the run", remedy)
    if cluster.checkpoint_minutes == 0 and cluster.checkpoint_steps == 0:
        found = "no checkpoints within a stage: a crash loses the whole stage"
        yield Finding("time", "warn", "cluster.checkpoint_minutes", found, "set cluster.checkpoint_minutes: 10")
    ends = os.environ.get("SLURM_JOB_END_TIME", "")
    if ends.isdigit():
        left = float(ends) - time.time()
        state: State = "warn" if left < SHORT_S else "ok"
        found = f"{left / 60:.0f} minutes left of the allocation"
        yield Finding(
            "time", state, "SLURM_JOB_END_TIME", found, "request more with sbatch --time" if state == "warn" else ""
        )


def _mirror(config: RunConfig) -> Iterator[Finding]:
    if config.run.mirror is None:
        return
    try:
        Mirror(config).probe()
        yield Finding("storage", "ok", config.run.mirror, "run.mirror: written and read back")
    except ClDistError as error:
        remedy = "install the store's fsspec package, set its credentials, or use another run.mirror"
        yield Finding("storage", "fail", config.run.mirror, str(error), remedy)


def _machine(config: RunConfig, needed_gb: float) -> Iterator[Finding]:
    """Check this machine."""
    cores = os.cpu_count() or 1
    wanted = config.cluster.workers * config.cluster.cpus_per_worker
    crowded = wanted > cores
    yield Finding(
        "resources",
        "warn" if crowded else "ok",
        "this machine",
        f"{config.cluster.workers} workers need {wanted:g} CPUs, it has {cores}",
        "workers share CPUs; fewer cluster.workers may be faster" if crowded else "",
    )
    gpus = _gpus()
    if config.cluster.workers * config.cluster.gpus_per_worker > gpus:
        asked = config.cluster.workers * config.cluster.gpus_per_worker
        remedy = "lower cluster.workers or gpus_per_worker, or set cluster.address"
        yield Finding("resources", "fail", "this machine", f"the run needs {asked:g} GPUs, it has {gpus}", remedy)
    folder = config.folder.absolute()
    if os.access(existing(folder), os.W_OK):
        yield Finding("storage", "ok", str(folder), "writable")
    else:
        yield Finding("storage", "fail", str(folder), "not writable", "use another run.dir")
    here = room(folder)
    yield _disk(str(folder), here, needed_gb)
    yield from _limits("this machine", here)


def _cluster(config: RunConfig, needed_gb: float) -> Iterator[Finding]:
    """Connect to the cluster, check every node, and disconnect."""
    from cl_dist.dispatch_ray.cluster import CLOSE_IT, OPEN, check_fits, connect, is_open
    from cl_dist.dispatch_ray.nodes import alive, probe

    address = str(config.cluster.address)
    try:
        connection = connect(config.cluster)
    except ClusterError as error:
        yield Finding("cluster", "fail", address, str(error), "start it with `ray start`, or correct cluster.address")
        return
    try:
        nodes = alive()
        yield Finding("cluster", "ok", address, f"{len(nodes)} nodes alive")
        if is_open():
            yield Finding("cluster", "warn", address, OPEN, CLOSE_IT)
        try:
            check_fits(config.cluster)
            yield Finding("resources", "ok", address, f"{config.cluster.workers} workers fit")
        except ClusterError as error:
            remedy = "lower cluster.workers or the resources of each, or add nodes"
            yield Finding("resources", "fail", address, str(error), remedy)
        own = versions()
        for facts in probe(config.folder, nodes):
            yield from _node(facts, own, config, needed_gb)
    except OSError as error:
        yield Finding("storage", "fail", str(config.folder), str(error), "use another run.dir")
    finally:
        connection.close()


def _node(facts: NodeInfo, own: dict[str, str | None], config: RunConfig, needed_gb: float) -> Iterator[Finding]:
    if facts.error:
        remedy = "check Ray on this node: `ray status`, and its log folder"
        yield Finding("node", "fail", facts.name, facts.error, remedy)
        return
    other = {
        name: (facts.versions.get(name), known) for name, known in own.items() if facts.versions.get(name) != known
    }
    if other:
        found = ", ".join(f"{name} {there or 'missing'} (driver: {here})" for name, (there, here) in other.items())
        yield Finding(
            "versions", "fail", facts.name, found, "install from the same constraints.txt, or use the same image"
        )
    else:
        yield Finding("versions", "ok", facts.name, "same as the driver's")
    if facts.reads and facts.writes:
        yield Finding("storage", "ok", facts.name, f"{config.folder}: written and read back")
        yield _disk(facts.name, facts.room, needed_gb)
    else:
        remedy = "mount the same file system there on every node, or use another run.dir"
        yield Finding("storage", "fail", facts.name, f"{config.folder}: {facts.sight}", remedy)
    yield from _limits(facts.name, facts.room)


def _disk(where: str, there: NodeResources, needed_gb: float) -> Finding:
    found = f"{there.free_gb:.1f} GB free, the run writes about {needed_gb:.1f} GB"
    if there.free_gb < needed_gb:
        return Finding("disk", "fail", where, found, "free space, or use another run.dir")
    return Finding("disk", "ok", where, found)


def _limits(where: str, there: NodeResources) -> Iterator[Finding]:
    if there.shm_gb < SHM_GB:
        remedy = "docker: --shm-size 8g; Kubernetes: an emptyDir of medium Memory at /dev/shm"
        yield Finding("limits", "warn", where, f"/dev/shm has {there.shm_gb:.2f} GB", remedy)
    if there.open_files < OPEN_FILES:
        yield Finding(
            "limits",
            "warn",
            where,
            f"{there.open_files} open files a process",
            "run `ulimit -n 65536` before `ray start`",
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _needed_gb(config: RunConfig) -> float:
    """Return the GB that the run and its baselines write."""
    opened_runs = [config, *(config.baseline(name) for name in config.baselines)]
    files = [part.bytes for each in opened_runs for part in planned(each, ()).disk]
    return float(sum(files)) / 1e9
