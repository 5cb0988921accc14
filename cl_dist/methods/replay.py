"""Experience replay: one model that sees some kept rows of every earlier task again.

Source: Rolnick et al. 2019, "Experience replay for continual learning"; here with a fixed number of rows a task.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cl_dist.methods.base import Method, TaskSequence, sequential_stages
from cl_dist.methods.finetune import TunedConfig, capabilities
from cl_dist.stage import Stage


class ReplayConfig(TunedConfig):
    """Settings of replay."""

    name: Literal["replay"] = "replay"
    rows: int = Field(50, gt=0)
    """Train rows kept of every earlier task, chosen by the run's seed."""


def plan(config: ReplayConfig, tasks: TaskSequence, t: int) -> list[Stage]:
    """Train the previous model on the task's rows among kept ones of every earlier task, then score all seen tasks."""
    train, score = sequential_stages(tasks, t)
    return [train.model_copy(update={"replay": tuple(range(t)), "replay_rows": config.rows if t else 0}), score]


METHOD = Method(
    config=ReplayConfig,
    plan=plan,
    learners={"classifier": "cl_dist.learners.finetune:Finetune", "lm": "cl_dist.learners.text:TextLearner"},
    capabilities=capabilities,
    about="one model that sees some kept rows of every earlier task again",
)
