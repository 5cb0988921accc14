"""Worker side of a Train stage: the loop that every method shares, run in lock-step by all ranks of a gang."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cl_dist.data.language import LanguageRows
from cl_dist.data.sampler import num_steps, sample
from cl_dist.data.samples import read_samples
from cl_dist.data.votes import read_critical
from cl_dist.errors import StoppedError
from cl_dist.learners.base import Learner, Rows
from cl_dist.methods import capabilities_of
from cl_dist.models.backbone import load_tokenizer, recompute_activations
from cl_dist.models.classifier import count_parameters
from cl_dist.parallel.engine import Engine, Optimizing, build_engine
from cl_dist.parallel.gradients import GradientTransform, Penalty
from cl_dist.parallel.guard import Guard
from cl_dist.parallel.profile import StepProfiler
from cl_dist.parallel.seeds import seeded
from cl_dist.parallel.world import World
from cl_dist.parallel.zero3_init import partitions
from cl_dist.stage import Train
from cl_dist.stages import checkpoint
from cl_dist.stages.build import LEARNER, build_learner
from cl_dist.stages.loss_sums import LossSums, mean_terms
from cl_dist.stages.prefetch import MicroBatch, Prefetch, Split, micro_batches
from cl_dist.stages.save_policy import SavePolicy
from cl_dist.stages.schedule import Schedule
from cl_dist.stages.score_dev import score_dev
from cl_dist.stages.stage_job import Job, SaveRequest, replayed_rows, row_length, task_data
from cl_dist.stages.telemetry import Telemetry, check_finite
from cl_dist.stages.weights import LocalShards, ShardedWeights

log = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]
FACTS = "train.json"


def run(
    job: Job,
    out: Path,
    report: Report,
    poll_request: Callable[[], SaveRequest] = lambda: "",
    heartbeat: Callable[[int], None] = lambda step: None,
) -> None:
    """Train the stage's model; rank 0 writes its weights, learner state and summary to out.

    report receives progress events, on rank 0 only; heartbeat receives the number of finished steps, on every rank,
    before each step and after the last. Every rank of the gang must call this with the same job. Resumes from a
    checkpoint found below out, whatever the number of ranks and the ZeRO stage that wrote it.

    Raises:
        StoppedError: If poll_request, which rank 0 calls about once a second, returns "stop"; the stage is saved by
            then.
    """
    stage, world, entered = job.stage, World.current(), time.monotonic()
    assert isinstance(stage, Train)
    if world.rank:
        report = _ignore

    report({"event": "phase", "doing": "loading the model"})
    learner = build_learner(job, partitioned=partitions(job.engine, world))
    rows, dev = _rows(job, stage, learner)
    saved = checkpoint.latest(out, world)
    learner.source = _nearest(job, learner, rows, world) if saved is None else saved.source
    prepare_learner(job, learner)
    # both from the weights that the stage starts with
    transforms, penalties = learner.gradient_transforms(), learner.penalties()
    if saved is not None:
        saved.load_weights(learner.model, world.rank)

    steps_per_epoch = num_steps(len(rows), job.train.global_batch)
    schedule = Schedule(job.train.epochs * steps_per_epoch, steps_per_epoch, job.train.min_round_steps)
    split = Split.of(job, world)

    engine = _engine(job, learner, transforms, penalties, schedule, split)
    if saved is not None:
        saved.load_moments(engine)
    guard = Guard(engine, transforms) if job.engine.verify_protection_every else None
    loop = _Loop(job, learner, engine, schedule, split, rows, dev, entered)
    loop.resume(saved)
    if saved is not None:
        report({"event": "continued", "step": saved.step, "total_steps": schedule.total_steps})
    parameters = dict(zip(("trainable", "total"), count_parameters(engine.module), strict=True))
    log.info("train start task=%d rows=%d steps=%d %s", stage.task, len(rows), schedule.total_steps, parameters)

    with closing(engine):
        perf = {"perf/startup_s": time.monotonic() - entered}
        _optimize(loop, out, guard, report, poll_request, heartbeat)
        perf |= loop.speed()
        loop.selected_weights().write(out, world.rank)
        world.gather(None)  # every rank has written its part before any rank reads

    learner = consolidate(job, learner, rows, ShardedWeights(out), world)
    if world.rank == 0:
        if state := learner.state_dict():
            save_file({name: value.cpu().contiguous() for name, value in state.items()}, out / LEARNER)
        summary = train_summary(loop.rounds, learner) | {"parameters": parameters}
        summary["metrics"] |= perf | {"perf/stage_s": loop.seconds()}
        (out / FACTS).write_text(json.dumps(summary, indent=1), encoding="utf8")


def _optimize(
    loop: "_Loop",
    out: Path,
    guard: Guard | None,
    report: Report,
    poll_request: Callable[[], SaveRequest],
    heartbeat: Callable[[int], None],
) -> None:
    """Run the optimizer steps that are left: step, check, report, end a round, save, stop.

    Raises:
        StoppedError: If a stop is requested; the stage is saved by then.
    """
    job, engine, total = loop.job, loop.engine, loop.schedule.total_steps
    left = range(loop.done, total)
    telemetry = Telemetry(job.log_every, total, job.train.lr, engine, report)
    trace = Path(job.profiles) / f"{job.key.replace('/', '-')}-rank{engine.world.rank}.json.gz"
    source = micro_batches(job, loop.rows, left, engine.world, loop.split)
    with (
        closing(checkpoint.Writer(out, engine)) as writer,
        closing(Prefetch(source, engine.world.device)) as batches,
        closing(StepProfiler(job.engine.profile, trace, left, report)) as profiler,
    ):
        policy = SavePolicy(job.engine, engine.world, poll_request, loop.done, writer)
        for step in left:
            done = step + 1
            heartbeat(step)
            with profiler.step(step):
                loop.step(step, batches, telemetry)
            due = policy.due(done) if done < total else ""
            if guard is not None and (due or done % job.engine.verify_protection_every == 0):
                guard.check(done)  # also before weights that have moved would be saved
            report({"event": "step", "step": done, "total_steps": total})
            if loop.schedule.ends_round(step):
                report({"event": "round", "total_steps": total, **loop.end_round(step)})
            if due:
                writer.save(loop.state(done), loop.best, wait=due == "stop" or not job.engine.checkpoint_async)
            if due == "stop":
                report({"event": "saved", "step": done, "total_steps": total})
                raise StoppedError(f"stopped after step {done} of {total}, which is saved")
        heartbeat(total)


@dataclass
class _Loop:
    """The optimizer steps of a stage, and what is summed up over them."""

    job: Job
    learner: Learner
    engine: Engine
    schedule: Schedule
    split: Split
    rows: Rows
    dev: Mapping[int, Rows]
    began: float
    """When the stage began, on the monotonic clock; earlier attempts count."""
    best: checkpoint.Best | None = None
    rounds: list[dict[str, float]] = field(default_factory=list)
    done: int = 0
    """Optimizer steps that earlier attempts have finished."""
    _sums: LossSums = field(default_factory=LossSums)
    _tokens: int = 0
    _steps: int = 0
    _step_seconds: float = 0.0

    def resume(self, saved: checkpoint.Checkpoint | None) -> None:
        """Take over the sums of an earlier attempt."""
        if saved is not None:
            self.best, self.rounds, self.done = saved.best, saved.rounds, saved.step
            self.began -= saved.seconds
            self._sums.put(saved.sums, self.engine.world)

    def state(self, done: int) -> dict[str, Any]:
        """Return the state of the loop for a checkpoint after `done` steps, as plain data. A collective."""
        sums = self._sums.totals(self.engine.world)
        check_finite({name: value for part in sums.values() for name, value in part.items()}, done)
        state = {"step": done, "rounds": self.rounds, "sums": sums, "seconds": self.seconds()}
        return state if self.learner.source is None else state | {"source": self.learner.source}

    def step(self, step: int, batches: Iterator[MicroBatch], telemetry: Telemetry) -> None:
        """Run one optimizer step: forward and backward of each micro-batch, then the update."""
        began = time.monotonic()
        engine, world, num_micro = self.engine, self.engine.world, self.split.num_micro
        progress = self.schedule.at(step)
        engine.module.train()
        with seeded(self.job.seed, "step", step, world.rank):  # dropout is the only draw that differs between ranks
            for _ in range(num_micro):
                micro = next(batches)
                assert micro.step == step
                batch = micro.on(world.device)
                with engine.reads_only_forward():
                    loss = self.learner.loss(engine, batch, progress)
                terms = {
                    name: (term * batch["weight"]).sum() / micro.normalizers.get(name, micro.examples)
                    for name, term in loss.per_example.items()
                }
                engine.backward(_total(terms, world), _total(loss.regularizers, world))
                engine.step()
                regularizers = {name: term / num_micro for name, term in loss.regularizers.items()}
                self._sums.add(terms, regularizers)
                telemetry.add(terms, regularizers)
        telemetry.end_step(step + 1, micro.examples, micro.tokens)
        self._tokens, self._steps = self._tokens + micro.tokens, self._steps + 1
        self._step_seconds += time.monotonic() - began

    def end_round(self, step: int) -> dict[str, float]:
        """Return the round's means, and keep the weights if they are the best so far. A collective."""
        engine = self.engine
        means = mean_terms(self._sums.totals(engine.world), self.schedule.at(step).round_steps)
        self._sums.clear()
        means |= {"train/grad_norm": engine.grad_norm(), "step": step + 1}
        if self.job.train.keep == "best_dev" and any(len(rows) for rows in self.dev.values()):
            means |= score_dev(engine, self.learner, self.dev, self.job.evaluate.batch)
            if self.best is None or means["dev/loss"] < self.best.loss:
                self.best = checkpoint.Best(means["dev/loss"], LocalShards(engine))
        check_finite(means, step + 1)
        self.rounds.append(means)
        return means

    def selected_weights(self) -> checkpoint.Best:
        """Return the weights of the best round, or the present ones if none is selected."""
        return checkpoint.Best(0.0, LocalShards(self.engine)) if self.best is None else self.best

    def seconds(self) -> float:
        """Return the seconds since the stage began, over all attempts."""
        return time.monotonic() - self.began

    def speed(self) -> dict[str, float]:
        """Return seconds per step of this attempt, and tokens per second over all ranks, without padding."""
        seconds = self._step_seconds
        return {"perf/step_s": seconds / self._steps, "perf/tokens_per_s": self._tokens / seconds}


