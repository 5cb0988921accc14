"""Worker side of a Train stage: the loop that every method shares, run in lock-step by all ranks of a gang."""

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from cl_dist.data.language import LanguageRows
from cl_dist.data.sampler import global_batch, num_micro_batches, num_steps, sample, share
from cl_dist.data.samples import read_samples
from cl_dist.data.votes import read_critical
from cl_dist.errors import StoppedError, TrainingError
from cl_dist.methods.base import Learner, Rows
from cl_dist.models.backbone import load_tokenizer, recompute_activations
from cl_dist.models.classifier import count_parameters
from cl_dist.parallel.engine import Engine, GradScale, Optimizing, Pull, build_engine
from cl_dist.parallel.guard import Guard
from cl_dist.parallel.seeds import seeded
from cl_dist.parallel.world import World
from cl_dist.parallel.zero3_init import partitions
from cl_dist.stage import Train
from cl_dist.stages import checkpoint
from cl_dist.stages.build import LEARNER, build_learner
from cl_dist.stages.save_policy import SavePolicy
from cl_dist.stages.schedule import Schedule
from cl_dist.stages.stage_job import Job, SaveRequest, replayed_rows, row_length, task_data
from cl_dist.stages.weights import LocalShards, ShardedWeights

log = logging.getLogger(__name__)
Report = Callable[[dict[str, Any]], None]
AUTO_MICRO = 32
FACTS = "train.json"


def run(
    job: Job,
    out: Path,
    report: Report,
    asked: Callable[[], SaveRequest] = lambda: "",
    alive: Callable[[int], None] = lambda step: None,
) -> None:
    """Train the stage's model and let rank 0 write its weights, learner state and facts to out.

    report receives small progress events on rank 0; alive receives the number of steps that are done, on every rank,
    before each step and after the last. Every rank of the gang must call this with the same job. What an earlier
    attempt saved below out is gone on from, whatever its number of ranks and ZeRO stage.

    Raises:
        StoppedError: If asked, which rank 0 calls about once a second, says "stop"; the stage is saved by then.
    """
    stage, world = job.stage, World.current()
    assert isinstance(stage, Train)
    began = entered = time.monotonic()
    learner = build_learner(job, partitioned=partitions(job.engine, world))
    start(job, learner)
    if job.engine.activation_checkpointing:
        recompute_activations(learner.model)
    scales, pulls = learner.grad_scales(), learner.pulls()  # by the weights that the stage starts from
    saved = checkpoint.latest(out, world)
    if saved is not None:
        saved.load_weights(learner.model, world.rank)
        began -= saved.seconds
        if world.rank == 0:
            report({"event": "continued", "step": saved.step})
    rows, dev = _rows(job, stage, learner)
    steps_per_epoch = num_steps(len(rows), job.train.global_batch)
    schedule = Schedule(job.train.epochs * steps_per_epoch, steps_per_epoch, job.train.min_round_steps)
    engine, micro, num_micro = _engine(job, learner, scales, pulls, schedule, world)
    if saved is not None:
        saved.load_moments(engine)
    parameters = dict(zip(("trainable", "total"), count_parameters(engine.module), strict=True))
    log.info("train start task=%d rows=%d steps=%d %s", stage.task, len(rows), schedule.total_steps, parameters)

    loop = _Loop(job, learner, engine, schedule, rows, dev, (micro, num_micro))
    loop.go_on_from(saved)
    perf = {"perf/startup_s": time.monotonic() - entered}
    guard = Guard(engine, scales) if job.engine.verify_protection_every else None
    with closing(engine), closing(checkpoint.Writer(out, engine)) as writer:
        pace = SavePolicy(job.engine, world, asked, loop.done, writer)
        for step in range(loop.done, schedule.total_steps):
            alive(step)
            loop.step(step)
            due = pace.due(step + 1) if step + 1 < schedule.total_steps else ""
            if guard is not None and (due or (step + 1) % job.engine.verify_protection_every == 0):
                guard.check(step + 1)  # also before what has moved would be saved
            if world.rank == 0:
                report({"event": "step", "step": step + 1, "total_steps": schedule.total_steps})
            if schedule.ends_round(step):
                means = loop.end_round(step)
                if world.rank == 0:
                    report({"event": "round", "total_steps": schedule.total_steps, **means})
            if due:
                facts = loop.facts(step + 1, time.monotonic() - began)
                writer.save(facts, loop.best, wait=due == "stop" or not job.engine.checkpoint_async)
            if due == "stop":
                raise StoppedError(f"stopped after step {step + 1} of {schedule.total_steps}, which is saved")

        alive(schedule.total_steps)
        perf |= loop.speed()
        (checkpoint.Best(0.0, LocalShards(engine)) if loop.best is None else loop.best).write(out, world.rank)
        world.gather(None)  # all have written what any of them reads now
    learner = _ended(job, learner, rows, ShardedWeights(out), world)
    if world.rank == 0:
        if state := learner.state_dict():
            save_file({name: value.cpu().contiguous() for name, value in state.items()}, out / LEARNER)
        facts = _facts(loop.rounds, learner) | {"parameters": parameters}
        facts["metrics"] |= perf | {"perf/stage_s": time.monotonic() - began}
        (out / FACTS).write_text(json.dumps(facts, indent=1), encoding="utf8")


