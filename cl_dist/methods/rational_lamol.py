"""Rational LAMOL: LAMOL that finds out, by rationales, what a new task would change most, and keeps that frozen.

Source: Kanwatchara et al. 2021, "Rational LAMOL: A Rationale-Based Lifelong Learning Framework", ACL. For each task
after the first: train freely -> vote (models/cci.py) -> train again from the model before the task, the chosen part
frozen. Frozen is frozen to the bit, through weight decay and clipping, and decided anew at every task (DECISIONS).
Rationales that nobody has marked can be found by InvRat (methods/invrat.py) or by gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from cl_dist.errors import ConfigError
from cl_dist.methods.base import Method, TaskSequence
from cl_dist.methods.invrat import InvratConfig
from cl_dist.methods.lamol import Lamol, LamolConfig
from cl_dist.methods.lamol import plan as plan_lamol
from cl_dist.methods.text import UPDATE
from cl_dist.stage import Choose, Rationalise, Record, Stage, StageRef, Train, Vote, VoteConfig, model_after, ref

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from cl_dist.parallel.engine import GradScale


class RationalLamolConfig(LamolConfig, VoteConfig):
    """Settings of Rational LAMOL: those of LAMOL, and those of the vote."""

    name: Literal["rational_lamol"]  # type: ignore[assignment]
    freeze: Literal["cci", "brute_force", "random", "first", "last", "list", "none"] = "cci"
    """What is frozen: what the vote chooses; the unit of frozen_units without which dev rows of all tasks are answered
    best, each tried by training; or, to compare with on the same budget, units drawn by the run's seed, the first or
    last ones of the model, those of frozen_units, or nothing (LAMOL)."""
    frozen_units: tuple[tuple[int, int], ...] = ()
    """(layer, unit) pairs for freeze: list and brute_force; of a block the unit is 0."""
    freeze_output: bool = False
    """Whether a frozen head's part of the projection behind the heads is frozen too."""

    invrat: InvratConfig = InvratConfig()
    """How rationales are found, for rationales: invrat."""

    @model_validator(mode="after")
    def _units_are_named(self) -> RationalLamolConfig:
        if (self.freeze in ("list", "brute_force")) != bool(self.frozen_units):
            raise ValueError("frozen_units belong to freeze: list or brute_force, which need them")
        return self

    def vote(self) -> VoteConfig:
        """Return how is voted."""
        return VoteConfig(**{name: getattr(self, name) for name in VoteConfig.model_fields})


