"""Token ids of a tokenizer, counted. Without torch or transformers."""

from typing import Any


def num_ids(tokenizer: Any) -> int:
    """Return one more than the largest token id that a tokenizer uses.

    `len(tokenizer)` counts tokens, and is smaller where the ids have gaps.
    """
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values(), default=-1))
