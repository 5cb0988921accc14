"""Seeds derived from the computed item, never from rank, time or process."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(*parts: object) -> int:
    """Return a 63-bit seed from any values with a stable text form: run seed, stage, shard or row."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Run a block under torch's generators seeded from these values, and restore them afterwards."""
    with torch.random.fork_rng():
        # Not torch.manual_seed, which spends a millisecond on stack traces for each absent kind of device.
        torch.default_generator.manual_seed(seed_of(*parts))
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed_of(*parts))
        yield
