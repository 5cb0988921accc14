"""Freezing of a decoder's blocks, groups of heads or heads: the units that a vote or a control has chosen."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cl_dist.errors import ConfigError
from cl_dist.learners.base import no_effect_transforms
from cl_dist.learners.text import UPDATE
from cl_dist.methods.rational_lamol import RationalLamolConfig
from cl_dist.models.architectures import architecture, layers_of
from cl_dist.models.attention_slices import block_parameters, shape_of, trainable_masks, units_of
from cl_dist.models.lowrank import trainable_update_masks
from cl_dist.parallel.gradients import GradScale
from cl_dist.parallel.seeds import seed_of

Unit = tuple[int, int]
"""(layer, unit); the unit of a block is 0."""


def check_updates(backbone: PreTrainedModel, config: RationalLamolConfig) -> None:
    """Check that low-rank updates touch the units of every layer.

    Raises:
        ConfigError: If they do not, so that freezing a unit would have no effect.
    """
    if config.lora is None or config.freeze == "none" or config.level == "block":
        return
    layers = layers_of(backbone)
    first = [(layer, 0) for layer in range(len(layers))]
    with torch.device("cpu"):  # a plan builds the model without data, but reads these masks
        frozen = trainable_update_masks(
            backbone, UPDATE, trainable_masks(backbone, first, config.level, config.freeze_output)
        )
    if not all(any(name.startswith(f"{path}.") for name in frozen) for path, _ in layers):
        raise ConfigError(
            f"method.lora.target_modules={config.lora.target_modules}: level: {config.level} freezes parts of "
            "attention projections, which these are not, or not in every layer; add "
            f"{', '.join(architecture(backbone).lora)}, or set level: block"
        )


class FrozenUnits:
    """The frozen units of a stage: blocks by `requires_grad`, heads and groups by gradient masks."""

    def __init__(self, backbone: PreTrainedModel, config: RationalLamolConfig) -> None:
        self._backbone, self._config = backbone, config
        self.units: list[Unit] = []

    def freeze(self, units: list[Unit]) -> None:
        """Freeze units.

        Raises:
            ConfigError: If the model has no such unit.
        """
        layers, count = shape_of(self._backbone)[0], units_of(self._backbone, self._config.level)
        for layer, unit in units:
            if not (0 <= layer < layers and 0 <= unit < count):
                raise ConfigError(
                    f"method.frozen_units=[{layer}, {unit}]: this model has layers 0..{layers - 1}, each with "
                    f"{count} unit(s) at level {self._config.level}, counted from 0"
                )
        self.units = units
        if self._config.level == "block":
            for layer, _ in units:
                for name in block_parameters(self._backbone, layer):
                    self._backbone.get_parameter(name).requires_grad_(False)

    def control(self, task: int, seed: int) -> list[Unit]:
        """Return the units of a control (random, first, last, list), as many as a vote would choose."""
        config = self._config
        layers, units = shape_of(self._backbone)[0], units_of(self._backbone, config.level)
        every = [(layer, unit) for layer in range(layers) for unit in range(units)]
        count = 1 if config.level == "block" else min(config.top_k, len(every))
        match config.freeze:
            case "first":
                return every[:count]
            case "last":
                return every[-count:]
            case "random":
                generator = torch.Generator().manual_seed(seed_of(seed, "freeze", task))
                return sorted(every[i] for i in torch.randperm(len(every), generator=generator)[:count].tolist())
            case _:
                return list(config.frozen_units)

    def transforms(self) -> dict[str, GradScale]:
        """Return the masks of frozen heads and groups, and those of biases without effect, by name in `backbone`."""
        scales = no_effect_transforms(self._backbone)
        if self._config.level != "block":
            parts = trainable_masks(self._backbone, self.units, self._config.level, self._config.freeze_output)
            if self._config.lora is not None:
                parts = trainable_update_masks(self._backbone, UPDATE, parts)
            for inner, scale in masks(parts).items():
                name = f"backbone.{inner}"
                before = scales.get(name)
                if before is not None and before.row is not None and scale.row is not None:
                    scale = replace(scale, row=scale.row * before.row)
                scales[name] = scale
        prefix = "backbone."
        return {
            name: scale
            for name, scale in scales.items()
            if self._backbone.get_parameter(name.removeprefix(prefix)).requires_grad
        }


def masks(parts: Mapping[str, tuple[str, Tensor]]) -> dict[str, GradScale]:
    """Return gradient masks from `attention_slices.trainable_masks`; other entries train as usual."""
    return {
        name: GradScale(row=keep, decay=True)
        if axis == "row"
        else GradScale(row=torch.zeros(1), column=keep, decay=True)
        for name, (axis, keep) in parts.items()
    }
