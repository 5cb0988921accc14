from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist.data.sampler import DUMMY, epoch_order, global_batch, num_micro_batches, num_steps, share

worlds = st.integers(1, 7)
micros = st.integers(1, 9)
batches = st.integers(1, 40)
rows = st.integers(1, 60)


def real(micro_batches: list[np.ndarray]) -> list[int]:
    return [int(index) for micro_batch in micro_batches for index in micro_batch if index != DUMMY]


@given(num_rows=rows, epoch=st.integers(0, 5), seed=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_an_epoch_is_a_permutation_of_all_rows(num_rows: int, epoch: int, seed: int) -> None:
    assert sorted(epoch_order(seed, "task", epoch, num_rows)) == list(range(num_rows))


def test_the_order_depends_on_seed_task_and_epoch_and_on_nothing_else() -> None:
    orders = [epoch_order(*key, 50) for key in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert len({tuple(order) for order in orders}) == 4
    np.random.seed(5)
    epoch_order.cache_clear()
    np.testing.assert_array_equal(orders[0], epoch_order(0, "a", 0, 50))


def test_the_order_is_that_of_the_first_release() -> None:
    """Written down from a run: a change of it would mix two permutations in a resumed run."""
    assert epoch_order(0, "laptop", 0, 8).tolist() == [6, 7, 0, 1, 5, 3, 2, 4]


@given(num_rows=rows, batch=batches, epochs=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_steps_of_an_epoch_take_each_row_once_in_the_epochs_order(num_rows: int, batch: int, epochs: int) -> None:
    steps = num_steps(num_rows, batch)
    taken: dict[int, list[int]] = {}
    for step in range(steps * epochs):
        epoch, indices = global_batch(3, "task", step, num_rows, batch)
        assert 1 <= len(indices) <= batch
        taken.setdefault(epoch, []).extend(indices.tolist())
    assert taken == {epoch: epoch_order(3, "task", epoch, num_rows).tolist() for epoch in range(epochs)}


@given(data=st.data(), num_rows=rows, batch=batches, world=worlds, micro=micros)
@settings(max_examples=80, deadline=None)
def test_the_ranks_share_the_global_batch_without_loss_or_repeat(
    data: st.DataObject, num_rows: int, batch: int, world: int, micro: int
) -> None:
    step = data.draw(st.integers(0, 2 * num_steps(num_rows, batch) - 1))
    _, indices = global_batch(0, "task", step, num_rows, batch)
    num_micro = num_micro_batches(batch, world, micro)
    shares = [share(indices, rank, world, micro, num_micro) for rank in range(world)]
    assert {len(micro_batches) for micro_batches in shares} == {num_micro}
    assert {micro_batch.shape for micro_batches in shares for micro_batch in micro_batches} == {(micro,)}
    assert sorted(index for micro_batches in shares for index in real(micro_batches)) == sorted(indices.tolist())
    assert [real(micro_batches) for micro_batches in shares] == [indices[r::world].tolist() for r in range(world)]


@given(num_rows=rows, batch=batches, world=worlds, later_world=worlds, micro=micros, stop=st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_a_run_resumed_on_another_world_size_sees_the_same_global_batches(
    num_rows: int, batch: int, world: int, later_world: int, micro: int, stop: int
) -> None:
    def rows_of(step: int, world: int) -> list[int]:
        _, indices = global_batch(1, "task", step, num_rows, batch)
        num_micro = num_micro_batches(batch, world, micro)
        return sorted(i for rank in range(world) for i in real(share(indices, rank, world, micro, num_micro)))

    undisturbed = [rows_of(step, world) for step in range(8)]
    epoch_order.cache_clear()  # a new process
    assert [rows_of(step, later_world) for step in range(stop, 8)] == undisturbed[stop:]


@given(batch=st.integers(1, 500), world=worlds, micro=micros)
def test_the_micro_batches_just_hold_the_largest_share(batch: int, world: int, micro: int) -> None:
    largest_share = max(len(range(batch)[rank::world]) for rank in range(world))
    assert num_micro_batches(batch, world, micro) == ceil(largest_share / micro)


@pytest.mark.parametrize(("world", "micro"), [(1, 32), (1, 5), (3, 4), (3, 11), (5, 1)])
def test_weighted_sum_over_global_weight_is_the_mean_over_32_rows_on_any_number_of_ranks(
    world: int, micro: int
) -> None:
    losses = np.random.default_rng(0).normal(size=100)
    _, indices = global_batch(0, "task", 1, 100, 32)
    total = weight = 0.0
    for rank in range(world):
        for micro_batch in share(indices, rank, world, micro, num_micro_batches(32, world, micro)):
            weights = (micro_batch != DUMMY).astype(float)
            total += float((losses[np.maximum(micro_batch, 0)] * weights).sum())
            weight += float(weights.sum())
    assert weight == 32
    assert total / weight == pytest.approx(losses[indices].mean())


def test_a_rank_without_a_row_in_a_short_batch_still_gets_its_micro_batches() -> None:
    _, indices = global_batch(0, "task", 1, 9, 8)
    assert len(indices) == 1
    idle = share(indices, 3, 4, 2, num_micro_batches(8, 4, 2))
    assert [micro_batch.tolist() for micro_batch in idle] == [[DUMMY, DUMMY]]


def test_the_cached_order_cannot_be_changed_by_a_caller() -> None:
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(0, "task", 0, 4)[0] = 9


@pytest.mark.parametrize("rank", [-1, 2])
def test_a_rank_outside_the_world_is_named(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank={rank}"):
        share(np.arange(4), rank, 2, 2, 1)


def test_rows_that_do_not_fit_are_refused_not_lost() -> None:
    with pytest.raises(ValueError, match="3 rows do not fit"):
        share(np.arange(6), 0, 2, 2, 1)


def test_an_empty_task_or_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot divide 0 rows"):
        global_batch(0, "task", 0, 0, 8)
    with pytest.raises(ValueError, match="by 0"):
        num_micro_batches(8, 2, 0)
