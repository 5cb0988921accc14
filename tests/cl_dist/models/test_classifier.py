import math

import pytest
import torch
from torch import Tensor

from cl_dist.models.classifier import Classifier, count_parameters, cross_entropy, freeze
from tests.encoders import KINDS, WIDTH, batch_of, encoder, select

NUM_LABELS = (2, 5, 3)


def classifier(kind: str = "bert", pooling: str = "mean") -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Classifier(encoder(kind), pooling)
        for count in NUM_LABELS:
            model.add_head(count)
    return model.eval()


def gradient(model: Classifier, task: int) -> Tensor:
    found = dict(model.named_parameters())[f"heads.{task}.weight"].grad
    assert found is not None
    return found


@pytest.mark.parametrize("task", range(3))
def test_the_head_of_the_active_task_answers(task: int) -> None:
    model, batch = classifier(), batch_of()
    model.task = task
    with torch.no_grad():
        found = model(batch)
        hidden = encoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        for row, length in enumerate(batch["attention_mask"].sum(1)):
            mean = hidden[row, :length].mean(0)  # of the tokens, not of the padding
            torch.testing.assert_close(found[row], model.heads[task](mean))
    assert found.shape == (6, NUM_LABELS[task])


def test_a_new_head_starts_small_and_without_bias() -> None:
    model = Classifier(encoder(), "mean")
    model.add_head(500)
    head = model.heads[0].state_dict()
    assert head["weight"].shape == (500, WIDTH)
    assert head["weight"].std().item() == pytest.approx(0.02, rel=0.05)
    assert not head["bias"].any()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_sentence_vector_ignores_padding(kind: str, pooling: str) -> None:
    model, short, long = classifier(kind, pooling), batch_of(), batch_of(pad_to=20)
    with torch.no_grad():
        torch.testing.assert_close(model(long), model(short), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(select(short, [1], 4)), model(short)[[1]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "pooler"])
def test_cls_and_pooler_read_the_first_token(pooling: str) -> None:
    model, batch = classifier(pooling=pooling), batch_of()
    with torch.no_grad():
        first = encoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state[:, 0]
        if pooling == "pooler":
            weights = model.backbone.state_dict()
            first = torch.tanh(first @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])
        torch.testing.assert_close(model(batch), model.heads[0](first))


def test_in_a_mixed_batch_each_row_is_answered_by_the_head_of_its_task() -> None:
    model, batch = classifier(), batch_of()
    batch["task"] = torch.tensor([2, 0, 1, 1, 2, 0])
    batch["label"] = torch.tensor([2, 1, 4, 0, 1, 0])
    model.task = None
    mixed = model(batch)
    losses = cross_entropy(mixed, batch)
    assert mixed.shape == (6, 5)
    for row, task in enumerate(batch["task"].tolist()):
        model.task = task
        alone = model(batch)[row]
        torch.testing.assert_close(mixed[row, : NUM_LABELS[task]], alone)
        expected = -math.log(alone.softmax(0)[batch["label"][row]].item())
        assert losses[row].item() == pytest.approx(expected, rel=1e-4)
        assert mixed[row].argmax() < NUM_LABELS[task]


def test_a_mixed_batch_teaches_each_head_its_own_rows() -> None:
    model, batch = classifier(), batch_of()
    batch["task"], batch["label"] = torch.tensor([2, 0, 0, 0, 2, 0]), torch.tensor([2, 1, 1, 0, 1, 0])
    model.task = None
    cross_entropy(model(batch), batch).sum().backward()
    mixed = [gradient(model, task).clone() for task in range(3)]
    assert not mixed[1].any()
    for task, rows in ((0, [1, 2, 3, 5]), (2, [0, 4])):
        model.zero_grad()
        model.task = task
        cross_entropy(model(batch)[rows], select(batch, rows)).sum().backward()
        torch.testing.assert_close(gradient(model, task), mixed[task], rtol=1e-4, atol=1e-6)


def test_cross_entropy_is_one_number_a_row_in_float32() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.bfloat16)
    found = cross_entropy(logits, {"label": torch.tensor([0, 1])})
    torch.testing.assert_close(found, torch.tensor([math.log(1 + math.exp(-2.0)), math.log(2.0)]))


def test_frozen_parameters_are_counted_but_not_as_trainable() -> None:
    model = classifier()
    heads = sum(WIDTH * count + count for count in NUM_LABELS)
    total = sum(parameter.numel() for parameter in model.parameters())
    freeze(model.backbone)
    assert count_parameters(model) == (heads, total)
