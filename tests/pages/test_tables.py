"""The figures and references on the pages are those of the stored results and of the code."""

import json
import re
import subprocess
from typing import Any

import pytest

from tests.launcher.summaries import summaries
from tests.pages.markdown import GENERATED, ROOT, pages
from tests.pages.measured_tables import memory, parity, speed
from tests.pages.run_tables import kept, means, quantile, table
from tests.pages.tables import REFERENCES, filled, results


def test_each_generated_block_is_on_one_page_and_up_to_date() -> None:
    names = [match["name"] for page in pages().values() for match in GENERATED.finditer(page)]
    assert sorted(names) == sorted({*results(), *REFERENCES, "ctr-demo-means"})
    assert [name for name, page in pages().items() if filled(page) != page] == [], "run `make tables`"


def test_a_table_has_a_row_per_run_and_no_number_for_what_was_not_measured() -> None:
    runs = [kept(summary) for summary in summaries()]
    runs[0]["metrics"]["cl/bwt"]["value"] = None
    text = table(runs)
    assert text.count("\n| ") == len(runs) + 1
    row = next(line for line in text.splitlines() if line.startswith(f"| {runs[0]['method']} "))
    assert row.split("|")[6].strip() == "-"


def test_several_runs_of_a_method_have_a_mean() -> None:
    one = kept(summaries()[0])
    other = json.loads(json.dumps(one)) | {"seed": 1}
    other["metrics"]["cl/avg_acc"]["value"] = one["metrics"]["cl/avg_acc"]["value"] - 0.1
    rows = [line.split("|") for line in table([one, other]).splitlines() if line.startswith(f"| {one['method']} ")]
    assert [row[2].strip() for row in rows] == [str(one["seed"]), "1", "mean of 2"]
    first, second, both = (float(row[3]) for row in rows)
    assert both == pytest.approx((first + second) / 2, abs=1e-4)
    assert first != second


def test_settings_of_one_method_go_by_their_names() -> None:
    one = kept(summaries()[0]) | {"folder": "a", "run": "block"}
    other = json.loads(json.dumps(one)) | {"run": "head"}
    rows = [line.split("|")[1].strip() for line in table([one, other]).splitlines()[2:4]]
    assert rows == ["block", "head"]
    assert "mean of" not in table([one, other])


def test_methods_are_compared_by_task_with_an_interval() -> None:
    def scored(method: str, seed: int, scores: list[float]) -> dict[str, Any]:
        return {
            "run": method, "method": method, "seed": seed, "seconds": 1.0, "metrics": {},
            "matrix": {"accuracy": [[0.0] * 3, scores]}, "versions": {"torch": "2"},
            "tasks": [{"id": id, "rows": dict.fromkeys(("train", "dev", "test"), 9), "majority": 0.5} for id in "abc"],
            "cluster": {"workers": 1, "zero_stage": 0},
        }  # fmt: skip

    runs = [scored("hat", seed, [0.50, 0.60, 0.70]) for seed in (0, 1)]
    runs += [scored("ctr", 0, [0.51, 0.60, 0.71]), scored("ctr", 1, [0.53, 0.60, 0.75])]
    # by task, ctr is ahead by 2, 0 and 3 points: mean 5/3, standard deviation 1.5275
    assert "hat minus ctr: accuracy -1.7 ± 3.8." in table(runs)
    assert "ctr minus hat: accuracy +1.7 ± 3.8." in table(runs[::-1])
    assert "minus" not in table(runs[:2])
    assert "minus" not in table([runs[0], runs[3]])  # another seed: no pair


@pytest.mark.parametrize(("freedom", "expected"), [(1, 12.706), (2, 4.303), (5, 2.571), (18, 2.101), (300, 1.968)])
def test_intervals_are_students(freedom: int, expected: float) -> None:
    assert quantile(freedom) == pytest.approx(expected, abs=1e-3)


def test_the_table_of_parity_shows_the_worst_of_its_cells_and_why_one_is_refused() -> None:
    cell = {"method": "ctr", "workers": 2, "weights": 1e-8, "metrics": 0.0, "mask_bits": 0}
    cells = [cell | {"zero_stage": stage, "accumulation": acc} for stage in (0, 1) for acc in (1, 2)]
    cells[1] |= {"weights": 3e-6, "mask_bits": 2}
    cells[2:] = [{"method": "ctr", "workers": 2, "zero_stage": 1, "accumulation": 1, "refused": "no such stage"}]
    row = parity({"cells": cells, "steps": 20, "rows": 41, "global_batch": 32}).splitlines()[2]
    assert [value.strip() for value in row.split("|")[1:-1]] == ["ctr", "2", "3e-06", "no such stage", "0e+00", "2"]


