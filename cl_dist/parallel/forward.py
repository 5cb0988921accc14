"""A check that a loss reads parameters in the forward pass alone, where ZeRO-3 gathers them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from cl_dist.errors import EmptiedParameterError

_HARMLESS = frozenset({"size", "dim", "numel", "stride", "is_floating_point", "register_hook", "__hash__", "__repr__"})
_VALUES = frozenset({"data", "T", "mT", "H", "mH"})


class ForwardOnly:
    """Raises where an operation reads one of some parameters while `watching`, unless `suspended`.

    Costs nothing in the forward pass: the mode is off the stack while it is suspended.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._mode = _Mode(self._names) if self._names else None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Raise EmptiedParameterError for reads within."""
        if self._mode is None:
            yield
            return
        with self._mode:
            self._mode.is_on = True
            try:
                yield
            finally:
                self._mode.is_on = False

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Allow reads within."""
        mode = self._mode
        if mode is None or not mode.is_on:
            yield
            return
        mode.is_on = False  # also where another mode lies above this one, and is popped instead
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # by the library
        try:
            yield
        finally:
            mode.__enter__()  # type: ignore[no-untyped-call]
            mode.is_on = True


class _Mode(TorchFunctionMode):
    """Looks at the arguments of every torch function."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self._names, self.is_on = names, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the arguments, then call the function."""
        kwargs = kwargs or {}
        if self.is_on and _reads_values(func):
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, nn.Parameter) and id(leaf) in self._names:
                    raise EmptiedParameterError(
                        f"the loss reads the parameter {self._names[id(leaf)]!r} outside the model's forward pass, "
                        "where ZeRO-3 has emptied it. Record what the loss needs in the module's forward, or, for a "
                        "term of one parameter alone, return it from Learner.penalties()."
                    )
        return func(*args, **kwargs)


def _reads_values(func: Callable[..., Any]) -> bool:
    """Return whether a torch function may read its tensors' values; shapes, types and devices are left to ZeRO."""
    name = getattr(func, "__name__", "")
    if name == "__get__":  # of a property
        return getattr(getattr(func, "__self__", None), "__name__", "") in _VALUES
    return name not in _HARMLESS
