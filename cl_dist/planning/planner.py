"""The planner: computes a run's plan from its run file, its data and the backbone's config.json. Starts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cl_dist.checks import step_hints
from cl_dist.errors import ConfigError
from cl_dist.kinds import KINDS, kind_of, trainings
from cl_dist.planning import memory, scaling
from cl_dist.planning.inputs import ModelEstimate, PlanInputs
from cl_dist.planning.memory import GIB, Estimate, Gang, Quantity
from cl_dist.planning.plan import DevicePlan, Elements, Fit, MemoryPlan, Plan, RankPlan, StagePlan
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import Stage, ref

DEVICES = (8, 12, 16, 24, 40, 48, 80, 96, 141, 192)
"""GiB of common GPUs."""
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
USABLE = 0.9
"""Share of a device's memory that a plan uses: the rest is for the driver, the kernels and fragmentation."""
AUTO_MICRO = 32


def planned(config: RunConfig, devices: Sequence[float] = DEVICES, with_memory: bool = True) -> Plan:
    """Return the plan of a run.

    Args:
        config: The run.
        devices: Memory sizes in GiB; for each the plan has the smallest gang that fits.
        with_memory: Also estimate memory, disk space and gangs; this imports torch.

    Raises:
        ConfigError: If the backbone's folder has no config.json.
        DataError: With the faults of all data files that exist.
    """
    opened = Run(config)
    inputs = PlanInputs.of(opened)
    stages = list(opened.stages())
    lines = tuple(_stage(inputs, stage) for stage in stages)
    shape = ModelEstimate.of(inputs) if with_memory else None
    sizes = None if shape is None else _sizes(config, inputs, shape, stages, devices)
    return Plan(
        run=config.run.name,
        stages=lines,
        memory=None if sizes is None else sizes[0],
        disk=() if sizes is None else sizes[1],
        clusters=() if sizes is None else sizes[2],
        baselines={name: config.baseline(name).science.method.name for name in config.baselines},
        assumptions=tuple(dict.fromkeys(inputs.assumptions)),
        hints=() if inputs.missing else tuple(map(str, step_hints(opened))),
    )


def with_scaling(plan: Plan, config: RunConfig, machine: scaling.Machine | None = None) -> Plan:
    """Return a plan with the costs of steps and stages on 8 to 512 GPUs; unchanged where it has no memory estimate."""
    if plan.memory is None:
        return plan
    work, machine = work_of(config, plan), machine or scaling.Machine()
    costs = scaling.stage_costs(config, [stage.rows for stage in plan.stages], work, machine)
    return replace(plan, step_costs=tuple(scaling.step_costs(work, machine)), stage_costs=tuple(costs))


def work_of(config: RunConfig, plan: Plan) -> scaling.Work:
    """Return the work of an optimizer step and of a forward pass.

    Raises:
        ConfigError: If the plan has no memory estimate.
    """
    found, science, cluster = plan.memory, config.science, config.cluster
    if found is None:
        raise ConfigError(f"plan of {plan.run}: no estimate of steps without the sizes of the model")
    settings = [science.train_of(task) for task in science.sequence().tasks]
    return scaling.Work(
        elements=found.elements.total,
        trained=found.elements.trained,
        item=found.bytes_per_element,
        global_batch=max(train.global_batch for train in settings),
        tokens=found.max_length,
        zero_stage=cluster.zero_stage,
        most_rows=found.micro_batch,
        operations=found.trained_row_operations,
        read_operations=found.read_row_operations,
        answer=found.labels.get("qa", found.micro_batch) // found.micro_batch,
        parallel_samples=found.parallel_samples,
        workers_per_model=cluster.workers_per_model if cluster.gpus_per_worker else 1,
    )


def _stage(inputs: PlanInputs, stage: Stage) -> StagePlan:
    """Return the plan of a stage."""
    opened = inputs.run
    rows, fingerprint, is_done = None, None, False
    if not inputs.missing:
        rows = opened.num_rows(stage)
        try:
            fingerprint, is_done = opened.ledger.fingerprint(stage)[:12], opened.ledger.is_done(stage)
        except ConfigError as error:
            inputs.assumptions.append(f"fingerprints: {error}")
    return StagePlan(
        stage=opened.ledger.key(ref(stage)),
        task=opened.tasks.tasks[stage.task].id,
        kind=stage.kind,
        rows=rows,
        inputs=tuple(opened.ledger.key(each) for each in stage.inputs),
        reads=tuple(f"{opened.tasks.tasks[t].id} ({splits})" for t, splits in kind_of(stage).reads(stage)),
        writes=kind_of(stage).writes,
        fingerprint=fingerprint,
        done=is_done,
    )