def _nearest(job: Job, learner: Learner, rows: Rows, world: World) -> int | None:
    """Return the earlier task that the stage's task starts from, if the method looks for one. A collective."""
    task = job.stage.task
    count = capabilities_of(job.method, job.model).start_rows
    if not count or not task:
        return None
    found: int | None = None
    if world.rank == 0:
        learner.model.to(world.device)
        chosen = sample(job.seed, job.tasks[task].id, len(rows), count)
        size = job.evaluate.batch
        batches = [chosen[first : first + size] for first in range(0, len(chosen), size)]
        found = learner.nearest(rows.batch(numbers, world.device) for numbers in batches)
    return world.gather(found)[0]


def prepare_learner(job: Job, learner: Learner) -> None:
    """Choose which parameters the stage trains, after the earlier weights are loaded."""
    assert isinstance(job.stage, Train)
    learner.start_task(job.stage.task, (*job.stage.data, *job.stage.replay))
    units = list(job.stage.frozen_units)
    if job.stage.frozen is not None:
        units += [(layer, unit) for layer, unit in read_critical(job.folder(job.stage.frozen))["chosen"]]
    if units:
        learner.freeze(units)


def _rows(job: Job, stage: Train, learner: Learner) -> tuple[Rows, dict[int, Rows]]:
    """Return the rows to train on, replayed ones last, and the dev rows of each task."""
    tokenizer = load_tokenizer(job.model)
    longest = max(row_length(job, task) for task in (stage.task, *stage.data, *stage.replay))
    rows = learner.rows(tokenizer, longest, training=True)
    dev = {task: learner.rows(tokenizer, row_length(job, task), training=False) for task in stage.data}
    for task in stage.data:
        data = task_data(job, task)
        rows.add(task, data, data.train, max_length=row_length(job, task))
        dev[task].add(task, data, data.dev)
    for task in stage.replay:
        data = task_data(job, task)
        chosen = sample(job.seed, data.id, len(data.train), replayed_rows(job))
        chosen_rows = [data.train[number] for number in chosen]
        rows.add(task, data, chosen_rows, replayed=True, max_length=row_length(job, task))
    if stage.samples is not None:
        assert isinstance(rows, LanguageRows)  # the stage that wrote them was planned by a method on decoders
        for found in read_samples(job.folder(stage.samples)):
            rows.add_tokens(found.source, found.prefix, found.answer)
    return rows, dev


