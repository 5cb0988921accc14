"""Run-time check that frozen parameters and entries with masked gradients do not change.

Every rank compares checksums of its partitions, so only the outcome is gathered.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cl_dist.errors import ProtectionError
from cl_dist.parallel import params
from cl_dist.parallel.engine import Engine
from cl_dist.parallel.gradients import GradientTransform
from cl_dist.partition import full_shape


@dataclass(frozen=True, slots=True)
class _Watched:
    name: str
    parameter: nn.Parameter
    protected: Tensor | None
    """Mask of the protected entries of this rank's partition; None: all."""
    checksum: int


class Guard:
    """Records checksums of an engine's protected entries on construction."""

    def __init__(self, engine: Engine, transforms: Mapping[str, GradientTransform]) -> None:
        self._world = engine.world
        self._watched: list[_Watched] = []
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad and name not in transforms:
                continue
            piece, start = params.local(parameter, self._world.rank)
            protected = None
            if parameter.requires_grad:
                entries = transforms[name].frozen(full_shape(parameter), piece.device)
                if entries is None:
                    continue
                protected = entries.flatten()[start : start + piece.numel()]
            self._watched.append(_Watched(name, parameter, protected, _checksum(piece, protected)))

    def check(self, step: int) -> None:
        """Compare with the recorded checksums. A collective: all ranks raise, or none.

        Raises:
            ProtectionError: With the names of the changed parameters.
        """
        moved = [
            each.name
            for each in self._watched
            if _checksum(params.local(each.parameter, self._world.rank)[0], each.protected) != each.checksum
        ]
        everywhere = sorted({name for names in self._world.gather(moved) for name in names})
        if everywhere:
            raise ProtectionError(
                f"step {step}: protected entries have changed in {', '.join(everywhere[:5])}"
                f"{f' and {len(everywhere) - 5} more' if len(everywhere) > 5 else ''}. Earlier tasks would be damaged; "
                "this stage is discarded. This is a bug of the method or the engine, not of the settings: report it "
                "with the run file."
            )


def _checksum(piece: Tensor, protected: Tensor | None) -> int:
    """Return a sum over the bits with a distinct weight per position, so every single change is detected."""
    bits = piece.detach().contiguous().view(torch.int32 if piece.element_size() == 4 else torch.int16).flatten()
    bits = bits.to(torch.int64)
    if protected is not None:
        bits = bits[: protected.numel()] * protected
    index = torch.arange(bits.numel(), device=bits.device, dtype=torch.int64)
    return int((bits * (2 * index + 1)).sum())
