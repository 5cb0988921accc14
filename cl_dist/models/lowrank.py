"""Low-rank updates of frozen layers, by peft: a layer computes W x + alpha / r * B A x, A (r, inputs), B (outputs, r).

Source: Hu et al. 2022, "LoRA: Low-rank adaptation of large language models".
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cl_dist.errors import ConfigError
from cl_dist.models.architectures import architecture
from cl_dist.models.backbone import replace
from cl_dist.models.config import LoraShape
from cl_dist.models.vocabulary import TrainableRows, merge_trainable_rows


def add_update(backbone: PreTrainedModel, shape: LoraShape, name: str) -> None:
    """Add an update, initialized to zero, to the target layers, and activate it.

    Raises:
        ConfigError: If no layer of the backbone has a name in target_modules.
    """
    targets = list(shape.target_modules or architecture(backbone).lora)
    settings = LoraConfig(
        r=shape.r,
        lora_alpha=shape.alpha,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in backbone.modules()),
    )
    try:
        inject_adapter_in_model(settings, backbone, adapter_name=name)
    except ValueError as error:
        raise ConfigError(f"science.method: target_modules={targets}: {error}") from error
    updated: Any = dict(layers_with_updates(backbone))  # the library's methods are untyped
    for layer in updated.values():  # peft initializes in the dtype and on the device of the base layer
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            factor.float() if factor.weight.is_meta else factor.to("cpu", torch.float32)
        layer.reset_lora_parameters(name, init_lora_weights=True)


def layers_with_updates(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers with updates, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def own_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of updates and of trainable vocabulary rows."""
    inside = tuple(f"{path}.lora_" for path, _ in layers_with_updates(model))
    rows = {f"{path}.rows" for path, module in model.named_modules() if isinstance(module, TrainableRows)}
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(inside) or name in rows)


def trainable_update_masks(
    model: PreTrainedModel, name: str, masks: Mapping[str, tuple[str, Tensor]]
) -> dict[str, tuple[str, Tensor]]:
    """Return the masks of trainable entries of an update that leave the frozen slices of its base layers unchanged.

    masks are those of the base weights, from `attention_slices.trainable_masks`: name -> (axis, 1 where an entry may
    change). Outputs are rows of B, inputs are columns of A. The other factor is frozen entirely, since an entry of B A
    changes with either factor: the trainable heads of such a layer learn through B only (LoRA-FA, Zhang et al. 2023).
    """
    found: dict[str, tuple[str, Tensor]] = {}
    for path, layer in layers_with_updates(model):
        axis, keep = masks.get(f"{path}.weight", ("row", torch.ones(1)))
        if bool(keep.all()):
            continue
        down, up = f"{path}.lora_A.{name}.weight", f"{path}.lora_B.{name}.weight"
        is_of_outputs = (axis == "column") == isinstance(layer.get_base_layer(), Conv1D)
        if is_of_outputs:
            found |= {up: ("row", keep), down: ("row", torch.zeros(1))}
        else:
            found |= {down: ("column", keep), up: ("row", torch.zeros(1))}
    return found


def merge_updates(model: PreTrainedModel) -> None:
    """Merge the updates into their base layers, and trainable rows into the vocabulary, to get a plain model."""
    for path, layer in list(layers_with_updates(model)):
        layer.merge()
        replace(model, path, layer.get_base_layer())
    merge_trainable_rows(model)
