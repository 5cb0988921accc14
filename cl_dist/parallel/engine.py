"""Training engines: DeepSpeed ZeRO 0-3 over a gang, or plain torch on one worker.

Both have the same interface. Their loss is this rank's share of a sum over the global batch: DeepSpeed's averaging over
ranks and micro-batches is undone here.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cl_dist.errors import ConfigError
from cl_dist.parallel import params
from cl_dist.parallel.config import EngineConfig, buffer_bounds, deepspeed_settings
from cl_dist.parallel.files import Files
from cl_dist.parallel.forward import ForwardOnly
from cl_dist.parallel.gradients import GradientTransform, Penalty
from cl_dist.parallel.world import World
from cl_dist.partition import full_shape, is_partitioned


@dataclass(frozen=True, slots=True)
class Optimizing:
    """Optimizer settings: AdamW with linear warm-up and decay, equal for both engines."""

    lr: float
    lr_of: Mapping[str, float]
    """Learning rates of parameters that differ from lr, by name."""
    no_decay: frozenset[str]
    """Parameters without weight decay, in addition to biases and norms."""
    weight_decay: float
    clip: float
    total_steps: int
    warmup_steps: int

    def factor(self, step: int) -> float:
        """Return the learning rate at an optimizer step, as a share of its peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return max(0.0, (self.total_steps - step) / max(1, self.total_steps - self.warmup_steps))

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return the optimizer's parameter groups: one per (learning rate, decay), in a fixed order."""
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                plain = len(full_shape(parameter)) < 2 or name in self.no_decay
                key = (self.lr_of.get(name, self.lr), 0.0 if plain else self.weight_decay)
                groups.setdefault(key, []).append(parameter)
        return [{"params": groups[key], "lr": key[0], "weight_decay": key[1]} for key in sorted(groups)]


class Engine(Protocol):
    """Interface of an engine for the training loop."""

    module: nn.Module
    world: World
    optimizer: "FrozenEntryAdamW"
    schedule: Any
    """Learning rate schedule; the library's class is untyped."""

    @property
    def flat_tensors(self) -> list[Tensor]:
        """The tensors that the optimizer updates on this rank."""

    def __call__(self, batch: Any) -> Any:
        """Run the model forward; required in training, since the engine's hooks run here."""

    def reads_only_forward(self) -> AbstractContextManager[None]:
        """Raise where a parameter that is partitioned is read, unless a call of the engine reads it."""

    def backward(self, examples: Tensor, regularizers: Tensor) -> None:
        """Accumulate gradients of (sum over ranks and micro-batches of examples) + (mean of regularizers)."""

    def step(self) -> None:
        """End a micro-batch; at the accumulation boundary clip, update the weights, advance the schedule."""

    def grad_norm(self) -> float:
        """Return the gradient norm before clipping of the last update."""

    def close(self) -> None:
        """Free the engine's state; the module remains usable."""


def build_engine(
    config: EngineConfig,
    model: nn.Module,
    optimizing: Optimizing,
    *,
    num_micro: int,
    micro_batch: int,
    bf16: bool,
    transforms: Mapping[str, GradientTransform],
    penalties: Mapping[str, Penalty],
) -> Engine:
    """Create an engine for a model; gradient transforms are attached to the parameters first.

    Raises:
        ConfigError: If the settings contradict each other.
    """
    world = World.current()
    check_engine(config, world.size, bf16)
    attach(model, transforms)
    if config.engine == "torch":
        engine: TorchEngine | DeepSpeedEngine = TorchEngine(
            model.to(world.device), optimizing, num_micro, world, penalties
        )
    else:
        engine = DeepSpeedEngine(config, model, optimizing, num_micro, micro_batch, bf16, world, penalties)
    if any(each.decay for each in transforms.values()) and optimizing.weight_decay:
        engine.optimizer.restore_frozen = _FrozenEntries(engine.module, transforms, world.rank).put_back
    return engine