def plan(config: RationalLamolConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """As LAMOL; where something is to be chosen, the models that are compared come before the one that stays."""
    stages = plan_lamol(config, tasks, t)
    if t == 0 or config.freeze not in ("cci", "brute_force"):
        return stages
    at = next(place for place, stage in enumerate(stages) if isinstance(stage, Train))
    final = stages[at]
    assert isinstance(final, Train)
    before = _voted(config, t, final) if config.freeze == "cci" else _tried(config, t, final)
    final = final.model_copy(update={"frozen": ref(before[-1])})
    return [*stages[:at], *before, final, *stages[at + 1 :]]


def _voted(config: RationalLamolConfig, t: int, final: Train) -> list[Stage]:
    """Return the stages that end in a vote: the model before the task, and a freely trained one, read the same rows."""
    sources = (t - 1,) if config.voting_tasks == "previous" else tuple(range(t))
    stages: list[Stage] = []
    if config.rationales == "invrat":
        stages += _rationalised(config, t)
    record = Record(
        task=t,
        model=model_after(t - 1),
        sources=sources,
        rationales=tuple(StageRef(task=u + 1, stage="rationalise") for u in sources) if stages else (),
        vote=config.vote(),
    )
    free = final.model_copy(update={"role": "free"})
    vote = Vote(task=t, model=ref(free), recorded=ref(record), sources=sources, vote=config.vote())
    return [*stages, record, free, vote]


def _rationalised(config: RationalLamolConfig, t: int) -> list[Stage]:
    """Return the stages that find rationales of the task before."""
    found = [
        Train(task=t, data=(t - 1,), learner="invrat", role="invrat", trial=trial, settings=config.invrat.train)
        for trial in range(config.invrat.restarts)
    ]
    models = tuple(ref(stage) for stage in found)
    return [*found, Rationalise(task=t, models=models, sources=(t - 1,), vote=config.vote())]


def _tried(config: RationalLamolConfig, t: int, final: Train) -> list[Stage]:
    """Return the stages that train with each unit frozen and choose the best."""
    tries = [
        final.model_copy(update={"role": "try", "trial": trial, "frozen_units": (unit,)})
        for trial, unit in enumerate(config.frozen_units)
    ]
    choose = Choose(
        task=t,
        model=model_after(t - 1),
        candidates=tuple(ref(stage) for stage in tries),
        units=config.frozen_units,
        sources=tuple(range(t + 1)),
        vote=config.vote(),
    )
    return [*tries, choose]


class RationalLamol(Lamol):
    """LAMOL's learner, with a part of the model frozen."""

    config: RationalLamolConfig

    def shape(self, backbone: PreTrainedModel, known: int, size: int) -> nn.Module:
        """See TextLearner.

        Raises:
            ConfigError: If low-rank updates leave nothing of a layer's units to freeze.
        """
        import torch

        from cl_dist.models.architectures import architecture, layers_of
        from cl_dist.models.attention_slices import trainable_masks
        from cl_dist.models.lowrank import trainable_update_masks

        model, config = super().shape(backbone, known, size), self.config
        if config.lora is None or config.freeze == "none" or config.level == "block":
            return model
        layers = layers_of(backbone)
        first = [(layer, 0) for layer in range(len(layers))]
        with torch.device("cpu"):  # a plan shapes the model without data, but looks at these numbers
            frozen = trainable_update_masks(
                backbone, UPDATE, trainable_masks(backbone, first, config.level, config.freeze_output)
            )
        if not all(any(name.startswith(f"{path}.") for name in frozen) for path, _ in layers):
            raise ConfigError(
                f"method.lora.target_modules={config.lora.target_modules}: level: {config.level} freezes parts of "
                "attention projections, which these are not, or not in every layer; add "
                f"{', '.join(architecture(backbone).lora)}, or set level: block"
            )
        return model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See Lamol."""
        super().start_task(task, tasks)
        self._frozen: list[tuple[int, int]] = []
        if task and self.config.freeze in ("random", "first", "last", "list"):
            self.freeze(self._control(task))

    def freeze(self, units: list[tuple[int, int]]) -> None:
        """Freeze units: blocks here and now, heads and groups by grad_scales.

        Raises:
            ConfigError: If the model has no such unit.
        """
        from cl_dist.models.attention_slices import block_parameters, shape_of, units_of

        layers, count = shape_of(self.model.backbone)[0], units_of(self.model.backbone, self.config.level)
        for layer, unit in units:
            if not (0 <= layer < layers and 0 <= unit < count):
                raise ConfigError(
                    f"method.frozen_units=[{layer}, {unit}]: this model has layers 0..{layers - 1}, each with "
                    f"{count} unit(s) at level {self.config.level}, counted from 0"
                )
        self._frozen = units
        if self.config.level == "block":
            for layer, _ in units:
                for name in block_parameters(self.model.backbone, layer):
                    self.model.backbone.get_parameter(name).requires_grad_(False)

    def _control(self, task: int) -> list[tuple[int, int]]:
        """Return the units of a control, as many as a vote would choose."""
        import torch

        from cl_dist.models.attention_slices import shape_of, units_of
        from cl_dist.parallel.seeds import seed_of

        backbone, config = self.model.backbone, self.config
        layers, units = shape_of(backbone)[0], units_of(backbone, config.level)
        every = [(layer, unit) for layer in range(layers) for unit in range(units)]
        count = 1 if config.level == "block" else min(config.top_k, len(every))
        match config.freeze:
            case "first":
                return every[:count]
            case "last":
                return every[-count:]
            case "random":
                generator = torch.Generator().manual_seed(seed_of(self.seed, "freeze", task))
                return sorted(every[i] for i in torch.randperm(len(every), generator=generator)[:count].tolist())
            case _:
                return list(config.frozen_units)

    def grad_scales(self) -> Mapping[str, GradScale]:
        """Keep what frozen heads and groups own; everything else moves and decays as it would."""
        from dataclasses import replace

        from cl_dist.models.attention_slices import trainable_masks

        scales = dict(super().grad_scales())
        if self.config.level == "block":
            return {name: scale for name, scale in scales.items() if self.model.get_parameter(name).requires_grad}
        parts = trainable_masks(self.model.backbone, self._frozen, self.config.level, self.config.freeze_output)
        if self.lora is not None:
            from cl_dist.models.lowrank import trainable_update_masks

            parts = trainable_update_masks(self.model.backbone, UPDATE, parts)
        for inner, scale in held(parts).items():
            name = f"backbone.{inner}"
            before = scales.get(name)
            if before is not None and before.row is not None and scale.row is not None:
                scale = replace(scale, row=scale.row * before.row)
            scales[name] = scale
        return {name: scale for name, scale in scales.items() if self.model.get_parameter(name).requires_grad}

    def facts(self) -> dict[str, Any]:
        """Return what was frozen, and its share of the model's parameters, or of those of the updates."""
        import torch

        from cl_dist.models.classifier import count_parameters
        from cl_dist.partition import full_shape

        trained, total = count_parameters(self.model)
        if self.lora is not None:
            from cl_dist.models.lowrank import own_parameters

            own = own_parameters(self.model)
            total = sum(full_shape(p).numel() for name, p in self.model.named_parameters() if name in own)
        frozen = total - trained
        for name, scale in self.grad_scales().items():
            parameter = self.model.get_parameter(name)
            whole = torch.empty(full_shape(parameter))  # ZeRO-3 may hold a piece of it
            frozen += int((scale.factor(whole) == 0).sum()) if scale.decay else 0
        return {"frozen_units": [list(pair) for pair in self._frozen], "freeze/params_frac": frozen / total}


def held(parts: Mapping[str, tuple[str, Tensor]]) -> dict[str, GradScale]:
    """Return gradient factors that keep what `models.heads.kept` says, while everything else moves and decays."""
    import torch

    from cl_dist.parallel.engine import GradScale

    return {
        name: GradScale(row=keep, decay=True)
        if axis == "row"
        else GradScale(row=torch.zeros(1), column=keep, decay=True)
        for name, (axis, keep) in parts.items()
    }


METHOD = Method(
    config=RationalLamolConfig,
    plan=plan,
    learners={"lm": "cl_dist.methods.rational_lamol:RationalLamol", "invrat": "cl_dist.methods.invrat:Invrat"},
    about="LAMOL that keeps frozen what a vote over attention maps and rationales points at",
)
