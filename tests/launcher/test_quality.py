import json
from pathlib import Path
from typing import Any

import pytest

from cl_dist.errors import ConfigError
from launcher.verbs.quality import parse_gates
from tests.launcher.commands import Cli

METRICS: dict[str, dict[str, Any]] = {
    "cl/avg_acc": {"value": 0.5},
    "cl/bwt": {"value": -0.25},
    "cl/fwt": {"value": None},
}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("cl/avg_acc<0.5", None),
        ("cl/avg_acc<=0.5", "--fail-if 'cl/avg_acc<=0.5': cl/avg_acc is 0.5"),
        ("cl/avg_acc > .5", None),
        (" cl/avg_acc >= 5e-1 ", "--fail-if 'cl/avg_acc>=0.5': cl/avg_acc is 0.5"),
        ("cl/bwt<-0.2", "--fail-if 'cl/bwt<-0.2': cl/bwt is -0.25"),
        ("cl/bwt>-0.2", None),
        ("cl/fwt<0", "cl/fwt was not measured; it is 1/(T-1) sum_{j>=2}"),
        ("cl/intransigence>1", "cl/intransigence was not measured"),  # not in the summary at all
    ],
)
def test_a_gate_is_broken_where_its_condition_holds_or_cannot_be_told(text: str, reason: str | None) -> None:
    (gate,) = parse_gates([text])
    found = gate.reason(METRICS)
    assert (found is None) == (reason is None)
    assert (reason or "") in (found or "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "cl/bwt",
        "cl/bwt>",
        ">0.1",
        "cl/bwt=0.1",
        "cl/bwt>>1",
        "cl/bwt>x",
        "cl/bwt>nan",
        "cl/bwt>inf",
        "cl/bwt>1_0",
        "cl/bwt>010",
    ],
)
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected METRIC>NUMBER, with one of > >= < <="):
        parse_gates(["cl/avg_acc<0", text])


@pytest.mark.parametrize("verb", ["train", "resume", "report"])
def test_an_unknown_metric_is_a_usage_error_before_anything_is_computed(cli: Cli, run_file: Path, verb: str) -> None:
    ended = cli(verb, run_file, "--fail-if", "cl/forgeting_max>0.05")
    assert ended.code == 2
    assert "no metric 'cl/forgeting_max'; did you mean 'cl/forgetting_max'?" in ended.err
    assert not (run_file.parent / "runs").exists()


@pytest.mark.parametrize("verb", ["train", "resume", "report"])
def test_a_broken_gate_exits_8_after_table_and_report(
    cli: Cli, finished: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    of = "tiny.yaml" if verb == "train" else "runs/tiny"
    gates = ("--fail-if", "cl/avg_acc>=0", "--fail-if", "cl/avg_acc<0", "--fail-if", "cl/intransigence>0.1")
    ended = cli(verb, of, *gates)
    assert ended.code == 8
    value = json.loads((finished / "runs/tiny/metrics/summary.json").read_text("utf8"))["metrics"]["cl/avg_acc"][
        "value"
    ]
    assert f"QualityError: --fail-if 'cl/avg_acc>=0': cl/avg_acc is {value:.6g}\n" in ended.err
    assert "--fail-if 'cl/intransigence>0.1': cl/intransigence was not measured" in ended.err
    assert "cl/avg_acc<0" not in ended.err
    assert "Traceback" not in ended.err
    assert "tiny (ctr)" in ended.out
    assert "report: " in ended.out


def test_gates_that_hold_change_nothing(cli: Cli, finished: Path) -> None:
    run = finished / "runs/tiny"
    ended = cli("report", run, "--fail-if", "cl/avg_acc<0", "--fail-if", "cl/forgetting_max>1")
    assert ended.code == 0
    assert ended.out == cli("report", run).out


def test_a_program_gets_one_document_with_the_broken_gates(cli: Cli, finished: Path) -> None:
    ended = cli("report", finished / "runs/tiny", "--fail-if", "cl/avg_acc>=0", "--json")
    assert ended.code == 8
    (reason,) = ended.json()["broken"]
    assert reason.startswith("--fail-if 'cl/avg_acc>=0': cl/avg_acc is ")
    assert cli("report", finished / "runs/tiny", "--json").json()["broken"] == []
