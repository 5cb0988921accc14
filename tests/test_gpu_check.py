"""The check for machines with a GPU measures something."""

import json
from pathlib import Path

from cl_dist.config import parse
from cl_dist.data.language import Speller
from cl_dist.jobs import Workbook
from cl_dist.models.backbone import load_tokenizer
from cl_dist.run_config import RunConfig
from tests import gpu_check, tiny


def test_several_samples_are_written_to_their_full_length(tmp_path: Path) -> None:
    tree = gpu_check.tree_of(tmp_path, "rational_lamol", small=True)
    tree["cluster"] = {"dispatcher": "local", "engine": "torch"}
    tree["science"]["train"]["epochs"] = 1
    tree["science"]["model"]["dtype"] = "float32"
    run = tiny.compute(Workbook(parse(RunConfig, tree)))
    (written,) = json.loads((run.config.folder / "stages/01-film/generate/replay.json").read_text())["tasks"].values()
    assert written["requested"] > 1
    assert written["tokens"] > 0.9 * written["generated"] * tree["science"]["train"]["max_length"]
    tokenizer = load_tokenizer(run.config.science.model)
    labels = {label for task in range(2) for label in run.data(task).labels}
    assert all(Speller(tokenizer).encode(label) != [tokenizer.unk_token_id] for label in labels)
