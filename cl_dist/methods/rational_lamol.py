"""Rational LAMOL: LAMOL that freezes the part of the model which a new task would change most.

Source: Kanwatchara et al. 2021, "Rational LAMOL: A Rationale-Based Lifelong Learning Framework", ACL. For each task
after the first: train freely -> vote (models/cci.py) -> train again from the model before the task, the chosen part
frozen. Frozen entries keep every bit, through weight decay and clipping; each task chooses anew (DECISIONS).
Rationales come from the data, from InvRat (methods/invrat.py) or from gradients.
"""

from typing import Literal, Self

from pydantic import model_validator

from cl_dist.methods.base import Method, TaskSequence
from cl_dist.methods.invrat import InvratConfig
from cl_dist.methods.lamol import LamolConfig, capabilities
from cl_dist.methods.lamol import plan as plan_lamol
from cl_dist.stage import Choose, Rationalise, Record, Stage, StageRef, Train, Vote, VoteConfig, model_after, ref


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
    def _units_are_named(self) -> Self:
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


METHOD = Method(
    config=RationalLamolConfig,
    plan=plan,
    learners={"lm": "cl_dist.learners.rational_lamol:RationalLamol", "invrat": "cl_dist.learners.invrat:Invrat"},
    capabilities=capabilities,
    about="LAMOL that keeps frozen what a vote over attention maps and rationales points at",
)