def _engine(
    job: Job,
    learner: Learner,
    transforms: Mapping[str, GradientTransform],
    penalties: Mapping[str, Penalty],
    schedule: Schedule,
    split: Split,
) -> Engine:
    """Put the learner's model under an engine."""
    config = job.train
    if job.engine.activation_checkpointing:
        recompute_activations(learner.model)
    optimizing = Optimizing(
        lr=config.lr,
        lr_of=learner.learning_rates(),
        # AdamW decays a weight even where its gradient is masked to zero.
        no_decay=frozenset(name for name, transform in transforms.items() if not transform.decay),
        weight_decay=config.weight_decay,
        clip=config.max_grad_norm,
        total_steps=schedule.total_steps,
        warmup_steps=round(config.warmup_ratio * schedule.total_steps),
    )
    return build_engine(
        job.engine,
        learner.model,
        optimizing,
        num_micro=split.num_micro,
        micro_batch=split.micro,
        bf16=job.model.dtype == "bfloat16",
        transforms=transforms,
        penalties=penalties,
    )


def consolidate(job: Job, learner: Learner, rows: Rows, weights: ShardedWeights, world: World) -> Learner:
    """Let the learner store what later tasks need of the finished one, and return it."""
    assert isinstance(job.stage, Train)
    end_rows = capabilities_of(job.method, job.model, job.stage.learner).end_rows
    if end_rows:
        learner = rebuild_selected(job, weights, world)
    learner.activate(job.stage.task)
    task_id = job.tasks[job.stage.task].id
    seen = sample(job.seed, task_id, len(rows), end_rows)[world.rank :: world.size]
    learner.end_task(weights, (rows.batch([number], world.device) for number in seen))
    return learner


def rebuild_selected(job: Job, weights: Mapping[str, Tensor], world: World) -> Learner:
    """Return a learner with the selected weights in a plain model; the engine's is partitioned, or rounded."""
    assert isinstance(job.stage, Train)
    learner = build_learner(job)
    prepare_learner(job, learner)
    learner.model.load_state_dict(dict(weights), strict=False)
    learner.model.to(world.device).eval()
    return learner


def train_summary(rounds: list[dict[str, float]], learner: Learner) -> dict[str, Any]:
    """Return what train.json reports; the selected round is that of the lowest dev loss, else the last."""
    selected = min(rounds, key=lambda r: r["dev/loss"]) if "dev/loss" in rounds[0] else rounds[-1]
    return {
        "metrics": {name: value for name, value in selected.items() if name != "step"},
        "selected_step": selected["step"],
        "rounds": rounds,
        "learner": learner.report_info(),
    }


def _total(terms: Mapping[str, Tensor], world: World) -> Tensor:
    if not terms:
        return torch.zeros((), device=world.device)
    return torch.stack([term.float() for term in terms.values()]).sum()


def _ignore(event: dict[str, Any]) -> None:
    """Stand in for report on all ranks but 0."""
