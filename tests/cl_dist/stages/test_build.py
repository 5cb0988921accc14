"""Which backbones can be cut up over the ranks while they are loaded."""

from typing import Any

import pytest

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.methods import METHODS
from cl_dist.models.config import ModelConfig
from cl_dist.stages.build import loads_partitioned


@pytest.mark.parametrize(
    ("method", "model", "expected"),
    [
        ("ctr", {}, True),
        ("sequential", {}, True),
        ("ewc", {}, False),
        ("ctr", {"config": {"model_type": "bert"}}, False),
        ("ctr", {"weight_bits": 4}, False),
    ],
)
def test_which_backbones_load_partitioned(method: str, model: dict[str, Any], expected: bool) -> None:
    config = parse(ModelConfig, {"source": "somewhere", **model})
    settings = parse(METHODS[method].config, dict(tiny.METHODS[method]))
    assert loads_partitioned(settings, config) is expected
