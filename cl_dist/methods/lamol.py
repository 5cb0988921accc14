"""LAMOL: one causal language model that learns, answers, and writes samples of its earlier tasks to rehearse them.

Source: Sun et al. 2020, "LAMOL: LAnguage MOdeling for Lifelong Language learning", ICLR. L = L_QA + lambda * L_LM, over
the rows of the new task and pseudo-samples of the earlier ones, written by the model before the new task.
Departs from the release: losses are means over the labels of the global batch, samples are drawn anew when they are
malformed, and answers are decoded greedily (DECISIONS).
`lamol_real` rehearses as many real rows instead: what pseudo-samples could reach at best.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from cl_dist.methods.base import Loss, Method, MethodConfig, Progress, TaskSequence, sequential_stages
from cl_dist.methods.text import TextLearner
from cl_dist.models.config import LoraShape
from cl_dist.stage import Budget, Generate, Stage, StageRef, model_after

if TYPE_CHECKING:
    from torch import Tensor

    from cl_dist.models.classifier import Batch


class LamolConfig(MethodConfig, Budget):
    """Settings of LAMOL and of its upper bound with real rows."""

    name: Literal["lamol", "lamol_real"]
    lm_weight: float = Field(0.25, ge=0)
    """lambda: the share of language modelling in the loss."""
    task_token: Literal["task", "shared"] = "task"
    """Whether a sample is asked for by its task's own token or by one for all tasks (LAMOL_TASK, LAMOL_GEN)."""
    ans_weight: float = Field(5.0, gt=0)
    """Weight, as a label, of the token between question and answer: 5 in the release. Samples without it are lost."""
    distill: float = Field(0.0, ge=0, le=1)
    """How far replayed rows are learned from the predictions of the model before the task instead of their labels."""
    tune: Literal["all", "layers"] = "all"
    """What is trained: the whole model, or all of it but the embeddings."""
    lora: LoraShape | None = None
    """Train low-rank updates, the same ones in every task, and the rows of special tokens, in a frozen backbone."""

    @model_validator(mode="after")
    def _one_thing_is_trained(self) -> Self:
        if self.lora is not None and self.tune != "all":
            raise ValueError("tune and lora both say what is trained; name one of them")
        return self

    def budget(self) -> Budget:
        """Return how much is replayed."""
        return Budget(gamma=self.gamma, min_replay=self.min_replay)


def plan(config: LamolConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """Write samples of the earlier tasks, train on them and on the task, then score all seen tasks."""
    train, score = sequential_stages(tasks, t)
    if t == 0 or (config.gamma == 0 and config.min_replay == 0):
        return [train, score]
    sources = tuple(range(t))
    if config.name == "lamol_real":
        return [train.model_copy(update={"replay": sources, "budget": config.budget()}), score]
    write = Generate(task=t, model=model_after(t - 1), sources=sources, budget=config.budget())
    return [write, train.model_copy(update={"samples": StageRef(task=t, stage=write.name)}), score]


class Lamol(TextLearner):
    """Trains the language model to answer, and to write rows of each task after the token that asks for them."""

    config: LamolConfig

    @property
    def takes_partitioned(self) -> bool:
        """See Learner. A teacher is a copy of the whole model."""
        return not self.config.distill

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See TextLearner. The weights at hand are those before the task: with distillation, a copy of them teaches."""
        from copy import deepcopy

        super().start_task(task, tasks)
        self.model.teach(deepcopy(self.model.backbone) if task and self.config.distill else None)

    def reading(self, *, training: bool) -> dict[str, Any]:
        """See TextLearner: in training each row is a question and a sample."""
        return {
            "samples": training and self.config.lm_weight > 0,
            "per_task": self.config.task_token == "task",
            "ans_weight": self.config.ans_weight,
        }

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the loss of each row as a question and as a sample, summed over its labels."""
        from cl_dist.data.language import LM, QA
        from cl_dist.models.causal import DISTANCE, LOSS, per_row

        output_N3 = model(batch)
        share_N = self.config.distill * batch["replayed"][batch["owner"]]
        loss_N = (1 - share_N) * output_N3[:, LOSS] + share_N * output_N3[:, DISTANCE]
        rows = {"qa_loss": per_row(loss_N, batch, QA)}
        if self.config.lm_weight:
            rows["lm_loss"] = self.config.lm_weight * per_row(loss_N, batch, LM)
        return Loss(rows=rows, own={})


LAMOL, LAMOL_REAL = (
    Method(config=LamolConfig, plan=plan, learners={"lm": "cl_dist.methods.lamol:Lamol"}, about=about)
    for about in (
        "a language model that writes pseudo-samples of its earlier tasks and rehearses them",
        "LAMOL with real rows of the earlier tasks in the place of pseudo-samples: its upper bound",
    )
)