def test_a_pretrained_models_parity_has_a_table_of_its_own() -> None:
    cell = {"method": "ctr", "workers": 2, "zero_stage": 2, "accumulation": 1}
    cell |= {"weights": 2e-7, "metrics": 1e-7, "mask_bits": 0}
    data = {"cells": [cell], "rows": 41, "global_batch": 32, "steps": 20}
    assert parity(data).count("| --- ") == 5
    way = {
        "what": "ZeRO-2",
        "workers": 2,
        "steps": 35,
        "weights": 0.0613,
        "mean": 1.2e-5,
        "mask_bits": 3,
        "masks": 10752,
    }
    way |= {"metrics": 1e-3, "answers": 1, "accuracy": [0.705, 0.7]}
    lines = parity(data | {"pretrained": [way]}).splitlines()
    assert "| ZeRO-2 | 2 | 6e-02 | 1e-05 | 3 of 10,752 | 1e-03 | 1 | 0.705 |" in lines
    assert "35 steps" in lines[-1]
    assert lines[-1].endswith("is 0.700.")


def test_the_table_of_memory_has_a_row_per_gang_and_a_column_per_micro_batch() -> None:
    line = {"what": "ctr, train", "workers": 2, "zero_stage": 3, "told": 3 * 2**20, "measured": 2 * 2**20}
    lines = [line | {"micro_batch": "auto"}, line | {"micro_batch": 1, "told": 2**20}]
    lines.append(line | {"what": "lamol, generate", "workers": 1, "zero_stage": None, "micro_batch": None})
    rows = memory({"lines": lines, "length": 8, "global_batch": 4, "torch": "2"}).splitlines()[2:4]
    assert rows[0] == "| ctr, train | 2 | ZeRO-3 | 3.0 / 2.0 (1.500) | 1.0 / 2.0 (0.500) |"
    assert rows[1] == "| lamol, generate | 1 | torch | 3.0 / 2.0 (1.500) | - |"


def test_the_table_of_speed_shows_each_figure_with_its_budget() -> None:
    figures = [
        {"what": "a vote", "value": 1.06, "text": "1.06x their time", "budget": "at most 1.1"},
        {"what": "operations", "value": 437, "text": "437 each time", "budget": ""},
    ]
    rows = speed({"figures": figures, "cores": 2, "torch": "2"}).splitlines()[2:4]
    assert rows == ["| a vote | 1.06x their time | at most 1.1 |", "| operations | 437 each time | - |"]


def test_the_table_of_speed_has_two_workers_and_marks_a_missed_budget() -> None:
    line = {"how": "strong", "workers": 1, "global_batch": 64, "step_s": 1.0, "tokens_per_s": 1000.0}
    scaling: dict[str, Any] = {
        "measured": [line, line | {"workers": 2, "tokens_per_s": 1550.0}],
        "cores": 2,
        "torch": "2",
    }
    text = speed({"figures": [], "cores": 2, "torch": "2"}, scaling)
    assert "| training with two workers, against one | 1.55x as fast | at least 1.7; missed |" in text
    scaling["measured"][1]["tokens_per_s"] = 1710.0
    assert "| 1.71x as fast | at least 1.7 |" in speed({"figures": [], "cores": 2, "torch": "2"}, scaling)
    assert "two workers" not in speed({"figures": [], "cores": 2, "torch": "2"}, {"measured": []})


def test_the_short_table_has_the_mean_of_each_method_and_the_commonest_label() -> None:
    one = kept(summaries()[0])
    other = json.loads(json.dumps(one)) | {"seed": 1}
    other["metrics"]["cl/avg_acc"]["value"] = one["metrics"]["cl/avg_acc"]["value"] - 0.1
    first, last = means([one, other]).splitlines()[2:]
    mean = one["metrics"]["cl/avg_acc"]["value"] - 0.05
    assert [cell.strip() for cell in first.split("|")[1:4]] == [f"`{one['method']}`", "2", f"{mean:.3f}"]
    assert last.startswith("| always the commonest label |")


def test_make_chaos_runs_every_test_that_the_table_of_faults_names() -> None:
    page = pages()["tests/README.md"]
    faults = page.partition("## Faults")[2].partition("\n## ")[0]
    run = subprocess.run(["make", "-n", "chaos"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    names = set(re.findall(r"test_\w+\.py", faults))
    assert len(names) > 5
    assert names <= set(re.findall(r"test_\w+\.py", run.stdout))
    assert all(list((ROOT / "tests").rglob(name)) for name in names)
