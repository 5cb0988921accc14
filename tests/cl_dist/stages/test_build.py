"""Which backbones can be cut up over the ranks while they are loaded."""

from typing import Any

import pytest

from cl_dist.config import parse
from cl_dist.methods import METHODS
from cl_dist.models.config import ModelConfig
from cl_dist.stages.build import loads_partitioned, new_learner
from tests import tiny


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
def test_what_loads_in_pieces(method: str, model: dict[str, Any], expected: bool) -> None:
    config = parse(ModelConfig, {"source": "somewhere", **model})
    learner = new_learner(parse(METHODS[method].config, dict(tiny.METHODS[method])), config, (2,), 0)
    assert loads_partitioned(learner, config) is expected
