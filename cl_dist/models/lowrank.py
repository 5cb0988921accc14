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
    """Give the chosen layers an update, which changes nothing at first, and make it the one in use.

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
    updated: Any = dict(layers_with_updates(backbone))  # the library's methods carry no types
    for layer in updated.values():  # peft draws in the precision of the layer below, and on its device
        for factor in (layer.lora_A[name], layer.lora_B[name]):
            factor.float() if factor.weight.is_meta else factor.to("cpu", torch.float32)
        layer.reset_lora_parameters(name, init_lora_weights=True)


def layers_with_updates(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the layers that have an update, with their paths."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield path, module


def own_parameters(model: nn.Module) -> frozenset[str]:
    """Return the names of the parameters of updates, and of rows of the vocabulary that are trained beside them."""
    inside = tuple(f"{path}.lora_" for path, _ in layers_with_updates(model))
    rows = {f"{path}.rows" for path, module in model.named_modules() if isinstance(module, TrainableRows)}
    return frozenset(name for name, _ in model.named_parameters() if name.startswith(inside) or name in rows)


def trainable_update_masks(
    model: PreTrainedModel, name: str, masks: Mapping[str, tuple[str, Tensor]]
) -> dict[str, tuple[str, Tensor]]:
    """Return what remains trainable of an update so that slices of the layers below keep every bit.

    kept says it of the layers' weights, as `models.heads.kept` does: name -> (axis, 1 where an entry may move). Outputs
    are rows of B, inputs are columns of A. What they are multiplied with is held altogether: an entry of B A moves with
    either factor. So the heads of a layer that go on learning do so by B alone (LoRA-FA, Zhang et al. 2023).
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
    """Add the updates in use to the layers below, and rows of their own to the vocabulary: a plain model again."""
    for path, layer in list(layers_with_updates(model)):
        layer.merge()
        replace(model, path, layer.get_base_layer())
    merge_trainable_rows(model)
