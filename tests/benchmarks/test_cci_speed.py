"""Speed of votes over attention, against the forward passes they rest on and against a search row by row; CPU time."""

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from cl_dist.models.cci import Comparer, Recorder, watch, watched
from tests.benchmarks.conftest import Measured

pytestmark = pytest.mark.bench
BETA = 80


@pytest.fixture(scope="module")
def models() -> list[Any]:
    """Two GPT-2 of the small size, with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=1000, bos_token_id=None, eos_token_id=None)
    made: list[Any] = [GPT2LMHeadModel(config) for _ in range(2)]
    return [model.eval() for model in made]


def rationale(length: int) -> np.ndarray:
    found = np.zeros(length, dtype=bool)
    found[length // 3 : length // 2] = True
    return found


@torch.no_grad()
def forwards(models: list[Any], tokens: list[int]) -> None:
    """Both models' eager attention, without the language modelling head."""
    for model in models:
        model.set_attn_implementation("eager")
        model.base_model(torch.tensor([tokens]), use_cache=False)


def vote(models: list[Any], tokens: list[int]) -> np.ndarray:
    old, new = models
    recorder = Recorder(rationale(len(tokens)), 1, BETA)
    with watched(old):
        watch(old, tokens, recorder)
    comparer = Comparer(recorder.maps()[0], BETA)
    with watched(new):
        watch(new, tokens, comparer)
    return comparer.nearness()


def timed(run: Callable[[], Any]) -> float:
    began = time.process_time()
    run()
    return time.process_time() - began


@pytest.mark.parametrize(("length", "budget"), [(64, 1.25), (256, 1.10)])
def test_a_vote_costs_little_more_than_two_forward_passes(
    models: list[Any], length: int, budget: float, measured: Measured
) -> None:
    tokens = list(range(length))
    pairs = [(timed(lambda: forwards(models, tokens)), timed(lambda: vote(models, tokens))) for _ in range(12)][2:]
    ratio = median(ours / theirs for theirs, ours in pairs)
    what = f"a vote over attention at {length} tokens, against both models' forward passes"
    assert measured(what, ratio, "{:.2f}x their time", at_most=budget)


def row_by_row(maps: np.ndarray, target: np.ndarray) -> tuple[int, int]:
    """The search as the release does it: a percentile and an overlap for every row of every head."""
    best, place = -1.0, (0, 0)
    for a in range(maps.shape[0]):
        for s in range(maps.shape[1]):
            row = maps[a, s] > np.percentile(maps[a, s], BETA)
            either = np.logical_or(row, target).sum()
            value = np.logical_and(row, target).sum() / either if either else 1.0
            if value > best:
                best, place = value, (a, s)
    return place


@pytest.mark.parametrize(("length", "budget"), [(64, 100), (256, 30)])
def test_the_search_is_far_faster_than_row_by_row(length: int, budget: int, measured: Measured) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(12, length, length, generator=generator)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    maps = scores.masked_fill(hidden, float("-inf")).softmax(-1).numpy()
    target = rationale(length)

    def ours() -> None:
        recorder = Recorder(target, 1, BETA)
        recorder.see(0, 0, maps)

    slow = median(timed(lambda: row_by_row(maps, target)) for _ in range(3))
    fast = median(timed(ours) for _ in range(20))
    what = f"a vote's search at {length} tokens, against one row by row"
    assert measured(what, slow / fast, "{:.0f}x as fast", at_least=budget)
