"""Rational LAMOL: LAMOL with a part of the model frozen."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from cl_dist.learners.frozen_units import FrozenUnits, check_updates
from cl_dist.learners.lamol import Lamol
from cl_dist.methods.rational_lamol import RationalLamolConfig
from cl_dist.models.classifier import count_parameters
from cl_dist.models.lowrank import own_parameters
from cl_dist.parallel.gradients import GradientTransform
from cl_dist.partition import full_shape


class RationalLamol(Lamol):
    """LAMOL's learner, with the units frozen that a vote or a control has chosen."""

    config: RationalLamolConfig

    def build_for_vocab(self, backbone: PreTrainedModel, known: int, size: int) -> nn.Module:
        """See TextLearner.

        Raises:
            ConfigError: If low-rank updates leave no part of a layer's units to freeze.
        """
        model = super().build_for_vocab(backbone, known, size)
        check_updates(backbone, self.config)
        return model

    def start_task(self, task: int, tasks: tuple[int, ...]) -> None:
        """See Lamol."""
        super().start_task(task, tasks)
        self._frozen = FrozenUnits(self.model.backbone, self.config)
        if task and self.config.freeze in ("random", "first", "last", "list"):
            self._frozen.freeze(self._frozen.control(task, self.seed))

    def freeze(self, units: list[tuple[int, int]]) -> None:
        """See Learner."""
        self._frozen.freeze(units)

    def gradient_transforms(self) -> Mapping[str, GradientTransform]:
        """Freeze the entries of frozen heads and groups; the others move and decay as in LAMOL."""
        return self._frozen.transforms()

    def report_info(self) -> dict[str, Any]:
        """Return the frozen units, and their share of the model's parameters, or of those of the updates."""
        trained, total = count_parameters(self.model)
        if self.lora is not None:
            own = own_parameters(self.model)
            total = sum(full_shape(p).numel() for name, p in self.model.named_parameters() if name in own)
        count = total - trained
        for name, scale in self._frozen.transforms().items():
            parameter = self.model.get_parameter(name)
            entries = scale.frozen(full_shape(parameter), parameter.device)
            count += int(entries.sum()) if scale.decay and entries is not None else 0
        return {"frozen_units": [list(pair) for pair in self._frozen.units], "freeze/params_frac": count / total}
