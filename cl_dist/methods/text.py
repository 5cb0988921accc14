"""A causal language model that answers questions in words: what every method on decoders starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cl_dist.methods.base import Learner, Loss, MethodConfig, Progress, no_effect_scales

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cl_dist.data.language import LanguageRows
    from cl_dist.models.causal import CausalModel
    from cl_dist.models.classifier import Batch
    from cl_dist.models.config import LoraShape
    from cl_dist.parallel.engine import GradScale

UPDATE = "tasks"
"""Name of the low-rank update that all tasks share."""


class TextLearner(Learner):
    """Trains the whole language model, all of it but the embeddings, or low-rank updates of it, on the answers."""

    config: MethodConfig
    model: CausalModel
    output: ClassVar[Literal["classifier", "lm"]] = "lm"

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner. The vocabulary gets rows for the special tokens of the tasks so far and of those to come."""
        from cl_dist.data.language import special
        from cl_dist.models.backbone import load_tokenizer

        known = special(load_tokenizer(self.model_config))
        return self.shape(backbone, known.base, known.size(len(self.num_labels), self.model_config.spare_task_tokens))

    def shape(self, backbone: PreTrainedModel, known: int, size: int) -> nn.Module:
        """Build the model for a vocabulary of some size, whose rows from `known` on are new."""
        import torch

        from cl_dist.models.causal import CausalModel
        from cl_dist.models.vocabulary import add_trainable_rows, extend_vocabulary
        from cl_dist.parallel.seeds import seeded

        dtype = getattr(torch, self.model_config.dtype)
        if self.lora is None:
            extend_vocabulary(backbone, size, known, self.seed, dtype)
        else:
            from cl_dist.models.lowrank import add_update  # peft takes seconds to import

            add_trainable_rows(backbone, size, known, self.seed, dtype)
            with seeded(self.seed, "lora"):
                add_update(backbone, self.lora, UPDATE)
        self.model = CausalModel(backbone)
        return self.model

    @property
    def lora(self) -> LoraShape | None:
        """The low-rank updates that are trained in the place of the backbone, if any are."""
        return getattr(self.config, "lora", None)

    @property
    def takes_partitioned(self) -> bool:
        """See Learner."""
        return True

    @property
    def freezes_backbone(self) -> bool:
        """See Learner."""
        return self.lora is not None

    def resize_stored(self, name: str, stored: Tensor, initial: Tensor) -> Tensor:
        """See Learner: an earlier task was perhaps trained with fewer rows of the vocabulary, a later one with more."""
        import torch

        if stored.dim() == initial.dim() and stored.dim() and stored.shape[1:] == initial.shape[1:]:
            return torch.cat([stored[: len(initial)].to(initial), initial[len(stored) :]])
        return stored

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Train the language model, or its updates and the rows of special tokens.

        Biases that change nothing stay as they are (see models.heads.idle_biases).
        """
        from cl_dist.models.architectures import embedding_names
        from cl_dist.models.attention_slices import no_effect_biases

        tune, backbone = getattr(self.config, "tune", "all"), self.model.backbone
        if self.lora is not None:
            from cl_dist.models.lowrank import own_parameters

            own = own_parameters(backbone)
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(name in own)
            return
        embeddings = embedding_names(backbone)
        idle = {name for name, keep in no_effect_biases(backbone).items() if keep is None}
        for name, parameter in backbone.named_parameters():
            is_trained = name in embeddings if tune == "head" else tune == "all" or name not in embeddings
            parameter.requires_grad_(is_trained and name not in idle)

    def grad_scales(self) -> Mapping[str, GradScale]:
        """Keep the biases that change nothing where others lie in the same vector, as in GPT-2."""
        return no_effect_scales(self.model.backbone)

    def rows(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, training: bool) -> LanguageRows:
        """See Learner: questions with their answers.

        Raises:
            ConfigError: If the model cannot read so long a row.
        """
        from cl_dist.data.language import LanguageRows
        from cl_dist.models.config import check_length

        check_length(max_length, getattr(self.model.backbone.config, "max_position_embeddings", None))
        return LanguageRows(tokenizer, max_length, **self.reading(training=training))

    def reading(self, *, training: bool) -> dict[str, Any]:
        """Return how rows are laid out, as arguments of LanguageRows."""
        return {}

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the cross-entropy of each row's answer, summed over its tokens."""
        from cl_dist.data.language import QA
        from cl_dist.models.causal import LOSS, per_row

        return Loss(rows={"qa_loss": per_row(model(batch)[:, LOSS], batch, QA)}, own={})

    def score_examples(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy per token of each answer, and whether greedy decoding would write it."""
        from cl_dist.data.language import QA
        from cl_dist.models.causal import LOSS, RIGHT, per_row

        ones = output.new_ones(len(output))
        tokens_B = per_row(ones, batch, QA)
        return per_row(output[:, LOSS], batch, QA) / tokens_B, per_row(output[:, RIGHT], batch, QA) == tokens_B

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner: one model answers for all tasks, the question says which."""
