"""Size of a tokenizer's vocabulary; without torch or transformers."""

from typing import Any


def num_ids(tokenizer: Any) -> int:
    """Return the largest token id of a tokenizer plus one.

    `len(tokenizer)` is the number of tokens, which is smaller if the ids have gaps.
    """
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
