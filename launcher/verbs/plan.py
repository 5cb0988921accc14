"""`cl-dist plan`: the stages of a run, what a rank must hold, bytes on disk, which cluster would do. Starts nothing."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from cl_dist.errors import ConfigError
from cl_dist.planning import memory, scaling
from cl_dist.planning.inputs import ModelEstimate, PlanInputs
from cl_dist.planning.memory import GIB, Estimate, Gang, Quantity
from cl_dist.run import Run
from cl_dist.run_config import RunConfig, load_run
from cl_dist.stage import Choose, Evaluate, Generate, Rationalise, Record, Stage, Train, Vote, ref
from launcher import console, runs
from launcher.options import AsJson, Config, Overrides

DEVICES = (8, 12, 16, 24, 40, 48, 80, 96, 141, 192)
"""GiB of common GPUs."""
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
USABLE = 0.9
"""Share of a device that is planned with: the rest is left to the driver, the kernels and fragmentation."""
AUTO_MICRO = 32
WRITES = {
    "train": ("trainable*.safetensors", "learner.safetensors", "train.json"),
    "generate": ("samples.jsonl", "replay.json"),
    "rationalise": ("rationales.jsonl", "rationalise.json"),
    "record": ("recorded.jsonl",),
    "vote": ("critical.json",),
    "choose": ("critical.json",),
    "evaluate": ("scores.json", "predictions/*.jsonl"),
}
Plan = dict[str, Any]


def plan(
    config: Config,
    overrides: Overrides = None,
    device_gib: Annotated[
        list[float] | None, typer.Option(help="memory of a device, for the clusters that would do; may be given often")
    ] = None,
    with_memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="also estimate memory, which imports torch")
    ] = True,
    with_scaling: Annotated[
        bool, typer.Option("--scaling", help="also tell what steps and stages would cost on 8 to 512 GPUs, on paper")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print the stages of a run, what each needs, which are done, and the memory and disk it takes; starts nothing."""
    run = load_run(runs.run_file(config), overrides or [])
    document = planned(run, tuple(device_gib or DEVICES), with_memory)
    if with_scaling and document["memory"] is not None:
        document["scaling"] = list(scaling.step_costs(scaling.work_of(run, document), scaling.Machine()))
        document["stage_seconds"] = list(scaling.stages_on_paper(run, document, scaling.Machine()))
    if as_json:
        console.document(document)
        return
    _show(document)
    if "scaling" in document:
        _show_scaling(document["scaling"])
        _show_stages(document["stage_seconds"])


def planned(config: RunConfig, devices: tuple[float, ...], with_memory: bool = True) -> Plan:
    """Return the plan of a run as plain data."""
    opened = Run(config)
    inputs = PlanInputs.of(opened)
    stages = [stage for task in range(len(opened.tasks)) for stage in opened.plan(task)]
    document: Plan = {"run": config.run.name, "stages": [_stage(inputs, stage) for stage in stages], "memory": None}
    if with_memory and (shape := ModelEstimate.of(inputs)) is not None:
        document |= _sizes(config, inputs, shape, stages, devices)
    baselines = {name: config.baseline(name).science.method.name for name in config.baselines}
    return document | {"baselines": baselines, "untold": list(dict.fromkeys(inputs.assumptions))}


def _stage(inputs: PlanInputs, stage: Stage) -> Plan:
    """Return a stage with what it reads and writes; what data or weights decide is None where they are absent."""
    opened = inputs.run
    rows, fingerprint, is_done = None, None, False
    if not inputs.missing:
        rows = opened.num_rows(stage)
        try:
            fingerprint, is_done = opened.ledger.fingerprint(stage)[:12], opened.ledger.is_done(stage)
        except ConfigError as error:
            inputs.assumptions.append(f"fingerprints: {error}")
    return {
        "stage": opened.ledger.key(ref(stage)),
        "task": opened.tasks.tasks[stage.task].id,
        "kind": stage.kind,
        "rows": rows,
        "inputs": [opened.ledger.key(each) for each in stage.inputs],
        "reads": [*(f"{opened.tasks.tasks[t].id} ({splits})" for t, splits in _rows_of(stage))],
        "writes": list(WRITES[stage.kind]),
        "fingerprint": fingerprint,
        "done": is_done,
    }


def _rows_of(stage: Stage) -> list[tuple[int, str]]:
    """Return the tasks whose rows a stage reads, and of which splits."""
    match stage:
        case Train():
            return [
                *((task, "train, dev") for task in stage.data),
                *((task, "train, replayed") for task in stage.replay),
            ]
        case Evaluate():
            return [(task, "test") for task in stage.tasks]
        case Generate():
            return [(task, "labels") for task in stage.sources]
        case Rationalise() | Record() | Vote() | Choose():
            return [(task, "dev, or train") for task in stage.sources]


