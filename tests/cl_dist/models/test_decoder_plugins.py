"""CTR, HAT and adapters in decoders: the last token answers, whatever stands beside a row and on either side of it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cl_dist.errors import ConfigError
from cl_dist.learners.base import Learner
from cl_dist.learners.ctr import Ctr
from cl_dist.learners.finetune import Finetune
from cl_dist.learners.hat import Hat
from cl_dist.learners.houlsby import Houlsby
from cl_dist.learners.lora import Lora
from cl_dist.methods.ctr import CtrConfig
from cl_dist.methods.finetune import FinetuneConfig
from cl_dist.methods.hat import HatConfig
from cl_dist.methods.houlsby import HoulsbyConfig
from cl_dist.methods.lora import LoraConfig
from cl_dist.models.architectures import embedding_names
from cl_dist.models.attention_slices import no_effect_biases
from cl_dist.models.classifier import Batch, Classifier
from cl_dist.models.config import ModelConfig
from tests.architectures import DECODERS, KINDS, PAD, WORDS, tiny
from tests.encoders import SHAPE, batch_of, select, train

LEARNERS: dict[str, tuple[type[Learner], Any]] = {
    "ctr": (Ctr, CtrConfig(**SHAPE.changed())),
    "hat": (Hat, HatConfig(tsm_size=24, s_max=50.0)),
    "adapter": (Houlsby, HoulsbyConfig(size=8)),
    "lora": (Lora, LoraConfig(r=4)),
}
BATCHES = [batch_of(seed=seed) for seed in range(6)]


def learner_of(method: str, kind: str) -> Any:
    """The learner of a method with two tasks, both trained on a few rows."""
    cls, config = LEARNERS[method]
    learner = cls(config, (2, 2), ModelConfig(source="."), 0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learner.build(tiny(kind), 1)
    return learner


@torch.no_grad()
def logits(learner: Any, task: int, batch: Batch) -> Tensor:
    learner.activate(task)
    found: Tensor = learner.model(batch)
    return found


def padded_left(batch: Batch, more: int = 0) -> Batch:
    """Return the same rows with their padding in front of them, and some more of it."""
    moved = {"input_ids": PAD, "attention_mask": 0}
    found = dict(batch)
    for name, fill in moved.items():
        rows = [
            F.pad(row[:n], (len(row) - n + more, 0), value=fill)
            for row, n in zip(batch[name], lengths(batch), strict=True)
        ]
        found[name] = torch.stack(rows)
    return found


def lengths(batch: Batch) -> list[int]:
    found: list[int] = batch["attention_mask"].sum(1).tolist()
    return found


@pytest.mark.parametrize("kind", DECODERS)
def test_an_answer_depends_neither_on_other_rows_nor_on_padding_of_either_side(kind: str) -> None:
    learner = learner_of("ctr", kind)
    for task in (0, 1):
        train(learner, task, BATCHES[3 * task : 3 * task + 3])
    batch = batch_of(seed=9)
    for task in (0, 1):  # the second one has a router that reads all tokens of the row
        together = logits(learner, task, batch)
        assert together.std(0).max() > 1e-2
        others = [padded_left(batch), padded_left(batch, 3), batch_of(pad_to=20, seed=9)]
        for other in others:
            torch.testing.assert_close(logits(learner, task, other), together, rtol=0, atol=1e-5)
        for row, length in enumerate(lengths(batch)):
            alone = logits(learner, task, select(batch, [row], length))
            torch.testing.assert_close(alone, together[[row]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3_text"])
@torch.no_grad()
def test_the_last_token_answers_and_has_read_the_whole_row(kind: str) -> None:
    model = Classifier(tiny(kind), None)
    model.add_head(2)
    batch = batch_of()
    ids: Any = batch["input_ids"]
    for row, length in enumerate(lengths(batch)):
        backbone: Any = tiny(kind)
        hidden_LH = backbone(ids[row : row + 1, :length]).last_hidden_state[0]
        torch.testing.assert_close(model(batch)[row], model.heads[0](hidden_LH[-1]), rtol=0, atol=1e-5)
    changed = dict(batch) | {"input_ids": ids.clone()}
    changed["input_ids"][:, 0] = (ids[:, 0] + 1) % (WORDS - 5) + 5
    assert ((model(changed) - model(batch)).abs().amax(1) > 1e-4).all()


@pytest.mark.parametrize(
    ("kind", "pooling"),
    [("bert", "mean"), ("bert", "cls"), ("bert", "last"), ("gpt2", "mean"), ("gpt2", "last")],
)
@torch.no_grad()
def test_every_sentence_vector_ignores_padding_of_either_side(kind: str, pooling: str) -> None:
    model = Classifier(tiny(kind), pooling)
    model.add_head(3)
    batch = batch_of()
    if kind == "gpt2":  # an encoder counts its places from the first one, padding or not
        torch.testing.assert_close(model(padded_left(batch, 2)), model(batch), rtol=0, atol=1e-5)
    torch.testing.assert_close(model(batch_of(pad_to=19)), model(batch), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("bert", "roberta")])
def test_a_pooler_that_is_not_there_is_an_error_of_the_setting(kind: str) -> None:
    with pytest.raises(ConfigError, match=rf"science\.model\.pooling='pooler': a {kind} has no pooler"):
        Classifier(tiny(kind), "pooler")


def test_the_first_token_of_a_decoder_is_no_sentence_vector() -> None:
    with pytest.raises(ConfigError, match=r"science\.model\.pooling='cls': .* a gpt2 .*; set last or mean"):
        Classifier(tiny("gpt2"), "cls")


@pytest.mark.parametrize("kind", ["gpt2", "llama", "phi", "olmo2"])
@pytest.mark.parametrize("method", LEARNERS)
def test_old_tasks_keep_every_bit_of_their_logits(method: str, kind: str) -> None:
    learner, batch = learner_of(method, kind), batch_of(seed=9)
    untrained = logits(learner, 0, batch)
    train(learner, 0, BATCHES[:3], weight_decay=0.5)
    before, second = logits(learner, 0, batch), logits(learner, 1, batch)
    assert not torch.equal(before, untrained)
    train(learner, 1, BATCHES[3:], weight_decay=0.5)
    torch.testing.assert_close(logits(learner, 0, batch), before, rtol=0, atol=0)
    assert not torch.equal(logits(learner, 1, batch), second)


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "phi", "gpt_neox"])
@pytest.mark.parametrize("tune", ["all", "layers", "head"])
def test_an_unprotected_decoder_trains_what_tune_says_and_no_idle_bias(kind: str, tune: Any) -> None:
    learner = Finetune(FinetuneConfig(name="sequential", tune=tune), (2,), ModelConfig(source="."), 0)
    learner.build(tiny(kind), 0)
    start = {name: p.detach().clone() for name, p in learner.model.backbone.named_parameters()}
    train(learner, 0, BATCHES[:2])
    idle = no_effect_biases(learner.model.backbone)
    inside = embedding_names(learner.model.backbone)
    for name, parameter in learner.model.backbone.named_parameters():
        moved = parameter != start[name]
        may_move = torch.ones(()) * (tune == "all" or (tune == "layers" and name not in inside))
        if name in idle:
            keep = idle[name]
            may_move = may_move * (torch.zeros(len(parameter)) if keep is None else keep)
            assert torch.equal(moved, may_move > 0)
        assert bool(moved.any()) == bool((may_move > 0).any()), name
