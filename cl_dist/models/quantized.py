"""Linear layers with frozen 4- or 8-bit weights, dequantized for one matrix product at a time.

The weights are buffers, so no ZeRO stage partitions them, and activations are not quantized: a layer is the same
function of its input on any number of workers. Source: Dettmers et al. 2022, "8-bit optimizers via block-wise
quantization", and 2023, "QLoRA: efficient finetuning of quantized LLMs" (NF4), with the kernels of bitsandbytes.

Axes: X any, I inputs, O outputs.
"""

from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cl_dist.errors import ConfigError
from cl_dist.models.architectures import layers_of
from cl_dist.models.backbone import replace

BLOCK = 64
"""Weights that share a scale."""
Bits = Literal[4, 8]


def quantize_layers(backbone: PreTrainedModel, bits: Bits) -> None:
    """Replace the linear layers inside a backbone's transformer layers; embeddings, heads and norms are not replaced.

    Layers whose weights are not a multiple of the block size are not replaced either.

    Raises:
        ConfigError: If bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise ConfigError(f"science.model.weight_bits={bits}: needs bitsandbytes: pip install 'cl-dist[quantize]'")
    with torch.device("cpu"):  # under the meta device, the library would create its tables without data
        _routines()
    for _, layer in layers_of(backbone):
        for path, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear | Conv1D) and module.weight.numel() % BLOCK == 0:
                replace(layer, path, QuantizedLinear(module, bits))


class QuantizedLinear(nn.Module):
    """A frozen linear layer, or GPT-2's Conv1D."""

    codes: Tensor
    scales: Tensor
    table: Tensor

    def __init__(self, layer: nn.Linear | Conv1D, bits: Bits) -> None:
        super().__init__()
        weight = layer.weight.detach()
        self.bits, self._shape, self._is_transposed = bits, weight.shape, isinstance(layer, Conv1D)
        parts = _empty(weight, bits) if weight.is_meta else _quantized(weight, bits)
        for name, part in zip(("codes", "scales", "table"), parts, strict=True):
            # As bytes: conversion of the model to bfloat16 would round floating-point buffers.
            self.register_buffer(name, part.view(torch.uint8), persistent=False)
        self.bias = layer.bias

    @property
    def elements(self) -> int:
        """Number of weights."""
        return self._shape.numel()

    def extra_repr(self) -> str:
        """Return the text for `print`."""
        return f"shape={tuple(self._shape)}, bits={self.bits}"

    def weight(self, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weights: (O, I)."""
        routines = _routines()
        scales = self.scales.view(torch.float32)
        known: dict[str, Any] = {"absmax": scales, "blocksize": BLOCK, "dtype": dtype}
        if self.bits == 4:
            state = routines.QuantState(shape=(len(scales), BLOCK), quant_type="nf4", **known)
            found: Tensor = routines.dequantize_4bit(self.codes, state)
        else:
            state = routines.QuantState(code=self.table.view(torch.float32), **known)
            found = routines.dequantize_blockwise(self.codes, state)
        found = found.reshape(self._shape)
        return found.T if self._is_transposed else found

    def forward(self, x_XI: Tensor) -> Tensor:
        """Return the outputs: (X, O)."""
        return _Product.apply(x_XI, self.bias, self)  # type: ignore[no-untyped-call]


class _Product(torch.autograd.Function):
    """x W^T + b; the backward pass dequantizes W again instead of saving it, which would use all the memory."""

    @staticmethod
    def forward(context: Any, x_XI: Tensor, bias: Tensor | None, layer: QuantizedLinear) -> Tensor:
        context.layer = layer
        return nn.functional.linear(x_XI, layer.weight(x_XI.dtype), None if bias is None else bias.to(x_XI.dtype))

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        (gradient_XO,) = gradients
        return gradient_XO @ context.layer.weight(gradient_XO.dtype), None, None


def _quantized(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes, scales, and the values of 8-bit codes (empty for NF4, whose values are fixed)."""
    blocks = weight.float().reshape(-1, BLOCK)  # on CPUs version 0.50 is wrong where a row ends inside a block
    if bits == 4:
        codes, state = _routines().quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4")
        return codes, state.absmax, torch.empty(0)
    codes, state = _routines().quantize_blockwise(blocks, blocksize=BLOCK)
    return codes, state.absmax, state.code


def _empty(weight: Tensor, bits: Bits) -> tuple[Tensor, Tensor, Tensor]:
    """Return empty tensors of the same shapes for a weight on the meta device."""
    blocks, device = weight.numel() // BLOCK, weight.device
    shape = (blocks * BLOCK // 2, 1) if bits == 4 else (blocks, BLOCK)
    codes = torch.empty(shape, dtype=torch.uint8, device=device)
    return codes, torch.empty(blocks, device=device), torch.empty(256 if bits == 8 else 0, device=device)


def _routines() -> Any:
    """Import bitsandbytes, which is untyped and takes seconds to import."""
    import bitsandbytes.functional

    return bitsandbytes.functional