def _sizes(
    config: RunConfig, inputs: PlanInputs, shape: ModelEstimate, stages: list[Stage], devices: Sequence[float]
) -> tuple[MemoryPlan, tuple[Quantity, ...], tuple[DevicePlan, ...]]:
    """Return memory, disk space, and the gangs that fit on devices."""
    rank, pool = _Rank(config, shape), _pool(config, shape, stages)
    model, cluster = shape.model, config.cluster
    configured_stage = None if cluster.engine == "torch" else cluster.zero_stage
    configured = rank.rows(cluster.workers)
    ranks = [
        RankPlan(
            stage, stage == cluster.zero_stage and cluster.engine == "deepspeed", rank.exact(cluster.workers, stage)
        )
        for stage in memory.STAGES
        if stage or shape.item == 4
    ]
    if cluster.engine == "torch":
        ranks.insert(0, RankPlan(None, True, rank.exact(1, None)))
    samples = 0
    if not inputs.missing:
        written = sum(inputs.run.num_rows(stage) for stage in stages if kind_of(stage).memory == "generation")
        samples = 12 * shape.train.max_length * written
    keeps_best = shape.train.keep == "best_dev"
    if any(stage.frozen is not None for stage in trainings(stages)):
        inputs.assumptions.append(
            f"the result of votes: T counts all parameters; a frozen block removes {shape.traced.block:,} elements "
            "from it, frozen heads stay in the optimizer"
        )
    clusters = tuple(_device(rank, pool, size) for size in devices)
    files = memory.disk(
        model,
        learner=shape.traced.ended(),  # no micro-batch can be traced after this
        num_tasks=len(inputs.run.tasks),
        trainings=len(trainings(stages)),
        keeps_best=keeps_best,
        samples=samples,
    )
    found = MemoryPlan(
        workers=cluster.workers,
        micro_batch=configured,
        micro_batches=rank.micro_batches(cluster.workers, configured),
        max_length=shape.train.max_length,
        parallel_samples=_parallel_samples(config, shape),
        labels=shape.traced.labels(configured, shape.train.max_length, shape.answer),
        bytes_per_element=shape.item,
        trained_row_operations=rank.operations(),
        read_row_operations=shape.traced.scored(1, shape.train.max_length).operations,
        elements=Elements(
            total=model.elements,
            trained=model.trained,
            largest_module=model.largest,
            parts_of_tasks=model.task_elements,
            added_by_the_last_task=shape.per_task,
        ),
        ranks=tuple(ranks),
        pool=pool,
        host=memory.host(model, rank.gang(cluster.workers, configured_stage)),
    )
    return found, files, clusters


class _Rank:
    """Estimates of a rank for gangs of any size: traced ones, and interpolated ones between two that were traced."""

    def __init__(self, config: RunConfig, shape: ModelEstimate) -> None:
        self._cluster, self._shape, self._steps = config.cluster, shape, dict[tuple[int, bool], memory.Step]()
        self._batch = shape.train.global_batch

    def rows(self, workers: int) -> int:
        """Return the rows of a micro-batch, as training divides them."""
        limit = AUTO_MICRO if self._cluster.micro_batch == "auto" else self._cluster.micro_batch
        return min(memory.share(self._batch, workers), limit)

    def micro_batches(self, workers: int, rows: int) -> int:
        """Return the number of micro-batches of a step."""
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
        """Return a gang; stage None is plain torch. Only ZeRO stages that support offload have it."""
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
        """Return the (ZeRO stage, rows of a micro-batch) that a run file could set."""
        rows = sorted({self.rows(workers), 1}, reverse=True)
        return [(stage, each) for each in rows for stage in memory.STAGES if stage or self._shape.item == 4]


def _pool(config: RunConfig, shape: ModelEstimate, stages: list[Stage]) -> dict[str, tuple[Quantity, ...]]:
    """Return the memory of an actor in each kind of stage that is divided into shards."""
    model, science, length = shape.model, config.science, shape.train.max_length
    found: dict[str, tuple[Quantity, ...]] = {}
    decoder = None if shape.traced.decoder is None else memory.Decoder(*shape.traced.decoder)
    for kind, of_kind in sorted((name, [s for s in stages if s.kind == name]) for name in {s.kind for s in stages}):
        needs = KINDS[kind].memory
        if needs is None:
            continue
        rows = science.evaluate.batch if needs == "forward" else 1
        working: list[Quantity] = []
        if needs == "generation" and decoder is not None:
            working = list(memory.generating(decoder, _parallel_samples(config, shape), length, shape.item))
        else:
            size, formula = (
                shape.traced.scored(rows, length).peak,
                "rows * max_length tokens; traced, without gradients",
            )
            if any(KINDS[kind].backward(stage) for stage in of_kind):
                back = shape.traced.marked(length, shape.answer)
                size, formula = max(size, back), f"{formula}, and with those of the embeddings, before"
            working.append(Quantity("forward pass", size, formula))
            if needs == "attention" and decoder is not None:
                working.append(memory.voting(decoder, length, shape.item))
            elif decoder is not None:
                working += memory.generating(decoder, rows, length + shape.answer, shape.item)
        devices = config.cluster.workers_per_model if config.cluster.gpus_per_worker else 1
        found[kind] = memory.pooled(model, working, devices)
    return found


def _parallel_samples(config: RunConfig, shape: ModelEstimate) -> int:
    """Return the number of samples that an actor generates at the same time; 0 where the run generates none."""
    if shape.traced.decoder is None:
        return 0
    decoder, generate = memory.Decoder(*shape.traced.decoder), config.science.generate
    return memory.rows_within(
        decoder, generate.parallel_samples, shape.train.max_length, shape.item, generate.kv_cache_gb
    )


def _device(rank: _Rank, pool: Mapping[str, tuple[Quantity, ...]], gib: float) -> DevicePlan:
    """Return the smallest gang of devices of a size that trains the run, and the kinds of stage that do not fit."""
    room = int(USABLE * gib * GIB)
    too_small_for = tuple(kind for kind, parts in pool.items() if sum(each.bytes for each in parts) > room)
    for workers in WORKERS:
        for stage, rows in sorted(rank.choices(workers), key=lambda choice: (choice[0], -choice[1])):
            peak = rank.near(workers, stage, rows)
            if peak <= room:
                return DevicePlan(gib, too_small_for, Fit(workers, stage, rows, peak))
    return DevicePlan(gib, too_small_for, None)
