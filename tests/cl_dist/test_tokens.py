"""Token ids are counted up to the largest one."""

import pytest

from cl_dist.tokens import num_ids


class Vocabulary(dict[str, int]):
    def get_vocab(self) -> dict[str, int]:
        return self


@pytest.mark.parametrize(("ids", "expected"), [((), 0), ((0, 1, 2), 3), ((0, 1, 13), 14), ((5,), 6)])
def test_gaps_count(ids: tuple[int, ...], expected: int) -> None:
    assert num_ids(Vocabulary({f"w{number}": number for number in ids})) == expected
