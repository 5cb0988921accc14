"""InvRat: trains the players that find rationales (models/invrat.py)."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cl_dist.data.environments import RationaleExamples
from cl_dist.learners.base import Learner, Loss, Progress
from cl_dist.methods.rational_lamol import RationalLamolConfig
from cl_dist.models.classifier import Batch
from cl_dist.models.invrat import AGNOSTIC, AWARE, BREAKS, RIGHT, SHARE, Players


class Invrat(Learner):
    """Trains the players on the task before the stage's."""

    config: RationalLamolConfig
    model: Players

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner. The players use the embeddings of the backbone."""
        settings = self.config.invrat
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
        """See Learner. The predictor that reads the environment takes part in training only."""
        return RationaleExamples(tokenizer, max_length, self.config.invrat.environments if training else None)

    def loss(self, model: Callable[[Batch], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the two guesses' cross-entropies, and how far a selection is from a short one in one piece."""
        settings = self.config.invrat
        found = model(batch)
        rows = {"agnostic": found[:, AGNOSTIC], "aware": found[:, AWARE]}
        rows |= {"share": settings.share_weight * found[:, SHARE], "breaks": settings.breaks_weight * found[:, BREAKS]}
        return Loss(rows)

    def score_examples(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """See Learner: by the predictor that does not read the environment."""
        return output[:, AGNOSTIC], output[:, RIGHT] == 1

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner: there is one task."""