class _Loop:
    """The optimizer steps of a stage, and what is summed up on the way."""

    def __init__(
        self,
        job: Job,
        learner: Learner,
        engine: Engine,
        schedule: Schedule,
        rows: Rows,
        dev: dict[int, Rows],
        cut: tuple[int, int],
    ) -> None:
        """Take what the steps need; cut is the rows of a micro-batch, and the micro-batches of a step."""
        self._job, self._learner, self._engine, self._schedule = job, learner, engine, schedule
        self._rows, self._dev, (self._micro, self._num_micro) = rows, dev, cut
        self.best: checkpoint.Best | None = None
        self.rounds: list[dict[str, float]] = []
        self.done = 0
        """Optimizer steps that an earlier attempt has done."""
        self._sums = _Sums()
        self._tokens = 0
        self._seconds: list[float] = []

    def go_on_from(self, saved: checkpoint.Checkpoint | None) -> None:
        """Take over what an earlier attempt has summed up."""
        if saved is not None:
            self.best, self.rounds, self.done = saved.best, saved.rounds, saved.step
            self._sums.put(saved.sums, self._engine.world)

    def facts(self, done: int, seconds: float) -> dict[str, Any]:
        """Return what goes into a checkpoint after some steps. A collective."""
        sums = self._sums.totals(self._engine.world)
        _check_finite({name: value for part in sums.values() for name, value in part.items()}, done)
        return {"step": done, "rounds": self.rounds, "sums": sums, "seconds": seconds}

    def step(self, step: int) -> None:
        """Do one optimizer step."""
        began = time.monotonic()
        job, world, rows, num_micro = self._job, self._engine.world, self._rows, self._num_micro
        progress = self._schedule.at(step)
        task_id, size = job.tasks[job.stage.task].id, job.train.global_batch
        _, indices = global_batch(job.seed, task_id, step, len(rows), size)
        indices = np.array(rows.by_length(indices))
        units = rows.units(indices)
        self._engine.module.train()
        with seeded(job.seed, "step", step, world.rank):  # for dropout, the one thing that is drawn per rank
            for places in share(indices, world.rank, world.size, self._micro, num_micro):
                batch = rows.batch(places, world.device)
                loss = self._learner.loss(self._engine, batch, progress)
                terms = {
                    name: (term * batch["weight"]).sum() / units.get(name, len(indices))
                    for name, term in loss.rows.items()
                }
                self._engine.backward(_total(terms, world), _total(loss.own, world))
                self._engine.step()
                self._sums.add(terms, {name: term / num_micro for name, term in loss.own.items()})
        self._tokens += sum(rows.length(int(number)) for number in indices)
        self._seconds.append(time.monotonic() - began)

    def speed(self) -> dict[str, float]:
        """Return seconds per step of this attempt, and tokens a second of all ranks together, without padding."""
        seconds = sum(self._seconds)
        return {"perf/step_s": seconds / len(self._seconds), "perf/tokens_per_s": self._tokens / seconds}

    def end_round(self, step: int) -> dict[str, float]:
        """Return the round's means, and keep the weights if they are the best so far."""
        engine = self._engine
        means = self._sums.means(self._schedule.at(step).round_steps, engine.world)
        means |= {"train/grad_norm": engine.grad_norm(), "step": step + 1}
        if self._job.train.keep == "best_dev" and any(len(rows) for rows in self._dev.values()):
            means |= score_dev(engine, self._learner, self._dev, self._job.evaluate.batch)
            if self.best is None or means["dev/loss"] < self.best.loss:
                self.best = checkpoint.Best(means["dev/loss"], LocalShards(engine))
        _check_finite(means, step + 1)
        self.rounds.append(means)
        return means


