"""Frozen backbones in 8 and 4 bits, where bitsandbytes is installed: what is trained beside them, on any gang."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.contract.ranks import Ranks
from cl_dist.errors import ConfigError
from cl_dist.methods.houlsby import HoulsbyConfig
from cl_dist.models.backbone import load_backbone
from cl_dist.models.config import ModelConfig
from cl_dist.models.quantized import QuantizedLinear
from cl_dist.parallel.config import EngineConfig
from cl_dist.planning.trace import TracedLearner
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stages import train
from cl_dist.stages.build import build_learner
from cl_dist.stages.export import export, load_exported
from cl_dist.stages.predict import Predictor
from cl_dist.stages.stage_job import Job
from tests import parity
from tests.parity import Trained

pytestmark = [pytest.mark.timeout(300)]
METHODS: dict[str, Any] = {
    "ctr": {**tiny.CTR, "tsm_size": 8, "capsule_mid": 4, "filters": 3},
    "hat": {"name": "hat", "tsm_size": 8},
    "adapter": {"name": "adapter", "size": 4},
}
needs_it = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


def tree(folder: Path, method: str, bits: int, dtype: str = "float32") -> Any:
    model = {"weight_bits": bits, "dtype": dtype}
    cluster = {} if dtype == "float32" else {"engine": "deepspeed", "zero_stage": 2}
    science = {"method": METHODS[method], "model": model, "train": {"epochs": 4, "min_round_steps": 2}}
    over = {"run": {"name": f"{method}-{bits}"}, "science": science, "cluster": cluster}
    return tiny.tree(folder, over, tasks=("food", "film"))


def train_here(rank: int, world: int, job: Job, out: str) -> None:
    Path(out).mkdir(exist_ok=True)
    train.run(job, Path(out), lambda event: None)


@needs_it
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_layer_is_the_product_with_its_rounded_weights_forward_and_backward(kind: Any, bits: Any) -> None:
    torch.manual_seed(0)
    layer: Any = kind(96, 64) if kind is nn.Linear else kind(64, 96)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    quantized = QuantizedLinear(layer, bits)
    rounded_OI = quantized.weight(torch.float32)
    exact_OI = layer.weight.detach() if kind is nn.Linear else layer.weight.detach().T
    error = float((rounded_OI - exact_OI).abs().mean() / exact_OI.abs().mean())
    assert 0 < error < {4: 0.12, 8: 0.02}[bits]

    x_BLI = torch.randn(2, 5, 96, requires_grad=True)
    found, expected = quantized(x_BLI), nn.functional.linear(x_BLI, rounded_OI, layer.bias)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weights = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad((found * weights).sum(), x_BLI), torch.autograd.grad((expected * weights).sum(), x_BLI)
    )
    lowered = quantized.to(torch.bfloat16)(x_BLI.bfloat16())  # the scales are not rounded with the rest
    assert torch.equal(quantized.weight(torch.float32), rounded_OI)
    assert lowered.dtype == torch.bfloat16


@needs_it
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_learns_beside_quantized_weights_and_is_exported(tmp_path: Path, method: str, bits: int) -> None:
    run = tiny.compute(Run(parse(RunConfig, tree(tmp_path, method, bits))))
    facts = run.ledger.read(parity.SECOND, "train.json")
    losses = [line["train/loss"] for line in facts["rounds"]]
    assert losses[-1] < losses[0]

    job = run.job(run.plan(1)[-1])
    quantized = [module for module in build_learner(job).model.modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == 2 * 6  # of BERT's two layers
    rows = run.data(1).test
    export(job, 1, tmp_path / "exported", "")
    model, tokenizer, _ = load_exported(tmp_path / "exported")
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == len(quantized)
    encoded = tokenizer([row.text for row in rows[:1]], return_tensors="pt")
    expected = Predictor(job).logits(1, rows[:1])[0]
    torch.testing.assert_close(model(dict(encoded))[0], expected)


@needs_it
@pytest.mark.parametrize(
    ("zero_stage", "dtype", "apart"),
    # Without bits ZeRO-3 is as far from ZeRO-1 in bfloat16: it sums gradients in another order.
    [*((stage, "float32", 1e-5) for stage in (0, 1, 2, 3)), (2, "bfloat16", 0.0), (3, "bfloat16", 0.05)],
)
@pytest.mark.parametrize(("method", "bits"), [("ctr", 4), ("ctr", 8), ("adapter", 4)])
def test_two_ranks_train_what_one_does(
    ranks: Ranks, tmp_path: Path, method: str, bits: int, zero_stage: Any, dtype: str, apart: float
) -> None:
    run = Run(parse(RunConfig, tree(tmp_path, method, bits, dtype)))
    job = replace(run.job(run.plan(0)[0]), engine=EngineConfig(zero_stage=zero_stage))
    if dtype == "float32":
        train_here(0, 1, replace(job, engine=EngineConfig(engine="torch")), str(tmp_path / "one"))
    else:
        ranks.run(train_here, replace(job, engine=EngineConfig(zero_stage=1)), str(tmp_path / "one"), timeout_s=200.0)
    ranks.run(train_here, job, str(tmp_path / "two"), timeout_s=200.0)
    found = Trained.read(tmp_path / "two").difference(Trained.read(tmp_path / "one"))
    assert found["weights"] <= apart, found


@needs_it
def test_weights_are_rounded_from_float32_whoever_loads_them(tmp_path: Path) -> None:
    """What scores loads in the precision of the forward pass: rounded twice, they would be others than in training."""
    model = parse(RunConfig, tree(tmp_path, "ctr", 4)).science.model
    trained, read = (load_backbone(model, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    pairs = [
        (mine.codes, its.codes)
        for mine, its in zip(trained.modules(), read.modules(), strict=True)
        if isinstance(mine, QuantizedLinear) and isinstance(its, QuantizedLinear)
    ]
    assert len(pairs) == 12
    assert all(torch.equal(mine, its) for mine, its in pairs)


@needs_it
@pytest.mark.parametrize(("bits", "each"), [(4, 0.5), (8, 1.0)])
def test_a_plan_counts_the_bits(bits: Any, each: float) -> None:
    sizes = {"model_type": "bert", "vocab_size": 100, "hidden_size": 128, "intermediate_size": 256}
    model = ModelConfig(source=".", config={**sizes, "num_hidden_layers": 2, "num_attention_heads": 4})
    method = HoulsbyConfig(name="adapter", size=4)
    whole, cut = (
        TracedLearner(method, model, (2,)),
        TracedLearner(method, model.model_copy(update={"weight_bits": bits}), (2,)),
    )
    weights = 2 * (4 * 128 * 128 + 2 * 128 * 256)
    assert whole.backbone.elements - cut.backbone.elements == cut.quantized == weights
    tables = 12 * 256 * 4 if bits == 8 else 0
    assert cut.buffers - whole.buffers == weights * each + weights // 64 * 4 + tables
    assert cut.micro(4, 16, 2).saved == whole.micro(4, 16, 2).saved


def test_what_trains_the_backbone_is_refused(tmp_path: Path) -> None:
    found = tree(tmp_path, "ctr", 4)
    for method in ("sequential", "lora"):
        found["science"]["method"] = {"name": method}
        with pytest.raises(ConfigError, match=rf"weight_bits=4: method '{method}' trains .* use one of ctr"):
            parse(RunConfig, found)


def test_without_bitsandbytes_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_dist.models.quantized.find_spec", lambda name: None)
    sizes = {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9}
    with pytest.raises(ConfigError, match=r"weight_bits=8: needs bitsandbytes: pip install 'cl-dist\[quantize\]'"):
        load_backbone(ModelConfig(source=".", config=sizes | {"intermediate_size": 8}, weight_bits=8))
