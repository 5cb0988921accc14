import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.stages.schedule import Schedule

SCHEDULES = st.builds(
    lambda epochs, steps, rounds: Schedule(epochs * steps, steps, rounds),
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 60),
)


def lengths(schedule: Schedule) -> list[int]:
    """Return the length of each round, walking through all steps."""
    found = [0]
    for step in range(schedule.total_steps):
        found[-1] += 1
        if schedule.ends_round(step):
            found.append(0)
    assert found.pop() == 0, "the last step does not end a round"
    return found


@given(SCHEDULES)
def test_rounds_part_the_steps_and_the_last_step_ends_one(schedule: Schedule) -> None:
    found = lengths(schedule)
    assert sum(found) == schedule.total_steps
    assert len(found) == schedule.num_rounds >= 1


@given(SCHEDULES)
def test_rounds_are_nearly_equal(schedule: Schedule) -> None:
    found = lengths(schedule)
    assert max(found) - min(found) <= 1


@given(SCHEDULES)
def test_a_round_is_as_long_as_an_epoch_and_as_the_least_length_where_there_are_so_many_steps(
    schedule: Schedule,
) -> None:
    least = max(schedule.steps_per_epoch, schedule.min_round_steps)
    found = lengths(schedule)
    if schedule.total_steps >= least:
        assert min(found) >= least
        assert schedule.num_rounds == schedule.total_steps // least  # and there are as many as that allows
    else:
        assert found == [schedule.total_steps]


@given(SCHEDULES)
def test_a_step_knows_its_place_in_its_round(schedule: Schedule) -> None:
    place = 0
    for step in range(schedule.total_steps):
        progress = schedule.at(step)
        assert (progress.step, progress.total_steps) == (step, schedule.total_steps)
        assert progress.round_step == place < progress.round_steps
        place = 0 if schedule.ends_round(step) else place + 1


@pytest.mark.parametrize(
    ("total", "epoch", "least", "expected"),
    [(21, 3, 10, [10, 11]), (6, 3, 50, [6]), (12, 4, 1, [4, 4, 4]), (1, 1, 1, [1]), (100, 7, 30, [33, 33, 34])],
)
def test_rounds_by_hand(total: int, epoch: int, least: int, expected: list[int]) -> None:
    assert lengths(Schedule(total, epoch, least)) == expected
