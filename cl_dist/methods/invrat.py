"""InvRat: learns which words of a text decide its label, where nobody has marked them (models/invrat.py).

A Train stage per restart; the one with the highest dev accuracy finds the rationales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from cl_dist.config import Section
from cl_dist.methods.base import Learner, Loss, Progress
from cl_dist.stage import TrainConfig

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cl_dist.data.environments import RationaleExamples
    from cl_dist.models.classifier import Batch
    from cl_dist.models.invrat import Players


class InvratTrain(TrainConfig):
    """How InvRat's players are trained."""

    epochs: int = Field(20, gt=0)
    lr: float = Field(1e-3, gt=0)
    global_batch: int = Field(64, gt=0)
    max_length: int = Field(300, gt=2)
    min_round_steps: int = Field(10, gt=0)


class InvratConfig(Section):
    """Settings of InvRat. It gives what environments share; a hint that holds in one of them only is none."""

    size: int = Field(100, gt=0)
    """Units of each player's GRU, per direction."""
    share: float = Field(0.2, gt=0, lt=1)
    """Share of a text's tokens that a rationale should have."""
    share_weight: float = Field(1.0, ge=0)
    """Weight of the deviation from that share."""
    breaks_weight: float = Field(5.0, ge=0)
    """Weight of the changes between selected and not selected: higher, and rationales are fewer and longer spans."""
    gap_weight: float = Field(10.0, ge=0)
    """Weight of what knowing the environment gains."""
    environments: int = Field(2, gt=1)
    """How many there are: values of `tasks.<id>.environment`, or else parts of equal size, by how surprising a word
    classifier finds a row's label."""
    restarts: int = Field(3, gt=0)
    """Players are trained so often, from other seeds."""
    train: InvratTrain = InvratTrain()


class Invrat(Learner):
    """Trains the players on one task, that before the stage's."""

    model: Players
    output: ClassVar[Literal["classifier", "lm"]] = "lm"

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner. Of the backbone the embeddings are used."""
        from cl_dist.models.invrat import Players

        settings: InvratConfig = self.config.invrat
        untyped: Any = backbone  # the library's methods carry no types
        embedding = untyped.get_input_embeddings().weight.detach().clone()
        self.model = Players(
            embedding,
            size=settings.size,
            classes=self.num_labels[task - 1],
            environments=settings.environments,
            share=settings.share,
            gap_weight=settings.gap_weight,
        )
        return self.model

    def rows(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, training: bool) -> RationaleExamples:
        """See Learner. Who is told the environment plays in training only."""
        from cl_dist.data.environments import RationaleExamples

        return RationaleExamples(tokenizer, max_length, self.config.invrat.environments if training else None)

    def loss(self, model: Callable[[Batch], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the two guesses' cross-entropies, and how far a selection is from a short one in one piece."""
        from cl_dist.models.invrat import AGNOSTIC, AWARE, BREAKS, SHARE

        settings: InvratConfig = self.config.invrat
        found = model(batch)
        rows = {"agnostic": found[:, AGNOSTIC], "aware": found[:, AWARE]}
        rows |= {"share": settings.share_weight * found[:, SHARE], "breaks": settings.breaks_weight * found[:, BREAKS]}
        return Loss(rows=rows, own={})

    def score_examples(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Learner: by the guess that is not told the environment."""
        from cl_dist.models.invrat import AGNOSTIC, RIGHT

        return output[:, AGNOSTIC], output[:, RIGHT] == 1

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner: there is one task."""
