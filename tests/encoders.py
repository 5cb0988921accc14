"""Tiny encoders of three architectures, batches of token ids, and a training loop of ten lines.

Two layers of width 32, with weights of a size as if trained: with std 0.02 the layers of so narrow a model say nothing.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from cl_dist.learners.base import Learner
from cl_dist.models.classifier import Batch
from cl_dist.models.config import PluginShape
from cl_dist.models.plugin import CtrClassifier
from cl_dist.parallel.engine import Optimizing, TorchEngine, attach
from cl_dist.parallel.world import World
from cl_dist.stages.schedule import Schedule

KINDS = ("bert", "roberta", "distilbert")
PAD, WORDS, WIDTH, MAX_LENGTH = 1, 40, 32, 24  # roberta counts its positions from the padding token's number
SHAPE = PluginShape(tsm_size=24, capsule_mid=6, filters=5, s_max=50.0)


def encoder(kind: str = "bert", layers: int = 2) -> PreTrainedModel:
    """Return an encoder with random weights: equal ones at each call."""
    width: dict[str, Any] = {"vocab_size": WORDS, "pad_token_id": PAD, "max_position_embeddings": MAX_LENGTH + PAD + 1}
    bert: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    distil: dict[str, Any] = {"dim": WIDTH, "n_layers": layers, "n_heads": 2, "hidden_dim": 48}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model: PreTrainedModel
        if kind == "bert":
            model = BertModel(BertConfig(**width, **bert, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        elif kind == "roberta":
            no_dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
            model = RobertaModel(RobertaConfig(**width, **bert, **no_dropout))
        else:
            model = DistilBertModel(DistilBertConfig(**width, **distil, dropout=0.0, attention_dropout=0.0))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15)
    return model


def batch_of(lengths: tuple[int, ...] = (9, 4, 7, 12, 5, 9), pad_to: int = 0, seed: int = 3) -> Batch:
    """Return rows of these lengths, numbered through, labelled 0 and 1 by turns; weights are one."""
    generator = torch.Generator().manual_seed(seed)
    length = max(*lengths, pad_to)
    ids_BL = torch.randint(5, WORDS, (len(lengths), MAX_LENGTH), generator=generator)[:, :length]
    mask_BL = torch.arange(length)[None] < torch.tensor(lengths)[:, None]
    number_B = torch.arange(len(lengths))
    return {
        "input_ids": torch.where(mask_BL, ids_BL, PAD),
        "attention_mask": mask_BL.long(),
        "label": number_B % 2,
        "row": number_B,
        "weight": torch.ones(len(lengths)),
    }


def select(batch: Batch, rows: list[int], length: int | None = None) -> Batch:
    """Return some rows of a batch in this order, cut to a length that none of them exceeds."""
    cut = {key: value[rows] for key, value in batch.items()}
    return cut | {key: cut[key][:, :length] for key in ("input_ids", "attention_mask")}


def with_plugins(kind: str = "bert", num_tasks: int = 1, shape: PluginShape = SHAPE, seed: int = 0) -> CtrClassifier:
    """Return a model with parts for some tasks, none of them trained, the last one active."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CtrClassifier(encoder(kind), shape)
        for _ in range(num_tasks):
            model.add_task(2)
    model.activate(num_tasks - 1)
    return model


def train(
    learner: Learner,
    task: int,
    batches: list[Batch],
    lr: float = 0.01,
    weight_decay: float = 0.1,
) -> None:
    """Train a task as a Train stage does, one optimizer step a batch, in a single annealing cycle."""
    learner.start_task(task, (task,))
    scales = learner.gradient_transforms()
    attach(learner.model, scales)
    optimizing = Optimizing(
        lr=lr,
        lr_of=learner.learning_rates(),
        no_decay=frozenset(scales),
        weight_decay=weight_decay,
        clip=1.0,
        total_steps=len(batches),
        warmup_steps=0,
    )
    engine = TorchEngine(learner.model, optimizing, 1, World(0, 1, torch.device("cpu")), learner.penalties())
    schedule = Schedule(total_steps=len(batches), steps_per_epoch=1, min_round_steps=len(batches))
    engine.module.train()
    for step, batch in enumerate(batches):
        loss = learner.loss(engine, batch, schedule.at(step))
        engine.backward(loss.per_example["ce"].mean(), sum(loss.regularizers.values(), torch.zeros(())))
        engine.step()
    learner.activate(task)
    learner.end_task({name: p.detach().clone() for name, p in learner.model.named_parameters()}, ())
    engine.module.eval()


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of all parameters by name."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
