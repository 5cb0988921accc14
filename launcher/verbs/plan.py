"""The verb `plan`: tables of a run's plan."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Annotated

import typer
from rich.table import Table

from cl_dist.planning import scaling
from cl_dist.planning.memory import GIB, Quantity
from cl_dist.planning.plan import DevicePlan, MemoryPlan, Plan, RankPlan
from cl_dist.planning.planner import DEVICES, WORKERS, planned, with_scaling
from launcher import console, runs
from launcher.options import AsJson, Config, Overrides


def plan(
    config: Config,
    overrides: Overrides = None,
    device_gib: Annotated[
        list[float] | None, typer.Option(help="Memory of a GPU, to find a cluster that fits; repeatable.")
    ] = None,
    with_memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="Also estimate memory, which imports torch.")
    ] = True,
    on_many_gpus: Annotated[
        bool, typer.Option("--scaling", help="Also estimate the cost of steps and stages on 8 to 512 GPUs.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List a run's stages, and estimate its memory and disk space. Starts and writes nothing."""
    run = runs.read(config, overrides)
    found = planned(run, tuple(device_gib or DEVICES), with_memory)
    if on_many_gpus:
        found = with_scaling(found, run)
    if as_json:
        console.document(found.document())
        return
    _show(found)


def _show(found: Plan) -> None:
    table = Table("stage", "kind", "rows", "after", "reads", "fingerprint", "state", title=f"plan of {found.run}")
    for line in found.stages:
        after, rows = ", ".join(line.inputs) or "backbone", "?" if line.rows is None else str(line.rows)
        state = "done" if line.done else "to do"
        table.add_row(line.stage, line.kind, rows, after, "; ".join(line.reads), line.fingerprint or "?", state)
    console.out.print(table)
    if found.memory is not None:
        _show_memory(found, found.memory)
    for name, method in found.baselines.items():
        console.out.print(f"then baseline {name}: {method} on the same tasks", soft_wrap=True)
    for reason in found.assumptions:
        console.out.print(f"assumed: {reason}", soft_wrap=True)
    for hint in found.hints:
        console.out.print(f"hint: {hint}", soft_wrap=True)
    if found.step_costs is not None:
        _show_scaling(found.step_costs)
    if found.stage_costs is not None:
        _show_stages(found.stage_costs)


def _show_memory(plan: Plan, found: MemoryPlan) -> None:
    elements = found.elements
    console.out.print(
        f"model of the last task: {elements.total / 1e6:,.1f} M parameters, {elements.trained / 1e6:,.1f} M trained; "
        f"{elements.parts_of_tasks / 1e6:,.2f} M belong to tasks, "
        f"{elements.added_by_the_last_task / 1e6:,.2f} M to the last",
        soft_wrap=True,
    )
    columns = [_stage_name(each) for each in found.ranks]
    rows = f"{found.micro_batches} x {found.micro_batch} rows of {found.max_length} tokens"
    table = Table("", *columns, title=f"memory of each of {found.workers} training rank(s), {rows} a step")
    estimates = [rank.estimate for rank in found.ranks]
    for kind in _kinds(each.resident for each in estimates):
        table.add_row(kind, *(_cell(each.resident, kind) for each in estimates))
    for kind in dict.fromkeys(kind for each in estimates for kind in each.activations):
        sizes = (each.activations.get(kind) for each in estimates)
        table.add_row(f"({kind})", *("" if size is None else _size(size) for size in sizes))
    for kind in _kinds(each.moments for each in estimates):
        table.add_row(f"+ {kind}", *(_cell(each.moments, kind) for each in estimates))
    table.add_section()
    table.add_row("peak", *(_size(each.peak) for each in estimates))
    console.out.print(table)
    console.out.print(
        "The peak counts the largest (+) row. Activations (in brackets) are part of the (+) rows.", soft_wrap=True
    )
    for kind, parts in found.pool.items():
        total = sum(each.bytes for each in parts)
        listed = ", ".join(f"{each.kind} {_size(each.bytes)}" for each in parts)
        console.out.print(f"{kind}: {_size(total)} on each worker ({listed})", soft_wrap=True)
    for quantity in (*found.host, *plan.disk):
        if quantity.bytes:
            console.out.print(f"{quantity.kind}: {_size(quantity.bytes)}", soft_wrap=True)
    for line, devices in groupby(plan.clusters, _device_line):
        first, *_, last = [f"{device.device_gib:g}" for device in devices] * 2
        span = first if first == last else f"{first} to {last}"
        console.out.print(f"devices of {span} GiB: {line}", soft_wrap=True)


def _show_scaling(costs: Sequence[scaling.StepCost]) -> None:
    columns = ("GPUs", "rows a rank", "compute s", "GiB moved", "links s", "step s", "tokens/s", "of 8 GPUs' rate", "")
    table = Table(*columns, title=f"estimated cost of a step: {scaling.Machine().name}")
    for cost in costs:
        numbers = (cost.compute_s, cost.moved_bytes / GIB, cost.link_s, cost.step_s)
        rate = (f"{cost.tokens_per_s:,.0f}", f"{cost.share_of_first:.0%}")
        table.add_row(str(cost.ranks), str(cost.rows), *(f"{n:.3g}" for n in numbers), *rate, cost.note)
    console.out.print(table)


def _show_stages(costs: Sequence[scaling.StageCost]) -> None:
    table = Table("stage", "rows", *map(str, scaling.RANKS), title="estimated seconds of a stage, by GPUs")
    for cost in costs:
        table.add_row(cost.stage, "?" if cost.rows is None else str(cost.rows), *scaling.cells(cost.seconds))
    console.out.print(table)


def _device_line(found: DevicePlan) -> str:
    """Return what a size of device is good for."""
    if found.fit is None:
        return f"too small for {WORKERS[-1]} workers under ZeRO-3"
    line = f"{found.fit.workers} worker(s), ZeRO-{found.fit.zero_stage}, micro_batch: {found.fit.micro_batch}"
    line += f" ({_size(found.fit.peak_bytes)})"
    if found.too_small_for:
        small = ", ".join(found.too_small_for)
        line += f"; too small for {small}, where a worker holds the whole model (see cluster.workers_per_model)"
    return line


def _stage_name(rank: RankPlan) -> str:
    name = "torch" if rank.zero_stage is None else f"ZeRO-{rank.zero_stage}"
    return f"{name} *" if rank.configured else name


def _kinds(quantities: Iterable[Sequence[Quantity]]) -> list[str]:
    return list(dict.fromkeys(each.kind for parts in quantities for each in parts))


def _cell(parts: Sequence[Quantity], kind: str) -> str:
    size = next((each.bytes for each in parts if each.kind == kind), None)
    return "" if size is None else _size(size)


def _size(size: int) -> str:
    """Return a size in GiB, MiB or KiB."""
    unit, name = next((each for each in ((GIB, "GiB"), (2**20, "MiB")) if size >= each[0]), (2**10, "KiB"))
    return f"{size / unit:,.1f} {name}"
