"""The 19 domains of aspect sentiment classification, where their files are at hand; they may not be redistributed."""

import os
from pathlib import Path

import pytest

from cl_dist.checks import check_data
from cl_dist.run import Run
from cl_dist.run_config import read_run_file
from launcher.runs import recipes

FOLDER = Path(os.environ.get("ASC_DIR", "no such folder"))

pytestmark = pytest.mark.skipif(
    not (FOLDER / "bing17.jsonl.gz").exists(), reason="needs the ASC files: set ASC_DIR to the folder that holds them"
)


def test_the_recipe_reads_all_19_domains_as_published() -> None:
    run = Run(read_run_file(recipes()["ctr-asc19"]))
    check_data(run)
    sizes = {
        task.id: [len(run.data(t).rows(split)) for split in ("train", "dev", "test")]
        for t, task in enumerate(run.tasks.tasks)
    }
    assert len(sizes) == 19
    assert sizes["Bing3domains_Speaker"] == [352, 44, 44]
    assert sizes["XuSemEval14_rest"] == [3452, 150, 1120]
    assert sum(size[0] for size in sizes.values()) == 10_241
    assert {len(run.data(t).labels) for t in range(17)} == {2}
    assert {len(run.data(t).labels) for t in (17, 18)} == {3}