def _sizes(
    config: RunConfig, inputs: PlanInputs, shape: ModelEstimate, stages: list[Stage], devices: tuple[float, ...]
) -> Plan:
    """Return memory, disk and clusters."""
    rank, pool = _Rank(config, shape), _pool(config, shape, stages)
    model, cluster = shape.model, config.cluster
    configured_stage = None if cluster.engine == "torch" else cluster.zero_stage
    configured = rank.rows(cluster.workers)
    zero = [
        {"zero_stage": stage, "configured": stage == cluster.zero_stage and cluster.engine == "deepspeed"}
        | rank.exact(cluster.workers, stage).plain()
        for stage in memory.STAGES
        if stage or shape.item == 4
    ]
    if cluster.engine == "torch":
        zero.insert(0, {"zero_stage": None, "configured": True} | rank.exact(1, None).plain())
    trainings = sum(isinstance(stage, Train) and stage.learner is None for stage in stages)
    samples = 0
    if not inputs.missing:
        written = sum(inputs.run.num_rows(stage) for stage in stages if isinstance(stage, Generate))
        samples = 12 * shape.train.max_length * written
    keeps_best = shape.train.keep == "best_dev"
    if any(isinstance(stage, Train) and stage.frozen is not None for stage in stages):
        inputs.assumptions.append(
            f"what a vote freezes: T counts everything; a frozen block takes {shape.traced.block:,} elements off it, "
            "frozen heads stay in the optimizer"
        )
    clusters = [_cluster(rank, pool, size) for size in devices]
    files = memory.disk(
        model,
        learner=shape.traced.ended(),  # no micro-batch can be traced after this
        num_tasks=len(inputs.run.tasks),
        trainings=trainings,
        keeps_best=keeps_best,
        samples=samples,
    )
    return {
        "memory": {
            "workers": cluster.workers,
            "micro_batch": configured,
            "micro_batches": rank.micro_batches(cluster.workers, configured),
            "max_length": shape.train.max_length,
            "slots": _slots(config, shape),
            "labels": shape.traced.labels(configured, shape.train.max_length, shape.answer),
            "bytes_per_element": shape.item,
            "operations": {
                "trained_row": rank.operations(),
                "read_row": shape.traced.scored(1, shape.train.max_length).operations,
            },
            "elements": {
                "P": model.elements,
                "T": model.trained,
                "M": model.largest,
                "parts_of_tasks": model.task_elements,
                "added_by_the_last_task": shape.per_task,
            },
            "ranks": zero,
            "pool": {kind: [memory.plain(each) for each in found] for kind, found in pool.items()},
            "host": [memory.plain(each) for each in memory.host(model, rank.gang(cluster.workers, configured_stage))],
        },
        "disk": [memory.plain(each) for each in files],
        "clusters": clusters,
    }


class _Rank:
    """Estimates of a rank for gangs of any size: exact ones, and near ones between two that were traced."""

    def __init__(self, config: RunConfig, shape: ModelEstimate) -> None:
        self._cluster, self._shape, self._steps = config.cluster, shape, dict[tuple[int, bool], memory.Step]()
        self._batch = shape.train.global_batch
        self._near: dict[tuple[int, int, int], int] = {}

    def rows(self, workers: int) -> int:
        """Return the rows of a micro-batch, as training cuts them."""
        limit = AUTO_MICRO if self._cluster.micro_batch == "auto" else self._cluster.micro_batch
        return min(memory.share(self._batch, workers), limit)

    def micro_batches(self, workers: int, rows: int) -> int:
        """Return how many micro-batches a step has."""
        return memory.share(memory.share(self._batch, workers), rows)

    def exact(self, workers: int, stage: int | None, rows: int | None = None) -> Estimate:
        """Return the estimate for a gang; stage None is plain torch."""
        rows = self.rows(workers) if rows is None else rows
        accumulates = self.micro_batches(workers, rows) > 1
        if (rows, False) not in self._steps:
            self._steps[rows, False] = self._shape.step(rows, accumulates=False)
        step = self._steps[rows, False]
        gang = self.gang(workers, stage)
        return memory.training(self._shape.model, memory.accumulating(step, accumulates), gang)

    def operations(self) -> int:
        """Return the operations of a row of the configured micro-batch, forward and backward."""
        rows = self.rows(self._cluster.workers)
        return self._steps[rows, False].operations // rows

    def gang(self, workers: int, stage: int | None) -> Gang:
        """Return a gang; stage None is plain torch. Offload is only for the stages that know it."""
        cluster, engine = self._cluster, "torch" if stage is None else "deepspeed"
        offload = cluster.offload
        if not stage or (offload == "all" and stage < 3):
            offload = None
        in_files = offload == "all" and cluster.offload_folder is not None
        return Gang(workers, stage or 0, engine, cluster.gpus_per_worker > 0, offload, in_files)

    def near(self, workers: int, stage: int, rows: int) -> int:
        """Return a peak by a straight line between one row and the configured micro-batch, which are traced."""
        most = max(self.rows(self._cluster.workers), 1)
        low, high = (self.exact(workers, stage, each).peak for each in (1, most))
        return low + round((high - low) * (rows - 1) / max(most - 1, 1))

    def choices(self, workers: int) -> list[tuple[int, int]]:
        """Return (ZeRO stage, rows of a micro-batch) that could be set."""
        rows = sorted({self.rows(workers), 1}, reverse=True)
        return [(stage, each) for each in rows for stage in memory.STAGES if stage or self._shape.item == 4]


