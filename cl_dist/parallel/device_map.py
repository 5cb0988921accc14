"""Placement of a model for inference on the devices of one process: on one, or by layers on several, with accelerate.

Layers are not split: every matrix product is computed as on one device, so samples, votes and scores have the same bits
on any number of devices. Tensor parallelism would be faster, but its order of summation depends on that number.
"""

import gc
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from cl_dist.errors import ConfigError
from cl_dist.parallel.world import World

M = TypeVar("M", bound=nn.Module)
log = logging.getLogger(__name__)
FILLED = 0.8
"""Share of a device's free memory for weights; the rest is for activations."""


def dispatch(model: M, layer: type[nn.Module]) -> M:
    """Move a model to this process's devices; layers that do not fit are offloaded to the CPU between uses.

    Args:
        model: In its final precision, on the CPU.
        layer: Class of the transformer's layers.
    """
    device = World.current().device
    if device.type != "cuda":
        return model.to(device)
    gc.collect()
    torch.cuda.empty_cache()  # memory cached from the previous model would not count as free
    max_memory: dict[int | str, int] = {
        number: int(FILLED * torch.cuda.mem_get_info(number)[0]) for number in range(torch.cuda.device_count())
    }
    if _size(model) <= max_memory[0]:
        return model.to(device)
    return dispatch_by_layers(model, layer, max_memory)


def dispatch_by_layers(
    model: M, layer: type[nn.Module], max_memory: Mapping[int | str, int], rest: str = "cpu", folder: Path | None = None
) -> M:
    """Distribute the layers of a model over devices.

    Args:
        model: On the CPU.
        layer: Class of the transformer's layers.
        max_memory: Bytes available for weights, by device.
        rest: Where to offload layers that do not fit: "cpu", or "disk", in files of a folder.
        folder: Folder for "disk".

    Raises:
        ConfigError: If layers with quantized weights do not fit: accelerate does not offload buffers.
    """
    from accelerate import dispatch_model

    device_map = infer_device_map(model, layer, max_memory, rest)
    at_rest = [model.get_submodule(name) for name, device in device_map.items() if device == rest]
    if any(buffer.dtype == torch.uint8 for module in at_rest for buffer in module.buffers()):
        raise ConfigError(
            "science.model.weight_bits: the model does not fit in GPU memory, and quantized weights cannot be "
            "offloaded; raise cluster.workers_per_model"
        )
    log.info("model dispatched layers=%s", dict(Counter(device_map.values())))
    if rest in device_map.values():
        log.warning("layers are offloaded to %s between uses: inference is slow", rest)
    return dispatch_model(model, device_map, offload_dir=folder, skip_keys="past_key_values", force_hooks=True)


def infer_device_map(
    model: nn.Module, layer: type[nn.Module], max_memory: Mapping[int | str, int], rest: str
) -> dict[str, int | str]:
    """Return the device of each layer, and of each module outside the layers, by path.

    Modules outside the layers are on the first device, which takes inputs and returns logits. The layers follow in
    order, with about the same number of bytes per device.
    """
    units = list(_dispatch_units(model, layer))
    first, share = next(iter(max_memory)), -(-_size(model) // len(max_memory))
    device_map: dict[str, int | str] = {path: first for path, module in units if not isinstance(module, layer)}
    used = dict.fromkeys(max_memory, 0)
    used[first] = sum(_size(module) for path, module in units if path in device_map)
    for path, module in units:
        if isinstance(module, layer):
            size = _size(module)
            fitting = [device for device in max_memory if used[device] + size <= max_memory[device]]
            device_map[path] = next((device for device in fitting if used[device] < share), (*fitting, rest)[0])
            if fitting:
                used[device_map[path]] += size
    return device_map


def _dispatch_units(module: nn.Module, layer: type[nn.Module], path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers, and the largest modules without layers."""
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if isinstance(child, layer) or not any(isinstance(part, layer) for part in child.modules()):
            yield here, child
        else:
            yield from _dispatch_units(child, layer, here)


def _size(model: nn.Module) -> int:
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
