"""Bytes of live tensors at every operation, tracked by the lifetimes of their storages, on any device.

Works on fake tensors (torch's FakeTensorMode) and on real ones; memory outside of tensors is not counted.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of new storages while it is active, and of those registered with `show`."""

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda tensor: "") -> None:
        """Start empty; kind_of returns the kind of a tensor with a new storage."""
        super().__init__()  # type: ignore[no-untyped-call]  # by the library
        self.kinds: Counter[str] = Counter()
        """Live bytes by kind."""
        self.live = self.peak = 0
        """Live bytes, and their peak."""
        self.watch: Callable[[], None] = lambda: None
        """Called when live bytes grow."""
        self._kind_of, self._known = kind_of, dict[int, tuple[str, int]]()

    def show(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count the storages of these tensors as of a kind, also if they are counted already."""
        for tensor in tensors:
            self._add(tensor, kind)

    def _add(self, tensor: Tensor, kind: str | None = None) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            before, counted = self._known[key]
            if kind is not None and kind != before:
                self.kinds[before] -= counted
                self.kinds[kind] += counted
                self._known[key] = kind, counted
            return
        kind = self._kind_of(tensor) if kind is None else kind
        self._known[key] = kind, size
        self.kinds[kind] += size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key).atexit = False
        if size:
            self.watch()

    def _gone(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.kinds[kind] -= size
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count its results."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":  # meta tensors have no memory
                self._add(leaf)
        return result

    def restart(self) -> None:
        """Reset the peak."""
        self.peak = self.live


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
