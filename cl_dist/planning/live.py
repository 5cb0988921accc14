"""How many bytes tensors hold, at every operation: counted by the lifetimes of their storages, on any device.

Works on tensors without data (torch's FakeTensorMode) as on real ones, and sees no memory outside of tensors.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveTensorBytes(TorchDispatchMode):
    """Counts what lives while it is entered: new storages, and those that it has been shown."""

    def __init__(self, kind_of: Callable[[Tensor], str] = lambda tensor: "") -> None:
        """Begin with nothing; kind_of names the kind of a tensor whose storage is new."""
        super().__init__()  # type: ignore[no-untyped-call]  # by the library
        self.kinds: Counter[str] = Counter()
        """Bytes that live now, by kind."""
        self.live = self.peak = 0
        """Bytes that live now, and the most so far."""
        self.watch: Callable[[], None] = lambda: None
        """Called when there is more than before."""
        self._kind_of, self._known = kind_of, dict[int, tuple[str, int]]()

    def show(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Count these tensors' storages as of a kind, whether they are known or not."""
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
        """Run an operation and count what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":  # which has a size, and no memory
                self._add(leaf)
        return result

    def restart(self) -> None:
        """Forget the highest point so far."""
        self.peak = self.live


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Return a module's parameters and buffers."""
    return [*module.parameters(), *module.buffers()]