def _pool(config: RunConfig, shape: ModelEstimate, stages: list[Stage]) -> dict[str, tuple[Quantity, ...]]:
    """Return what an actor holds in each kind of stage that is cut into shards."""
    kinds = {stage.kind for stage in stages if not isinstance(stage, Train)} - {"rationalise"}
    model, science, length = shape.model, config.science, shape.train.max_length
    found: dict[str, tuple[Quantity, ...]] = {}
    decoder = None if shape.traced.decoder is None else memory.Decoder(*shape.traced.decoder)
    for kind in sorted(kinds):
        rows = science.evaluate.batch if kind in ("evaluate", "choose") else 1
        working: list[Quantity] = []
        if kind == "generate" and decoder is not None:
            working = list(memory.generating(decoder, _slots(config, shape), length, shape.item))
        else:
            size, formula = (
                shape.traced.scored(rows, length).peak,
                "rows * max_length tokens; traced, without gradients",
            )
            if kind == "record" and _finds_rationales(stages):
                back = shape.traced.marked(length, shape.answer)
                size, formula = max(size, back), f"{formula}, and with those of the embeddings, before"
            working.append(Quantity("forward pass", size, formula))
            if kind in ("record", "vote") and decoder is not None:
                working.append(memory.voting(decoder, length, shape.item))
            elif decoder is not None:
                working += memory.generating(decoder, rows, length + shape.answer, shape.item)
        devices = config.cluster.workers_per_model if config.cluster.gpus_per_worker else 1
        found[kind] = memory.pooled(model, working, devices)
    return found


def _finds_rationales(stages: list[Stage]) -> bool:
    return any(isinstance(stage, Record) and stage.vote.rationales == "gradient" for stage in stages)


def _slots(config: RunConfig, shape: ModelEstimate) -> int:
    """Return how many samples are written side by side; 0 where nothing writes."""
    if shape.traced.decoder is None:
        return 0
    decoder, generate = memory.Decoder(*shape.traced.decoder), config.science.generate
    return memory.rows_within(
        decoder, generate.parallel_samples, shape.train.max_length, shape.item, generate.kv_cache_gb
    )


def _cluster(rank: _Rank, pool: dict[str, tuple[Quantity, ...]], gib: float) -> Plan:
    """Return the smallest gang of devices of a size that trains the run, and the kinds of stage that have no room."""
    room = int(USABLE * gib * GIB)
    found: Plan = {"device_gib": gib, "workers": None}
    found["too_small_for"] = [kind for kind, parts in pool.items() if sum(each.bytes for each in parts) > room]
    for workers in WORKERS:
        for stage, rows in sorted(rank.choices(workers), key=lambda choice: (choice[0], -choice[1])):
            peak = rank.near(workers, stage, rows)
            if peak <= room:
                return found | {"workers": workers, "zero_stage": stage, "micro_batch": rows, "peak_bytes": peak}
    return found


def _size(size: int) -> str:
    """Return a size in words."""
    unit, name = next((each for each in ((GIB, "GiB"), (2**20, "MiB")) if size >= each[0]), (2**10, "KiB"))
    return f"{size / unit:,.1f} {name}"


def _show(document: Plan) -> None:
    table = Table("stage", "kind", "rows", "after", "reads", "fingerprint", "state", title=f"plan of {document['run']}")
    for line in document["stages"]:
        state = "done" if line["done"] else "to do"
        after = ", ".join(line["inputs"]) or "backbone"
        rows = "?" if line["rows"] is None else str(line["rows"])
        table.add_row(
            line["stage"], line["kind"], rows, after, "; ".join(line["reads"]), line["fingerprint"] or "?", state
        )
    console.out.print(table)
    if document["memory"] is not None:
        _show_memory(document)
    for name, method in document["baselines"].items():
        console.out.print(f"then baseline {name}: {method} on the same tasks", soft_wrap=True)
    for reason in document["untold"]:
        console.out.print(f"not told: {reason}", soft_wrap=True)


