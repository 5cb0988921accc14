"""A causal language model that answers questions: the base of every method on decoders."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cl_dist.data.language import QA, EncodingOptions, LanguageRows, special
from cl_dist.learners.base import Learner, Loss, Progress, no_effect_transforms
from cl_dist.methods.base import MethodConfig
from cl_dist.methods.finetune import TunedConfig
from cl_dist.models.architectures import embedding_names
from cl_dist.models.attention_slices import no_effect_biases
from cl_dist.models.backbone import load_tokenizer
from cl_dist.models.causal import LOSS, RIGHT, CausalModel, per_row
from cl_dist.models.classifier import Batch
from cl_dist.models.config import LoraShape, check_length
from cl_dist.models.lowrank import add_update, own_parameters
from cl_dist.models.vocabulary import add_trainable_rows, extend_vocabulary
from cl_dist.parallel.gradients import GradientTransform
from cl_dist.parallel.seeds import seeded

UPDATE = "tasks"
"""Name of the low-rank update that all tasks share."""


class TextLearner(Learner):
    """Trains the whole language model, all of it but the embeddings, or low-rank updates of it, on the answers."""

    config: MethodConfig
    model: CausalModel

    def build(self, backbone: PreTrainedModel, task: int) -> nn.Module:
        """See Learner. The vocabulary gets rows for the special tokens of the tasks so far and of those to come."""
        known = special(load_tokenizer(self.model_config))
        return self.build_for_vocab(
            backbone, known.base, known.size(len(self.num_labels), self.model_config.spare_task_tokens)
        )

    def build_for_vocab(self, backbone: PreTrainedModel, known: int, size: int) -> nn.Module:
        """Build the model for a vocabulary of some size, whose rows from `known` on are new."""
        dtype = getattr(torch, self.model_config.dtype)
        if self.lora is None:
            extend_vocabulary(backbone, size, known, self.seed, dtype)
        else:
            add_trainable_rows(backbone, size, known, self.seed, dtype)
            with seeded(self.seed, "lora"):
                add_update(backbone, self.lora, UPDATE)
        self.model = CausalModel(backbone)
        return self.model

    @property
    def lora(self) -> LoraShape | None:
        """The low-rank updates that are trained instead of the backbone."""
        return None

    @property
    def tune(self) -> Literal["all", "layers", "head"]:
        """The part of the backbone that is trained without `lora`."""
        return self.config.tune if isinstance(self.config, TunedConfig) else "all"

    def resize_stored(self, name: str, stored: Tensor, initial: Tensor) -> Tensor:
        """See Learner: an earlier task may have been trained with fewer or more rows of the vocabulary."""
        if stored.dim() == initial.dim() and stored.dim() and stored.shape[1:] == initial.shape[1:]:
            return torch.cat([stored[: len(initial)].to(initial), initial[len(stored) :]])
        return stored

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """Train the language model, or its updates and the rows of special tokens.

        Biases without effect stay as they are (see models.attention_slices.no_effect_biases).
        """
        tune, backbone = self.tune, self.model.backbone
        if self.lora is not None:
            own = own_parameters(backbone)
            for name, parameter in backbone.named_parameters():
                parameter.requires_grad_(name in own)
            return
        embeddings = embedding_names(backbone)
        idle = {name for name, keep in no_effect_biases(backbone).items() if keep is None}
        for name, parameter in backbone.named_parameters():
            is_trained = name in embeddings if tune == "head" else tune == "all" or name not in embeddings
            parameter.requires_grad_(is_trained and name not in idle)

    def gradient_transforms(self) -> Mapping[str, GradientTransform]:
        """Freeze the biases without effect that share a vector with others, as in GPT-2."""
        return no_effect_transforms(self.model.backbone)

    def rows(self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, training: bool) -> LanguageRows:
        """See Learner: questions with their answers.

        Raises:
            ConfigError: If max_length exceeds the model's positions.
        """
        check_length(max_length, getattr(self.model.backbone.config, "max_position_embeddings", None))
        options = self.encoding_options(training=training)
        return LanguageRows(
            tokenizer,
            max_length,
            samples=options.samples,
            per_task=options.per_task,
            ans_weight=options.ans_weight,
        )

    def encoding_options(self, *, training: bool) -> EncodingOptions:
        """Return how rows are laid out."""
        return EncodingOptions()

    def loss(self, model: Callable[[Any], Tensor], batch: Batch, progress: Progress) -> Loss:
        """Return the cross-entropy of each row's answer, summed over its tokens."""
        return Loss({"qa_loss": per_row(model(batch)[:, LOSS], batch, QA)})

    def score_examples(self, output: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the cross-entropy per token of each answer, and whether greedy decoding would write it."""
        ones = output.new_ones(len(output))
        tokens_B = per_row(ones, batch, QA)
        return per_row(output[:, LOSS], batch, QA) / tokens_B, per_row(output[:, RIGHT], batch, QA) == tokens_B

    def activate(self, task: int, without: str | None = None) -> None:
        """See Learner: one model answers for all tasks, the question says which."""