def check_engine(config: EngineConfig, workers: int, bf16: bool) -> None:
    """Raise ConfigError for incompatible settings."""
    if config.engine == "torch" and (workers != 1 or bf16):
        raise ConfigError("cluster.engine='torch': expected cluster.workers=1 and science.model.dtype='float32'")
    if bf16 and config.zero_stage == 0:
        raise ConfigError(
            "cluster.zero_stage=0 with science.model.dtype='bfloat16': expected zero_stage 1, 2 or 3, "
            "since DeepSpeed keeps no float32 master weights at stage 0"
        )


def attach(model: nn.Module, transforms: Mapping[str, GradientTransform]) -> None:
    """Transform gradients in hooks as they are produced: under ZeRO `p.grad` is None after backward."""
    named = dict(model.named_parameters())
    for name, transform in transforms.items():
        named[name].register_hook(transform.apply)


class FrozenEntryAdamW(torch.optim.AdamW):
    """AdamW that restores frozen entries after every step, before ZeRO copies the weights."""

    restore_frozen: Callable[[], None] | None = None

    def step(self, closure: Any = None) -> Any:
        """Update the weights."""
        result = super().step(closure)
        if self.restore_frozen is not None:
            self.restore_frozen()
        return result


class _FrozenEntries:
    """Values of the frozen entries that this rank owns."""

    def __init__(self, model: nn.Module, transforms: Mapping[str, GradientTransform], rank: int) -> None:
        self._rank = rank
        self._parts: list[tuple[nn.Parameter, Tensor, Tensor]] = []
        for name, transform in transforms.items():
            parameter = model.get_parameter(name)
            if not transform.decay or not parameter.requires_grad:
                continue
            piece, start = params.local(parameter, rank)
            entries = transform.frozen(full_shape(parameter), piece.device)
            if entries is None:
                continue
            keep = entries.flatten()[start : start + piece.numel()]
            keep = torch.nn.functional.pad(keep, (0, piece.numel() - keep.numel()))
            if bool(keep.any()):
                self._parts.append((parameter, keep, piece.flatten()[keep].clone()))

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the saved values."""
        for parameter, keep, values in self._parts:
            params.local(parameter, self._rank)[0].view(-1)[keep] = values


class TorchEngine:
    """Plain torch on one worker."""

    def __init__(
        self, model: nn.Module, optimizing: Optimizing, num_micro: int, world: World, penalties: Mapping[str, Penalty]
    ) -> None:
        self.module, self.world = model, world
        self._penalties = [(model.get_parameter(name), penalty) for name, penalty in penalties.items()]
        self._optimizing, self._num_micro = optimizing, num_micro
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer, self.schedule = _adamw(model, optimizing)
        self._micro, self._norm = 0, torch.zeros(())

    @property
    def flat_tensors(self) -> list[Tensor]:
        """See Engine."""
        return list(self._parameters)

    def __call__(self, batch: Any) -> Any:
        """See Engine."""
        return self.module(batch)

    def reads_only_forward(self) -> AbstractContextManager[None]:
        """See Engine. No parameter is partitioned here."""
        return nullcontext()

    def backward(self, examples: Tensor, regularizers: Tensor) -> None:
        """See Engine."""
        (examples + regularizers / self._num_micro).backward()

    def step(self) -> None:
        """See Engine."""
        self._micro += 1
        if self._micro % self._num_micro:
            return
        for parameter, penalty in self._penalties:
            assert parameter.grad is not None  # a loss reaches all that is trained
            parameter.grad += penalty.gradient(parameter.detach())
        clip = self._optimizing.clip or float("inf")
        self._norm = torch.nn.utils.clip_grad_norm_(self._parameters, clip)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def grad_norm(self) -> float:
        """See Engine."""
        return float(self._norm)

    def close(self) -> None:
        """See Engine."""
        self.optimizer.state.clear()


class DeepSpeedEngine:
    """DeepSpeed ZeRO 0-3 over the gang of this process."""

    def __init__(
        self,
        config: EngineConfig,
        model: nn.Module,
        optimizing: Optimizing,
        num_micro: int,
        micro_batch: int,
        bf16: bool,
        world: World,
        penalties: Mapping[str, Penalty],
    ) -> None:
        deepspeed = start_deepspeed(world)
        self.world = world
        self._files = None if config.offload_folder is None else Files(config.offload_folder)
        self._penalties = [(model.get_parameter(name), penalty) for name, penalty in penalties.items()]
        self._undo_mean = world.size * num_micro
        self._norm: Tensor | None = None
        self.optimizer, self.schedule = _adamw(model, optimizing)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        exact = params.Fp32Snapshot(trained if bf16 else {})
        if bf16 and (self._files is not None or any(is_partitioned(parameter) for parameter in model.parameters())):
            # If some parameters are partitioned already, DeepSpeed assumes that all have been converted.
            for parameter in model.parameters():
                params.lower(parameter)
        elements = [full_shape(parameter).numel() for parameter in model.parameters()]
        sizes = [full_shape(parameter).numel() for parameter in trained.values()]
        bounds = buffer_bounds(sum(elements), sum(sizes), max(elements))
        settings = deepspeed_settings(
            config, num_micro=num_micro, micro_batch=micro_batch, clip=optimizing.clip, bf16=bf16, bounds=bounds
        )
        if self._files is not None:
            deepspeed.zero.Init(module=model, config_dict_or_path=settings)
            settings = self._files.take(model, settings, world.size)
        for buffer in model.buffers():  # DeepSpeed does not move those of a partitioned model
            buffer.data = buffer.data.to(world.device)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self.optimizer, lr_scheduler=self.schedule, config=settings, dist_init_required=False
        )
        self.module: nn.Module = self._engine.module
        self._reads = ForwardOnly({name: p for name, p in self.module.named_parameters() if is_partitioned(p)})
        # DeepSpeed creates its masters from weights rounded to bfloat16, which would change protected entries.
        exact.put_back(world.rank)

    @property
    def flat_tensors(self) -> list[Tensor]:
        """See Engine."""
        wrapped, stage = self._engine.optimizer, self._engine.zero_optimization_stage()
        if stage == 0:
            return [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        names = {1: "single_partition_of_fp32_groups", 2: "single_partition_of_fp32_groups"}
        return list(getattr(wrapped, names.get(stage, "fp32_partitioned_groups_flat")))

    def __call__(self, batch: Any) -> Any:
        """See Engine."""
        with self._reads.suspended():
            return self._engine(batch)

    def reads_only_forward(self) -> AbstractContextManager[None]:
        """See Engine."""
        return self._reads.watching()

    def backward(self, examples: Tensor, regularizers: Tensor) -> None:
        """See Engine."""
        self._engine.backward(examples * self._undo_mean + regularizers)

    def step(self) -> None:
        """See Engine."""
        boundary = self._engine.is_gradient_accumulation_boundary()
        if boundary:
            for parameter, penalty in self._penalties:
                params.add_gradient(parameter, penalty.gradient, self.world.rank)
        if boundary and self._engine.zero_optimization_stage() == 0:
            # Without ZeRO DeepSpeed reports no norm; the gradients are reduced now, and freed after the step.
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._norm = torch.nn.utils.get_total_norm(grads)
        self._engine.step()

    def grad_norm(self) -> float:
        """See Engine."""
        norm = self._engine.get_global_grad_norm() if self._norm is None else self._norm
        return 0.0 if norm is None else float(norm)

    def close(self) -> None:
        """See Engine."""
        self._engine.destroy()
        if self._files is not None:
            self._files.close()


def _adamw(model: nn.Module, optimizing: Optimizing) -> tuple[FrozenEntryAdamW, Any]:
    optimizer = FrozenEntryAdamW(optimizing.groups(model), lr=optimizing.lr, eps=1e-8, fused=True)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, optimizing.factor)


def start_deepspeed(world: World) -> Any:
    """Import DeepSpeed and join its process group, without compiling any of its operators."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if world.device.type == "cpu":
        # Used for inference only, but compiled (100 s) at every init on a CPU; there is no public option.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if world.size == 1 and not torch.distributed.is_initialized():
        # A gang of one needs no rendezvous: an in-memory store opens no port.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # public, but torch exports it by an `if`
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        for key, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            os.environ.setdefault(key, value)
    deepspeed.init_distributed(dist_backend="nccl" if world.device.type == "cuda" else "gloo")
    return deepspeed
