"""A model that is read is loaded in the precision of its forward pass, and is the same to the bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import StageRef
from cl_dist.stages import build
from cl_dist.stages.build import build_learner, to_inference
from tests import parity
from tests.architectures import TINY

METHODS: dict[str, Any] = {
    "ctr": {**tiny.CTR, "tsm_size": 8, "capsule_mid": 4, "filters": 3},
    "adapter": tiny.METHODS["adapter"],
    "lora": tiny.METHODS["lora"],
    "sequential": {"name": "sequential", "tune": "layers"},
    "lamol": {"name": "lamol", "gamma": 0.0, "tune": "layers"},
    "lamol-lora": {"name": "lamol", "gamma": 0.0, "lora": {"r": 4}},
}


@pytest.mark.parametrize("name", METHODS)
def test_it_is_the_one_that_is_loaded_in_float32_and_rounded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {**TINY["llama"], "vocab_size": len(tiny.SPOKEN), "pad_token_id": 0}
    maker: Any = AutoModelForCausalLM
    torch.manual_seed(3)
    maker.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(tmp_path / "llama")
    tiny.save_tokenizer(tmp_path / "llama", tiny.SPOKEN)
    model = {"source": str(tmp_path / "llama"), "dtype": "bfloat16"}
    over = {"science": {"method": METHODS[name], "model": model, "train": {"epochs": 1, "min_round_steps": 1}}}
    tree = tiny.tree(tmp_path, over, tasks=("food",))
    tree["science"]["model"].pop("config", None)
    tree["cluster"] = {"dispatcher": "local", "zero_stage": 2}
    run = Run(parse(RunConfig, tree))
    first = StageRef(task=0, stage="train")
    parity.train_here(run.job(run.stage(first)), run.ledger.path(first))
    job = run.job(run.plan(0)[-1])
    found, loaded = {}, []
    module: Any = build
    load = module.load_backbone

    def noted(*args: Any, **kwargs: Any) -> Any:
        loaded.append(kwargs["dtype"])
        return load(*args, **kwargs)

    monkeypatch.setattr(module, "load_backbone", noted)
    for for_inference in (False, True):
        found[for_inference] = to_inference(job, build_learner(job, for_inference=for_inference).model).state_dict()
    assert loaded == [torch.float32, torch.bfloat16]
    assert found[False].keys() == found[True].keys()
    assert {tensor.dtype for tensor in found[True].values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert [key for key, tensor in found[False].items() if not torch.equal(tensor, found[True][key])] == []