def _show_memory(document: Plan) -> None:
    found = document["memory"]
    elements = found["elements"]
    console.out.print(
        f"model of the last task: {elements['P'] / 1e6:,.1f} M parameters, {elements['T'] / 1e6:,.1f} M trained; "
        f"{elements['parts_of_tasks'] / 1e6:,.2f} M belong to tasks, "
        f"{elements['added_by_the_last_task'] / 1e6:,.2f} M to the last",
        soft_wrap=True,
    )
    columns = [_stage_name(each) for each in found["ranks"]]
    rows = f"{found['micro_batches']} x {found['micro_batch']} rows of {found['max_length']} tokens"
    table = Table("", *columns, title=f"a rank of {found['workers']} while it trains, {rows} a step")
    kinds = dict.fromkeys(each["kind"] for rank in found["ranks"] for each in rank["resident"])
    for kind in kinds:
        table.add_row(kind, *(_cell(rank["resident"], kind) for rank in found["ranks"]))
    for kind in dict.fromkeys(each["kind"] for rank in found["ranks"] for each in rank["activations"]):
        table.add_row(f"({kind})", *(_cell(rank["activations"], kind) for rank in found["ranks"]))
    for kind in dict.fromkeys(each["kind"] for rank in found["ranks"] for each in rank["moments"]):
        table.add_row(f"+ {kind}", *(_cell(rank["moments"], kind) for rank in found["ranks"]))
    table.add_section()
    table.add_row("peak", *(_size(rank["peak_bytes"]) for rank in found["ranks"]))
    console.out.print(table)
    console.out.print(
        "Of the moments (+) the highest counts; the activations (in brackets) are part of them.", soft_wrap=True
    )
    for kind, parts in found["pool"].items():
        total = sum(each["bytes"] for each in parts)
        listed = ", ".join(f"{each['kind']} {_size(each['bytes'])}" for each in parts)
        console.out.print(f"{kind}: {_size(total)} on each worker ({listed})", soft_wrap=True)
    for each in (*found["host"], *document["disk"]):
        console.out.print(f"{each['kind']}: {_size(each['bytes'])}", soft_wrap=True)
    for each in document["clusters"]:
        console.out.print(_cluster_line(each), soft_wrap=True)


def _show_scaling(lines: list[Plan]) -> None:
    columns = ("GPUs", "rows a rank", "compute s", "GiB moved", "links s", "step s", "tokens/s", "of 8 GPUs' rate", "")
    table = Table(*columns, title=f"a step on paper: {scaling.Machine().name}")
    for line in lines:
        numbers = (line["compute_s"], line["moved_bytes"] / GIB, line["link_s"], line["step_s"])
        rate = (f"{line['tokens_per_s']:,.0f}", f"{line['share_of_first']:.0%}")
        table.add_row(str(line["ranks"]), str(line["rows"]), *(f"{n:.3g}" for n in numbers), *rate, line["note"])
    console.out.print(table)


def _show_stages(lines: list[Plan]) -> None:
    """Show the seconds of stages; what is not told is "-"."""
    table = Table("stage", "rows", *map(str, scaling.RANKS), title="seconds of a stage on paper, by GPUs")
    for line in lines:
        table.add_row(line["stage"], "?" if line["rows"] is None else str(line["rows"]), *scaling.cells(line))
    console.out.print(table)


def _cluster_line(found: Plan) -> str:
    """Return a line about a size of device."""
    line = f"devices of {found['device_gib']:g} GiB: "
    if found["workers"] is None:
        return f"{line}too small for {WORKERS[-1]} workers under ZeRO-3"
    line += f"{found['workers']} worker(s), ZeRO-{found['zero_stage']}, micro_batch: {found['micro_batch']}"
    line += f" ({_size(found['peak_bytes'])})"
    if found["too_small_for"]:
        small = ", ".join(found["too_small_for"])
        line += f"; too small for {small}, where a worker holds the whole model (see cluster.workers_per_model)"
    return line


def _stage_name(rank: Plan) -> str:
    name = "torch" if rank["zero_stage"] is None else f"ZeRO-{rank['zero_stage']}"
    return f"{name} *" if rank["configured"] else name


def _cell(parts: list[Plan], kind: str) -> str:
    size = next((each["bytes"] for each in parts if each["kind"] == kind), None)
    return "" if size is None else _size(size)
