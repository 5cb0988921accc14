"""The parts of a method that need no torch: its settings, its plan, and what it can do.

A worker resolves the learner, which trains, by name: see cl_dist.learners.base.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cl_dist.config import Section
from cl_dist.data.tasks import TaskConfig
from cl_dist.errors import ConfigError
from cl_dist.models.config import ModelConfig
from cl_dist.stage import Evaluate, Stage, StageRef, Train, model_after

OUTPUTS = ("classifier", "lm")


class MethodConfig(Section):
    """Settings of a method; each method derives its own."""

    name: str


@dataclass(frozen=True, slots=True)
class TaskSequence:
    """The tasks in learned order."""

    tasks: tuple[TaskConfig, ...]

    def __len__(self) -> int:
        return len(self.tasks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """Facts about a method's learner which the driver checks settings by and the worker builds the model by.

    The contract suite (cl_dist/contract) derives each of them from a run, except `slow_steps` and `slow_parts`, which
    are advice, and names the one that is wrong.
    """

    freezes_backbone: bool = False
    """No pretrained weight is trained."""
    isolated: bool = False
    """Learning a task changes no bit of the outputs of earlier tasks."""
    penalties: bool = False
    """The learner returns `penalties`: refused with offload under ZeRO 1 and 2, where gradients are out of reach."""
    teacher: bool = False
    """The learner keeps a copy of the backbone as it was before the task."""
    takes_partitioned: bool = False
    """The learner builds on a backbone that ZeRO-3 has partitioned while it was loaded. It then reads none of the
    backbone's weights before training, except the ones that it copies by `partition.gathered`."""
    takes_quantized: bool = False
    """The learner works on linear layers with quantized weights: it neither trains nor wraps them."""
    start_rows: int = 0
    """Train rows of a later task that `nearest` reads before training, on rank 0."""
    end_rows: int = 0
    """Train rows that `end_task` reads; above 0 it gets the finished model, whole on every rank."""
    slow_steps: int = 0
    """Optimizer steps that `slow_parts` need to move far from their initial values. A task with fewer gets a hint from
    `check`, `plan` and `train`."""
    slow_parts: str = ""
    """Parts of the learner that training moves slowly, as a plural for messages: "masks and routers"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A method, as METHODS or another package names it; nothing inherits from it."""

    config: type[MethodConfig]
    plan: Callable[[Any, TaskSequence, int], list[Stage]]
    """(config, tasks, t) -> the stages of task t, in order. Pure: no torch, no Ray, no disk."""
    learners: Mapping[str, str]
    """Learner classes by name, as 'module:Class'; resolved in the worker, so that a driver needs no torch. The one of
    name "classifier" picks a label, "lm" generates text: `science.model.output` chooses, else it is the first. A Train
    stage may name any other one."""
    about: str
    """One line for `cl-dist list methods`."""
    capabilities: Capabilities | Callable[[Any, ModelConfig], Capabilities] = Capabilities()
    """What the learner of the run's output can do; a function of (config, model) where settings decide that."""
    version: str = ""
    """Enters the fingerprint of Train stages unless it is empty. Raise it when the method's code changes results;
    fingerprints do not contain code."""

    def output(self, wanted: str | None) -> str:
        """Return what a run of this method puts on the backbone: "classifier" or "lm" (a language-model head).

        Raises:
            ConfigError: If the method does not support `wanted`.
        """
        known = [name for name in self.learners if name in OUTPUTS]
        if wanted is None or wanted in known:
            return wanted or known[0]
        raise ConfigError(f"science.model.output={wanted!r}: this method supports {known[0]!r}")

    def capabilities_of(self, config: MethodConfig, model: ModelConfig, learner: str | None = None) -> Capabilities:
        """Return the capabilities of the run's learner; one of another name, which a plan asks for, has none."""
        if learner is not None and learner not in OUTPUTS:
            return Capabilities()
        found = self.capabilities
        return found if isinstance(found, Capabilities) else found(config, model)


def score_seen(task: int) -> Evaluate:
    """Score the tasks seen so far with the model after this one: the last stage of most plans."""
    return Evaluate(task=task, model=model_after(task), tasks=tuple(range(task + 1)))


def sequential_stages(tasks: TaskSequence, t: int) -> tuple[Train, Evaluate]:
    """Train the previous task's model on task t, then score all seen tasks."""
    return Train(task=t, data=(t,), init=model_after(t - 1) if t else None), score_seen(t)


def plan_sequential(config: Any, tasks: TaskSequence, t: int) -> list[Stage]:
    """Go on training the previous task's model, and score all seen tasks: the plan of most methods."""
    return list(sequential_stages(tasks, t))


def evaluated(task: int) -> StageRef:
    """Name the Evaluate stage of a task."""
    return StageRef(task=task, stage="evaluate")
