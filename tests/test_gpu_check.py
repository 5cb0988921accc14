"""The check for machines with a GPU measures something, and its rehearsal on a CPU reaches its end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.data.language import TextCodec
from cl_dist.models.backbone import load_tokenizer
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from tests import gpu_check


def test_several_samples_are_written_to_their_full_length(tmp_path: Path) -> None:
    sizes, method, rows = gpu_check.RUNS["rational_lamol"]
    tree = gpu_check.tree_of(tmp_path, "rational_lamol", sizes, method, rows, {"micro_batch": 4}, small=True, batches=2)
    tree["cluster"] = {"dispatcher": "local", "engine": "torch"}
    tree["science"]["model"]["dtype"] = "float32"
    run = tiny.compute(Run(parse(RunConfig, tree)))
    (written,) = json.loads((run.config.folder / "stages/01-film/generate/replay.json").read_text())["tasks"].values()
    assert written["requested"] > 1
    assert written["tokens"] > 0.9 * written["generated"] * tree["science"]["train"]["max_length"]
    tokenizer = load_tokenizer(run.config.science.model)
    labels = {label for task in range(2) for label in run.data(task).labels}
    assert all(TextCodec(tokenizer).encode(label) != [tokenizer.unk_token_id] for label in labels)


def test_a_section_that_fails_costs_its_own_figures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_check.SECTIONS, "votes", (gpu_check.of_votes, 0.001))
    (found,) = gpu_check.measured("votes", small=True)
    assert found["text"].startswith("failed: ")
    assert found["ok"] is False


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_rehearsal_reaches_its_end() -> None:
    """What needs Ray is left to the tests that start Ray."""
    sections = [name for name in gpu_check.SECTIONS if not name.startswith("ray")]
    command = [sys.executable, "-m", "tests.gpu_check", "--small", *sections]
    done = subprocess.run(command, capture_output=True, text=True, timeout=880, check=False)
    assert not done.returncode, done.stdout + done.stderr
    told = [line.partition(" | ")[0] for line in done.stdout.splitlines()]
    assert any(line.startswith("tokens a second of training: lamol, offload") for line in told)
    assert sum(line.startswith("parity of ") for line in told) == 8
