"""What can be known before a run holds any worker: settings, data, model, cluster, nodes, storage, time.

Each check gives findings; each finding that is no `ok` has a remedy. A cluster that the run file names is asked; a run
without `cluster.address` starts its own Ray, and only this machine is looked at.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import typer

from cl_dist.checks import check_model, token_report, writing_fault
from cl_dist.data.sources import listing
from cl_dist.errors import ClDistError, ClusterError, ConfigError, printable
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.run_events import versions
from cl_dist.storage import NodeResources, existing, room
from launcher import console, runs
from launcher.options import AsJson, Config, Overrides
from launcher.verbs.plan import planned

if TYPE_CHECKING:
    from cl_dist.dispatch_ray.nodes import NodeInfo

State = Literal["ok", "warn", "fail"]
SHM_GB, OPEN_FILES = 1.0, 4096
"""Below this a node gets a warning: Ray's object store lies in /dev/shm, and every worker is many sockets."""
SHORT_S = 600.0
"""A job that a scheduler ends sooner gets a warning."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    check: str
    state: State
    where: str
    found: str
    remedy: str = ""
    code: int = ClusterError.exit_code
    """What `cl-dist check` exits with where this fails."""


def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Look at data, model, nodes, storage and time before a run holds any worker.

    Exits with 4 if something fails, and with 2 if that is the model, whose settings or files are to be mended.
    """
    from cl_dist.run_config import load_run

    findings = preflight(load_run(runs.run_file(config), overrides or []))
    failed = [finding for finding in findings if finding.state == "fail"]
    if as_json:
        document = {"passed": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
        console.document(document)
    else:
        for finding in findings:
            console.out.print(f"{finding.state:4}  {finding.check:9}  {finding.where}: {finding.found}", soft_wrap=True)
            if finding.remedy:
                console.out.print(f"      -> {finding.remedy}", soft_wrap=True)
    if failed:
        raise typer.Exit(min(finding.code for finding in failed))


def preflight(config: RunConfig) -> list[Finding]:
    """Look at everything."""
    findings = [*_data(config), *_model(config)]
    if not any(finding.state == "fail" for finding in findings):
        findings += _tokens(config)
        findings += _writing(config)
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
            yield Finding("data", "fail", name, str(error), "mend the rows; `cl-dist data check` shows all faults")
            continue
        rows = f"{len(data.train)} train, {len(data.dev)} dev, {len(data.test)} test rows"
        tested = {row.label for row in data.test}
        untested = [label for label in data.labels if label not in tested]
        if untested:
            found = f"{rows}; no test row has the label {', '.join(printable(label, '') for label in untested)}"
            yield Finding("data", "warn", name, found, "accuracy would say little; mend the splits")
        for warning in data.warnings:
            yield Finding("data", "warn", name, f"{rows}; {warning}", "mend the rows, or the settings that choose them")
        if not untested and not data.warnings:
            yield Finding("data", "ok", name, rows)


def _model(config: RunConfig) -> Iterator[Finding]:
    from cl_dist.models.backbone import load_config

    model = config.science.model
    try:
        known = load_config(model)
        check_model(Run(config))
    except ClDistError as error:
        remedy = "name a folder, package:NAME/path, or a hub name that is in the cache or can be reached"
        yield Finding("model", "fail", model.source, str(error), remedy, _code(error))
        return
    try:
        config.check_lengths(known.to_dict())
    except ClDistError as error:
        yield Finding("model", "fail", model.source, str(error), "lower train.max_length, or take another model")
        return
    yield Finding("model", "ok", model.source, f"model_type {known.model_type}, with its tokenizer")


def _tokens(config: RunConfig) -> list[Finding]:
    """Look whether the tokenizers of a run and its baselines read the rows, and the backbones their tokens."""
    found: list[Finding] = []
    for each in (config, *(config.baseline(name) for name in config.baselines)):
        opened, source = Run(each), each.science.model.source
        try:
            check_model(opened)
        except ClDistError as error:
            found.append(Finding("model", "fail", source, str(error), "mend the model's folder", _code(error)))
            continue
        for number, task in enumerate(opened.tasks.tasks):
            reading = token_report(opened, number)
            if reading.faults:
                lines = f"rows that cannot be read:\n{listing(reading.faults)}"
                found.append(Finding("data", "fail", f"task {task.id}", lines, "mend the rows, or take another model"))
            elif (warning := reading.warning(source)) is not None:
                remedy = "take the tokenizer that belongs to the model, or a model that reads this language"
                found.append(Finding("data", "warn", f"task {task.id}", warning, remedy))
    return list(dict.fromkeys(found))


def _code(error: ClDistError) -> int:
    return ConfigError.exit_code if isinstance(error, ConfigError) else ClusterError.exit_code


def _writing(config: RunConfig) -> list[Finding]:
    """Look whether the run, and baselines that write, can write the answers of each task; only faults are findings."""
    found = []
    for each in (config, *(config.baseline(name) for name in config.baselines)):
        opened = Run(each)
        for number, task in enumerate(opened.tasks.tasks):
            remedy = "rename labels with source.label_map, raise train.max_length, or shorten the rows"
            try:
                fault = writing_fault(opened, number)
            except ClDistError as error:
                fault, remedy = str(error), "install the package, or name another metric"
            finding = Finding("data", "fail", f"task {task.id}", str(fault), remedy)
            if fault is not None and finding not in found:
                found.append(finding)
    return found


def _time(config: RunConfig) -> Iterator[Finding]:
    cluster = config.cluster
    if cluster.progress_timeout_s == 0:
        remedy = "set it above the longest step, with the scoring of dev rows"
        yield Finding(
            "time", "warn", "cluster.progress_timeout_s", "0: a rank that hangs is waited for for ever", remedy
        )
    if cluster.checkpoint_minutes == 0 and cluster.checkpoint_steps == 0:
        found = "no checkpoints inside a task: a crash costs the whole stage"
        yield Finding("time", "warn", "cluster.checkpoint_minutes", found, "set cluster.checkpoint_minutes: 10")
    ends = os.environ.get("SLURM_JOB_END_TIME", "")
    if ends.isdigit():
        left = float(ends) - time.time()
        state: State = "warn" if left < SHORT_S else "ok"
        found = f"{left / 60:.0f} minutes left of the allocation"
        yield Finding("time", state, "SLURM_JOB_END_TIME", found, "ask for more with --time" if state == "warn" else "")


def _mirror(config: RunConfig) -> Iterator[Finding]:
    if config.run.mirror is None:
        return
    from launcher.mirror import Mirror

    try:
        Mirror(config).probe()
        yield Finding("storage", "ok", config.run.mirror, "run.mirror: written and read back")
    except ClDistError as error:
        remedy = "install the store's fsspec package, give its credentials, or name another run.mirror"
        yield Finding("storage", "fail", config.run.mirror, str(error), remedy)


def _machine(config: RunConfig, needed_gb: float) -> Iterator[Finding]:
    """Look at this machine alone."""
    cores = os.cpu_count() or 1
    wanted = config.cluster.workers * config.cluster.cpus_per_worker
    crowded = wanted > cores
    yield Finding(
        "resources",
        "warn" if crowded else "ok",
        "this machine",
        f"{config.cluster.workers} workers want {wanted:g} CPUs, it has {cores}",
        "they share; lower cluster.workers for speed" if crowded else "",
    )
    gpus = _gpus()
    if config.cluster.workers * config.cluster.gpus_per_worker > gpus:
        asked = config.cluster.workers * config.cluster.gpus_per_worker
        remedy = "lower cluster.workers or gpus_per_worker, or name a cluster as cluster.address"
        yield Finding("resources", "fail", "this machine", f"{asked:g} GPUs are asked for, it has {gpus}", remedy)
    folder = config.folder.absolute()
    if os.access(existing(folder), os.W_OK):
        yield Finding("storage", "ok", str(folder), "can be written")
    else:
        yield Finding("storage", "fail", str(folder), "cannot be written", "name another run.dir")
    here = room(folder)
    yield _disk(str(folder), here, needed_gb)
    yield from _limits("this machine", here)


def _cluster(config: RunConfig, needed_gb: float) -> Iterator[Finding]:
    """Join the cluster, look at every node, and leave it."""
    from cl_dist.dispatch_ray.cluster import CLOSE_IT, OPEN, check_fits, connect, is_open
    from cl_dist.dispatch_ray.nodes import alive, probe

    address = str(config.cluster.address)
    try:
        connection = connect(config.cluster)
    except ClusterError as error:
        yield Finding("cluster", "fail", address, str(error), "start it with `ray start`, or mend cluster.address")
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
            remedy = "lower cluster.workers or what each asks for, or add nodes"
            yield Finding("resources", "fail", address, str(error), remedy)
        own = versions()
        for facts in probe(config.folder, nodes):
            yield from _node(facts, own, config, needed_gb)
    except OSError as error:
        yield Finding("storage", "fail", str(config.folder), str(error), "name another run.dir")
    finally:
        connection.close()


def _node(facts: NodeInfo, own: dict[str, str | None], config: RunConfig, needed_gb: float) -> Iterator[Finding]:
    if facts.error:
        remedy = "look at this node's Ray: `ray status`, and its log folder"
        yield Finding("node", "fail", facts.name, facts.error, remedy)
        return
    other = {
        name: (facts.versions.get(name), known) for name, known in own.items() if facts.versions.get(name) != known
    }
    if other:
        found = ", ".join(f"{name} {there or 'missing'} (driver: {here})" for name, (there, here) in other.items())
        yield Finding("versions", "fail", facts.name, found, "install the same constraints.txt, or the same image")
    else:
        yield Finding("versions", "ok", facts.name, "as the driver's")
    if facts.reads and facts.writes:
        yield Finding("storage", "ok", facts.name, f"{config.folder}: written and read back")
        yield _disk(facts.name, facts.room, needed_gb)
    else:
        remedy = "mount one file system there on every node, or name another run.dir"
        yield Finding("storage", "fail", facts.name, f"{config.folder}: {facts.sight}", remedy)
    yield from _limits(facts.name, facts.room)


def _disk(where: str, there: NodeResources, needed_gb: float) -> Finding:
    found = f"{there.free_gb:.1f} GB free, the run writes about {needed_gb:.1f} GB"
    if there.free_gb < needed_gb:
        return Finding("disk", "fail", where, found, "make room, name another run.dir")
    return Finding("disk", "ok", where, found)


def _limits(where: str, there: NodeResources) -> Iterator[Finding]:
    if there.shm_gb < SHM_GB:
        remedy = "docker: --shm-size 8g; Kubernetes: an emptyDir of medium Memory at /dev/shm"
        yield Finding("limits", "warn", where, f"/dev/shm has {there.shm_gb:.2f} GB", remedy)
    if there.open_files < OPEN_FILES:
        yield Finding(
            "limits", "warn", where, f"{there.open_files} open files a process", "ulimit -n 65536 before `ray start`"
        )


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _needed_gb(config: RunConfig) -> float:
    """Return what the run and its baselines will write."""
    opened_runs = [config, *(config.baseline(name) for name in config.baselines)]
    files = [part["bytes"] for each in opened_runs for part in planned(each, ()).get("disk", [])]
    return float(sum(files)) / 1e9