def _check_finite(numbers: Mapping[str, float], done: int) -> None:
    """Raise TrainingError for numbers that are none; they are equal on all ranks."""
    if wrong := [name for name, value in numbers.items() if not math.isfinite(value)]:
        raise TrainingError(
            f"training has diverged by step {done}: {', '.join(wrong)} is no finite number; lower train.lr, or set "
            "train.max_grad_norm, train.warmup_ratio"
        )


def _ended(job: Job, learner: Learner, rows: Rows, weights: ShardedWeights, world: World) -> Learner:
    """Let the learner consolidate what later tasks need, and return it."""
    if learner.end_rows:
        learner = _finished(job, weights, world)
    learner.activate(job.stage.task)
    task_id = job.tasks[job.stage.task].id
    seen = sample(job.seed, task_id, len(rows), learner.end_rows)[world.rank :: world.size]
    learner.end_task(weights, (rows.batch([number], world.device) for number in seen))
    return learner


def start(job: Job, learner: Learner) -> None:
    """Choose what the stage trains."""
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


def _facts(rounds: list[dict[str, float]], learner: Learner) -> dict[str, Any]:
    """Return what a report should know; the selected round is that of the lowest dev loss, else the last."""
    selected = min(rounds, key=lambda r: r["dev/loss"]) if "dev/loss" in rounds[0] else rounds[-1]
    return {
        "metrics": {name: value for name, value in selected.items() if name != "step"},
        "selected_step": selected["step"],
        "rounds": rounds,
        "learner": learner.facts(),
    }


def _engine(
    job: Job,
    learner: Learner,
    scales: Mapping[str, GradScale],
    pulls: Mapping[str, Pull],
    schedule: Schedule,
    world: World,
) -> tuple[Engine, int, int]:
    """Return the engine, the rows of a micro-batch and the micro-batches of a step."""
    config = job.train
    per_rank = num_micro_batches(config.global_batch, world.size, 1)
    micro = min(per_rank, AUTO_MICRO if job.engine.micro_batch == "auto" else job.engine.micro_batch)
    num_micro = num_micro_batches(config.global_batch, world.size, micro)
    optimizing = Optimizing(
        lr=config.lr,
        lr_of=learner.learning_rates(),
        # AdamW decays a weight even where its gradient is masked to zero.
        no_decay=frozenset(name for name, scale in scales.items() if not scale.decay),
        weight_decay=config.weight_decay,
        clip=config.max_grad_norm,
        total_steps=schedule.total_steps,
        warmup_steps=round(config.warmup_ratio * schedule.total_steps),
    )
    engine = build_engine(
        job.engine,
        learner.model,
        optimizing,
        num_micro=num_micro,
        micro_batch=micro,
        bf16=job.model.dtype == "bfloat16",
        grad_scales=scales,
        pulls=pulls,
    )
    return engine, micro, num_micro


