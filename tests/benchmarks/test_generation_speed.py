"""Speed of writing pseudo-samples against `generate` of transformers, as ratios measured in one run."""

import time
from collections import deque
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, StoppingCriteria, StoppingCriteriaList

from cl_dist.models.decode import Generation, generate, sample_token
from tests.benchmarks.conftest import Measured

pytestmark = pytest.mark.bench
ROWS, LENGTH, SAMPLES, WORDS = 32, 96, 128, 8192


class Planned(Generation):
    """A sample that ends at a length of its own."""

    def __init__(self, key: int, length: int) -> None:
        super().__init__(first=1, key=key)
        self._length = length

    def accept(self, token: int) -> bool:
        super().accept(token)
        return len(self.tokens) >= self._length


class AtLength(StoppingCriteria):
    """Ends each row of `generate` at a length of its own."""

    def __init__(self, lengths: list[int]) -> None:
        self._length_B = torch.tensor(lengths)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] - 1 >= self._length_B


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"n_embd": 256, "n_layer": 4, "n_head": 8, "n_positions": 128, "vocab_size": WORDS}
    untyped: Any = GPT2LMHeadModel(GPT2Config(bos_token_id=None, eos_token_id=None, **sizes))
    return untyped.eval()


def ours(model: Any, lengths: list[int]) -> None:
    def pick(logits_BV: Tensor, key_B: Tensor, at_B: Tensor) -> Tensor:
        return sample_token(logits_BV, key_B, at_B, top_k=20, top_p=1.0, temperature=1.0)

    waiting = deque(Planned(number, length) for number, length in enumerate(lengths))
    ended = list(generate(model, waiting, ROWS, LENGTH + 1, pick))
    assert sorted(len(line.tokens) for line in ended) == sorted(lengths)


@torch.no_grad()
def theirs(model: Any, lengths: list[int]) -> None:
    for first in range(0, len(lengths), ROWS):
        batch = lengths[first : first + ROWS]
        ids = torch.ones(len(batch), 1, dtype=torch.int64)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            top_k=20,
            max_new_tokens=max(batch),
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([AtLength(batch)]),
        )
        assert found.shape[1] == max(batch) + 1


def ratio(model: Any, lengths: list[int], pairs: int = 5) -> float:
    """Return how many times as fast ours is: the median of interleaved pairs."""
    runs: tuple[Callable[..., None], ...] = (theirs, ours)
    found = []
    for _ in range(pairs + 1):
        times = []
        for run in runs:
            began = time.perf_counter()
            run(model, lengths)
            times.append(time.perf_counter() - began)
        found.append(times[0] / times[1])
    return median(found[1:])


def test_as_fast_as_generate_where_all_samples_are_equally_long(model: Any, measured: Measured) -> None:
    what = f"writing {ROWS} samples of equal lengths, against `generate` of transformers"
    assert measured(what, ratio(model, [LENGTH] * ROWS), "{:.2f}x as fast", at_least=0.95)


def test_faster_than_generate_where_lengths_are_mixed(model: Any, measured: Measured) -> None:
    torch.manual_seed(1)
    lengths = (8 + (LENGTH - 8) * torch.rand(SAMPLES) ** 2).long().tolist()
    what = f"writing {SAMPLES} samples of {min(lengths)} to {max(lengths)} tokens, against `generate`"
    assert measured(what, ratio(model, lengths, pairs=3), "{:.2f}x as fast", at_least=1.3)
