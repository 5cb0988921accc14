"""Writing row by row, checked against `generate` of transformers and against drawing by hand."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from cl_dist.models.decode import SPAN, DecodeBatch, greedy_decode, rows_within, sample_token

WORDS, END, PAD = 50, 0, 49
PROMPTS = [[5, 6, 7], [9] * 11, [3], [3, 1, 4, 1, 5, 9, 2, 6]]


def decoder(kind: str) -> PreTrainedModel:
    """Return a tiny decoder with random weights; the Llama's queries share keys in pairs."""
    known: dict[str, Any] = {"vocab_size": WORDS, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model: PreTrainedModel
        if kind == "gpt2":
            model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **known))
        else:
            sizes: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
            model = LlamaForCausalLM(
                LlamaConfig(hidden_size=32, intermediate_size=64, max_position_embeddings=64, **sizes, **known)
            )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    untyped: Any = model
    return untyped.eval()


both = pytest.mark.parametrize("kind", ["gpt2", "llama"])


@both
def test_greedy_answers_are_those_of_generate_row_by_row(kind: str) -> None:
    model: Any = decoder(kind)
    found = greedy_decode(model, PROMPTS, PAD, END, 20)
    for prompt, answer in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        whole = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=20, eos_token_id=END, pad_token_id=PAD
        )
        expected = whole[0, len(prompt) :].tolist()
        assert answer == (expected[: expected.index(END)] if END in expected else expected)
    assert len({len(answer) for answer in found}) > 1 or kind == "gpt2"


@both
def test_a_row_that_starts_anew_forgets_what_stood_there(kind: str) -> None:
    model = decoder(kind)
    writer, fresh = DecodeBatch(model, 2, 40), DecodeBatch(model, 2, 40)
    places = torch.arange(SPAN + 4)
    for at in places:  # beyond one span, so that the length of the cache grows
        writer.step(torch.tensor([3, 4 + int(at) % 5]), torch.stack([at, at]))
    again = [writer.step(torch.tensor([7 + at, 8]), torch.tensor([at, SPAN + 4 + at])) for at in range(3)]
    first = [fresh.step(torch.tensor([7 + at, 8]), torch.tensor([at, at])) for at in range(3)]
    for found, expected in zip(again, first, strict=True):
        torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
        assert (found[1] - expected[1]).abs().max() > 1e-3  # the other row has gone on


@both
def test_rows_that_are_kept_go_on_undisturbed(kind: str) -> None:
    model = decoder(kind)
    whole, part = DecodeBatch(model, 3, 16), DecodeBatch(model, 3, 16)
    for writer in (whole, part):
        writer.step(torch.tensor([1, 2, 3]), torch.zeros(3, dtype=torch.int64))
    part.keep([2, 0])
    expected = whole.step(torch.tensor([4, 5, 6]), torch.ones(3, dtype=torch.int64))
    found = part.step(torch.tensor([6, 4]), torch.ones(2, dtype=torch.int64))
    torch.testing.assert_close(found, expected[[2, 0]], rtol=0, atol=1e-5)


def draws(logits: list[float], count: int = 20_000, **over: Any) -> torch.Tensor:
    """Return how often each token is drawn, as shares."""
    settings = {"top_k": 0, "top_p": 1.0, "temperature": 1.0} | over
    key_B = torch.full((count,), 12345)
    tokens = sample_token(torch.tensor([logits]).expand(count, -1), key_B, torch.arange(count), **settings)
    return torch.bincount(tokens, minlength=len(logits)) / count


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = [0.0, 1.0, 2.0, -1.0]
    expected = torch.tensor(logits).softmax(-1)
    torch.testing.assert_close(draws(logits), expected, rtol=0, atol=0.015)
    torch.testing.assert_close(
        draws(logits, temperature=2.0), (torch.tensor(logits) / 2).softmax(-1), rtol=0, atol=0.015
    )
    best = torch.tensor([0.0, 1.0, 2.0]).softmax(-1)[1:] / torch.tensor([0.0, 1.0, 2.0]).softmax(-1)[1:].sum()
    torch.testing.assert_close(draws(logits, top_k=2)[1:3], best, rtol=0, atol=0.015)
    assert draws(logits, top_k=2)[[0, 3]].sum() == 0
    assert draws(logits, top_p=0.6)[2] == 1.0  # the likeliest alone has more
    assert draws(logits, top_p=0.7)[[0, 3]].sum() == 0


def test_a_draw_depends_on_its_own_row_alone() -> None:
    torch.manual_seed(0)
    logits_BV, key_B, step_B = torch.randn(6, 30), torch.arange(6) * 7919, torch.arange(6)
    together = sample_token(logits_BV, key_B, step_B, 10, 0.9, 1.0)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    alone = sample_token(logits_BV[order], key_B[order], step_B[order], 10, 0.9, 1.0)
    assert torch.equal(alone, together[order])
    other = sample_token(logits_BV, key_B + 1, step_B, 10, 0.9, 1.0)
    assert not torch.equal(other, together)


@both
def test_memory_bounds_the_rows_by_what_a_cache_really_takes(kind: str) -> None:
    """The llama's keys are shared by two heads each, so that as many gigabytes hold twice the rows."""
    model: Any = decoder(kind)
    writer = DecodeBatch(model, 3, SPAN + 1)
    writer.step(torch.tensor([3, 4, 5]), torch.zeros(3, dtype=torch.int64))
    layers: Any = writer._layers
    taken = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    assert rows_within(model, 32, SPAN + 1, taken / 1e9) == 3
    assert rows_within(model, 32, SPAN + 1, taken / 1e9 * 0.99) == 2
    assert rows_within(model, 2, SPAN + 1, taken / 1e9) == 2
    assert rows_within(model, 32, SPAN + 1, 1e-12) == 1