def _finished(job: Job, weights: Mapping[str, Tensor], world: World) -> Learner:
    """Return a learner with the selected weights in a plain model, which an engine may have left cut up or rounded."""
    assert isinstance(job.stage, Train)
    learner = build_learner(job)
    start(job, learner)
    learner.model.load_state_dict(dict(weights), strict=False)
    learner.model.to(world.device).eval()
    return learner


def _total(terms: Any, world: World) -> Tensor:
    return (
        torch.stack([term.float() for term in terms.values()]).sum() if terms else torch.zeros((), device=world.device)
    )


class _Sums:
    """Loss terms of a round, kept on the device until the round ends: no synchronisation per step."""

    def __init__(self) -> None:
        self._rows: dict[str, Tensor] = {}
        self._own: dict[str, Tensor] = {}

    def add(self, rows: dict[str, Tensor], own: dict[str, Tensor]) -> None:
        """Add one micro-batch."""
        for into, terms in ((self._rows, rows), (self._own, own)):
            for name, term in terms.items():
                into[name] = into.get(name, torch.zeros((), device=term.device)) + term.detach().float()

    def totals(self, world: World) -> dict[str, dict[str, float]]:
        """Return the sums so far, those over rows summed over ranks too. A collective."""
        local = {name: float(value) for name, value in self._rows.items()}
        shares = world.gather(local)
        rows = {name: sum((part[name] for part in shares), 0.0) for name in local}
        return {"rows": rows, "own": {name: float(value) for name, value in self._own.items()}}

    def put(self, totals: Mapping[str, Mapping[str, float]], world: World) -> None:
        """Go on from such totals; rank 0 takes what was summed over ranks."""
        share = 1.0 if world.rank == 0 else 0.0
        self._rows = {n: torch.tensor(value * share, device=world.device) for n, value in totals["rows"].items()}
        self._own = {n: torch.tensor(value, device=world.device) for n, value in totals["own"].items()}

    def means(self, steps: int, world: World) -> dict[str, float]:
        """Return each term's mean over the steps, and start anew."""
        means = {f"train/{n}": value / steps for part in self.totals(world).values() for n, value in part.items()}
        self._rows, self._own = {}, {}
        return means | {"train/loss": sum(means.values())}


@torch.no_grad()
def score_dev(engine: Engine, learner: Learner, dev: dict[int, Rows], batch: int) -> dict[str, float]:
    """Return mean loss and accuracy over the dev rows, each rank scoring its stride; every rank gets the same numbers.

    Rows are put back into order before they are summed, so the sums do not depend on the number of ranks.
    """
    world, losses, right = engine.world, [], 0
    engine.module.eval()
    for task, rows in dev.items():
        if not len(rows):
            continue
        learner.activate(task)
        size = min(batch, num_micro_batches(len(rows), world.size, 1))
        mine: list[tuple[int, float, bool]] = []
        for start in range(0, len(rows), size * world.size):
            indices = torch.arange(start, min(start + size * world.size, len(rows))).numpy()
            (places,) = share(indices, world.rank, world.size, size, 1)
            inputs = rows.batch(places, world.device)
            losses_B, right_B = learner.score_examples(engine(inputs), inputs)
            scored = zip(places.tolist(), losses_B.tolist(), right_B.tolist(), strict=True)
            mine += [row for row in scored if row[0] >= 0]
        everyone = sorted(row for part in world.gather(mine) for row in part)
        losses += [loss for _, loss, _ in everyone]
        right += sum(correct for _, _, correct in everyone)
    return {"dev/loss": sum(losses) / len(losses), "dev/accuracy": right / len(losses)}
