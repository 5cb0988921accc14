"""Reads of parameters outside the forward pass are found, with their names, and nothing else is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cl_dist.errors import EmptiedParameterError
from cl_dist.parallel.forward import ForwardOnly

READS: dict[str, Callable[[Any], Any]] = {
    "sum": lambda weight: weight.sum(),
    "product": lambda weight: torch.ones(2, 3) @ weight,
    "in a list": lambda weight: torch.stack([weight, weight]),
    "named argument": lambda weight: torch.nn.functional.linear(torch.ones(3), weight=weight.T),
    "data": lambda weight: weight.data,
    "detach": lambda weight: weight.detach(),
    "item": lambda weight: weight[0, 0].item(),
}


@pytest.fixture
def model() -> nn.Module:
    return nn.ParameterDict({"inner": nn.Parameter(torch.ones(3, 3)), "other": nn.Parameter(torch.ones(3, 3))})


def watch(model: nn.Module) -> ForwardOnly:
    return ForwardOnly({"inner": model.get_parameter("inner")})


@pytest.mark.parametrize("read", READS)
def test_a_read_is_refused_with_the_parameters_name(model: nn.Module, read: str) -> None:
    weight = model.get_parameter("inner")
    with pytest.raises(EmptiedParameterError, match="reads the parameter 'inner'"), watch(model).watching():
        READS[read](weight)
    assert READS[read](weight) is not None  # and is free again


def test_other_parameters_shapes_and_the_forward_pass_are_free(model: nn.Module) -> None:
    reads, weight = watch(model), model.get_parameter("inner")

    def forward() -> Tensor:
        with reads.suspended():
            return weight.sum()

    with reads.watching():
        assert (weight.shape, weight.dtype, weight.device.type) == ((3, 3), torch.float32, "cpu")
        assert (weight.requires_grad, weight.dim(), weight.numel(), weight.size(0)) == (True, 2, 9, 3)
        assert float(model.get_parameter("other").sum()) == 9
        assert forward().item() == 9
        with torch.device("cpu"):  # another mode, above this one
            assert forward().item() == 9
        with pytest.raises(EmptiedParameterError):
            weight.sum()
    assert weight.sum().item() == 9


def test_a_forward_pass_that_fails_leaves_the_check_on(model: nn.Module) -> None:
    reads, weight = watch(model), model.get_parameter("inner")
    with reads.watching():
        with pytest.raises(ZeroDivisionError), reads.suspended():
            raise ZeroDivisionError
        with pytest.raises(EmptiedParameterError):
            weight.sum()
