"""The command line as a person meets it: exit codes, one clear message, JSON; runs are computed in this process."""

import json
import os
import platform
import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_dist.contract import tiny
from cl_dist.errors import StoppedError
from launcher.runs import recipes
from tests.launcher.commands import TASKS, Cli, fresh, save_run, stamps


def edit_row(path: Path, number: int, **changes: str) -> None:
    """Change a row of a file of JSON lines; numbers count from 1, as in messages."""
    lines = path.read_text(encoding="utf8").splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changes)
    path.write_text("\n".join(lines) + "\n", encoding="utf8")


# ------------------------------------------------------------------------------------------------- plans and settings


def test_plan_names_every_stage_and_imports_nothing_heavy(run_file: Path) -> None:
    ended, modules = fresh("plan", run_file, "--json", "--no-memory", cwd=run_file.parent)
    assert (ended.code, modules) == (0, []), ended.err
    stages = ended.json()["stages"]
    expected = ["00-food/train", "00-food/evaluate", "01-film/train", "01-film/evaluate"]
    assert [stage["stage"] for stage in stages] == expected
    assert [stage["rows"] for stage in stages] == [20, 10, 20, 20]
    assert stages[2]["inputs"] == ["00-food/train"]
    assert not any(stage["done"] for stage in stages)
    assert not (run_file.parent / "runs").exists()


def test_plan_of_a_finished_run_says_done(cli: Cli, finished: Path) -> None:
    ended = cli("plan", finished / "tiny.yaml", "--json")
    assert all(stage["done"] for stage in ended.json()["stages"])
    table = cli("plan", finished / "tiny.yaml").out
    assert "to do" not in table
    assert "then baseline plain: sequential on the same tasks" in table


@pytest.mark.parametrize("verb", ["plan", "train", "data check"])
@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("science.train.epoch=3", "science.train: unknown key 'epoch'; did you mean 'epochs'?"),
        ("science.train.epochs", "'science.train.epochs': expected dotted.key=value"),
        ("science.train.epochs=0", "science.train.epochs=0: Input should be greater than 0"),
        ("science.tasks.fod.text=x", "no list item 'fod'; did you mean 'food'?"),
        ("science.method.name=crt", "name='crt' is not a method; did you mean 'ctr'?"),
        ("cluster.workers=2", "workers=2 is not supported with dispatcher: local"),
    ],
)
def test_a_wrong_setting_is_named_and_exits_2(cli: Cli, run_file: Path, verb: str, setting: str, message: str) -> None:
    ended = cli(*verb.split(), run_file, setting)
    assert ended.code == 2
    assert message in ended.err
    assert ended.err.count("ConfigError") == 1
    assert "Traceback" not in ended.err
    assert ended.out == ""
    assert not (run_file.parent / "runs").exists()


@pytest.mark.parametrize("verb", ["plan", "train", "data check", "data show"])
def test_an_unknown_recipe_suggests_the_nearest(cli: Cli, verb: str) -> None:
    ended = cli(*verb.split(), "ctr-dmo")
    assert ended.code == 2
    assert "CONFIG='ctr-dmo'" in ended.err
    assert "did you mean 'ctr-demo'?" in ended.err


def test_an_unknown_verb_is_a_usage_error(cli: Cli) -> None:
    assert cli("trian", "x.yaml").code == 2


def test_a_folder_that_holds_no_run_is_refused(cli: Cli, tmp_path: Path) -> None:
    for verb in ("status", "resume", "report"):
        ended = cli(verb, tmp_path)
        assert ended.code == 2
        assert "expected a run folder, with config.yaml in it" in ended.err


def test_errors_are_one_json_document_when_asked_for(cli: Cli, run_file: Path) -> None:
    ended = cli("plan", run_file, "science.seed=-1", "--json")
    assert ended.code == 2
    assert ended.json() == {
        "code": 2,
        "kind": "ConfigError",
        "message": "science.seed=-1: Input should be greater than or equal to 0",
    }


# --------------------------------------------------------------------------------------------------------------- data


def wrong_label(folder: Path) -> str:
    edit_row(folder / "food.jsonl", 27, label="godo")
    return "food.jsonl, line 27, field label: label 'godo' of test never occurs in train; did you mean 'good'?"


def empty_split(folder: Path) -> str:
    path = folder / "film.jsonl"
    kept = [line for line in path.read_text(encoding="utf8").splitlines() if '"split": "test"' not in line]
    path.write_text("\n".join(kept) + "\n", encoding="utf8")
    return "film.jsonl: the test split is empty (26 rows read)"


@pytest.mark.parametrize("verb", ["plan", "train", "data check", "data show"])
@pytest.mark.parametrize("spoil", [wrong_label, empty_split])
def test_a_fault_in_the_data_is_named_and_exits_3(cli: Cli, run_file: Path, verb: str, spoil: Any) -> None:
    message = spoil(run_file.parent)
    ended = cli(*verb.split(), run_file)
    assert ended.code == 3
    assert message in ended.err
    assert ended.err.count("DataError") == 1
    assert "Traceback" not in ended.err
    assert not (run_file.parent / "runs").exists()


def test_faults_of_all_tasks_are_named_before_any_worker_is_started(run_file: Path) -> None:
    messages = [wrong_label(run_file.parent), empty_split(run_file.parent)]
    ended, modules = fresh("train", run_file, "cluster.dispatcher=ray", "cluster.workers=2", "cluster.engine=deepspeed",
                           cwd=run_file.parent)  # fmt: skip
    assert ended.code == 3
    assert all(message in ended.err for message in messages)
    assert modules == []  # so neither Ray nor a worker can have been started
    assert not (run_file.parent / "runs").exists()


def test_data_check_counts_rows_labels_and_faults(cli: Cli, run_file: Path) -> None:
    ended = cli("data", "check", run_file, "--json")
    assert ended.code == 0
    assert list(ended.json()) == list(TASKS)
    film = ended.json()["film"]
    assert film["rows"] == {"train": 20, "dev": 6, "test": 10}
    assert (film["labels"], film["faults"]) == (["bad", "good"], [])
    assert film["label_counts"]["test"] == {"bad": 5, "good": 5}
    assert film["label_shares"]["test"] == {"bad": 0.5, "good": 0.5}

    shown = cli("data", "check", run_file).out
    assert re.search(r"film .* all .* 20 .* 6 .* 10 .* 0", shown)
    assert re.search(r"bad .* 10 +50% .* 3 +50% .* 5 +50%", shown)
    assert "task film: only 10 test rows" in shown

    message = wrong_label(run_file.parent)
    ended = cli("data", "check", run_file, "science.seed=1")
    assert ended.code == 3
    assert message in ended.err
    assert "food" in ended.out  # the table comes first


def test_data_check_gives_a_program_one_document_for_data_with_faults(cli: Cli, run_file: Path) -> None:
    message = wrong_label(run_file.parent)
    ended = cli("data", "check", run_file, "--json")
    assert ended.code == 3
    (fault,) = ended.json()["food"]["faults"]
    assert fault.endswith(message)


def test_data_show_prints_a_row_as_the_encoder_reads_it(cli: Cli, run_file: Path) -> None:
    out = cli("data", "show", run_file).out
    assert "[CLS] the cake" in out
    assert "of at most 16" in out
    assert "class          1 = good of ['bad', 'good']" in out


# ---------------------------------------------------------------------------------------------------- what there is


@pytest.mark.parametrize(("what", "known"), [("methods", "ctr"), ("recipes", "ctr-demo"), ("metrics", "cl/bwt")])
def test_list_tells_what_can_be_named(cli: Cli, what: str, known: str) -> None:
    assert known in cli("list", what).out
    assert cli("list", what, "--json").json()[known]


def test_list_of_anything_else_is_refused(cli: Cli) -> None:
    ended = cli("list", "tasks")
    assert ended.code == 2
    assert "expected one of methods, recipes, metrics" in ended.err


def test_schema_is_a_json_schema_that_accepts_what_the_program_accepts(cli: Cli, run_file: Path) -> None:
    schema = cli("schema").json()
    validator = import_module("jsonschema").Draft202012Validator
    validator.check_schema(schema)
    tree = yaml.safe_load(run_file.read_text(encoding="utf8"))
    assert validator(schema).is_valid(tree)
    tree["science"]["train"]["epoch"] = 3
    assert not validator(schema).is_valid(tree)


@pytest.mark.parametrize(
    ("key", "shown"),
    [
        ("science.method.ctr", ["science.method.ctr", "tsm_size", "2000", "integer > 0", "Gated units"]),
        ("ctr", ["science.method.ctr", "mask_mean"]),
        ("science.train", ["epochs", "5", "Passes over the train rows"]),
        ("cluster.zero_stage", ["cluster.zero_stage", "0, 1, 2, 3", "ZeRO"]),
        ("science.tasks.source.split", ["by", "field, id_hash, files"]),
        ("science.method", ["lamol", "see --for science.method.lamol"]),
        ("science.rows", ["train", "balance"]),
        ("science", ["science.train", "science.tasks.source", "min_yield"]),
    ],
)
def test_schema_for_a_section_is_a_table(cli: Cli, key: str, shown: list[str]) -> None:
    ended = cli("schema", "--for", key)
    assert ended.code == 0, ended.err
    assert [word for word in shown if word not in ended.out] == []


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("science.trian", "--for 'science.trian': science has no 'trian'; did you mean 'train'?"),
        ("scince", "--for 'scince': a run file has no 'scince'; did you mean 'science'?"),
        ("science.method.crt", "science.method has no 'crt'; did you mean 'ctr'?"),
        ("science.train.epoch", "science.train has no 'epoch'; did you mean 'epochs'?"),
    ],
)
def test_schema_for_anything_else_is_refused(cli: Cli, key: str, message: str) -> None:
    ended = cli("schema", "--for", key)
    assert ended.code == 2
    assert message in ended.err


def test_show_prints_a_recipe_with_its_comments_unchanged(cli: Cli, run_file: Path) -> None:
    assert cli("show", "ctr-demo").out == recipes()["ctr-demo"].read_text(encoding="utf8")
    assert cli("show", run_file).out == run_file.read_text(encoding="utf8")
    ended = cli("show", "ctr-dmo")
    assert (ended.code, "did you mean 'ctr-demo'?" in ended.err) == (2, True)


def test_a_key_at_the_wrong_place_is_shown_its_place(cli: Cli, run_file: Path) -> None:
    ended = cli("plan", run_file, "train.lr=1e-3")
    assert ended.code == 2
    assert "unknown key 'train'; did you mean 'science.train'?" in ended.err
    assert "did you mean 'train.lr'?" in cli("plan", run_file, "science.lr=1e-3").err


def test_plan_shows_equal_devices_once_and_no_zeros(cli: Cli, run_file: Path) -> None:
    lines = [line for line in cli("plan", run_file).out.splitlines() if line.startswith("devices of ")]
    assert len(lines) == 1
    assert lines[0].startswith("devices of 8 to 192 GiB: 1 worker(s)")
    assert " 0.0 KiB" not in cli("plan", run_file).out


def test_runs_lists_runs_and_baselines_the_latest_first(cli: Cli, finished: Path, tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        shutil.copytree(finished / "runs" / "tiny", tmp_path / "all" / name)
    shutil.rmtree(tmp_path / "all/b/c/stages/01-film")
    os.utime(tmp_path / "all/a/run.json", (1, 1))
    os.utime(tmp_path / "all/a/config.yaml", (1, 1))
    (tmp_path / "all/broken").mkdir()
    (tmp_path / "all/broken/config.yaml").write_text("run: {name: x}\n", encoding="utf8")
    lines = {line["run"]: line for line in cli("runs", tmp_path / "all", "--json").json()}
    assert list(lines)[-3:] == ["a", "a/baselines/individual", "a/baselines/plain"]
    assert set(lines) == {
        "broken",
        *(f"{n}{b}" for n in ("a", "b/c") for b in ("", "/baselines/individual", "/baselines/plain")),
    }
    assert [lines["a"][key] for key in ("method", "tasks_done", "tasks", "status")] == ["ctr", 2, 2, "finished"]
    summary = json.loads((finished / "runs/tiny/metrics/summary.json").read_text("utf8"))
    assert lines["a"]["score"] == summary["metrics"]["cl/avg_acc"]["value"]
    assert lines["a"]["updated"] == "1970-01-01T00:00:01Z"
    assert lines["b/c"]["tasks_done"] == 1
    assert (lines["broken"]["status"], lines["broken"]["method"]) == ("unreadable", None)
    table = cli("runs", tmp_path / "all").out
    assert "2/2" in table
    assert f"{lines['a']['score']:.4f}" in table
    assert "unreadable: " in table
    assert cli("runs", tmp_path / "all" / "a", "--json").json()[0]["run"] == "a"


def test_runs_of_a_folder_that_does_not_exist_is_refused(cli: Cli) -> None:
    ended = cli("runs")
    assert ended.code == 2
    assert "FOLDER='runs': expected a folder of run folders, such as runs" in ended.err


def test_runs_imports_nothing_heavy(finished: Path) -> None:
    ended, modules = fresh("runs", finished / "runs", cwd=finished)
    assert (ended.code, modules) == (0, []), ended.err


def test_inspect_lists_tensors_on_demand(cli: Cli, finished: Path) -> None:
    short, whole = (cli("inspect", finished / "runs/tiny", *more).out for more in ((), ("--tensors",)))
    assert "model after 01-film/train: " in short
    assert "--tensors lists them" in short
    assert len(whole.splitlines()) > len(short.splitlines()) + 10
    assert short.index("plugins: ") < short.index("model after")


def test_env_tells_versions(cli: Cli) -> None:
    facts = cli("env", "--json").json()
    assert {"python", "platform", "torch", "ray", "deepspeed"} <= facts.keys()
    assert facts["python"] in cli("env").out


# ---------------------------------------------------------------------------------------------------- runs, computed


def test_status_of_a_finished_run_and_its_baselines(cli: Cli, finished: Path) -> None:
    lines = cli("status", finished / "runs" / "tiny", "--json").json()
    assert [(line["run"], line["status"], line["done"], line["stages"], line["next"]) for line in lines] == [
        ("tiny", "finished", 4, 4, None),
        ("individual", "finished", 4, 4, None),
        ("plain", "finished", 4, 4, None),
    ]
    assert "finished" in cli("status", finished / "runs" / "tiny").out


@pytest.mark.parametrize(
    ("attempts", "status"), [([], "running"), ([{"pid": 2**70, "host": platform.node()}], "killed")]
)
def test_status_of_a_run_that_nobody_is_at_work_on(
    cli: Cli, finished: Path, tmp_path: Path, attempts: list[Any], status: str
) -> None:
    run = shutil.copytree(finished / "runs" / "tiny", tmp_path / "copy")
    state = {"status": "running", "command": "", "versions": {}, "attempts": attempts}
    (run / "run.json").write_text(json.dumps(state), encoding="utf8")
    assert cli("status", run, "--json").json()[0]["status"] == status


@pytest.mark.parametrize("verb", ["status", "resume"])
def test_a_damaged_manifest_is_told_without_a_traceback(cli: Cli, finished: Path, tmp_path: Path, verb: str) -> None:
    run = shutil.copytree(finished / "runs" / "tiny", tmp_path / "copy")
    path = run / "stages/00-food/train/manifest.json"
    path.write_text(path.read_text("utf8").replace('"seconds"', '"secondr"'), encoding="utf8")
    ended = cli(verb, run)
    assert (ended.code, "Traceback" in ended.err) == (6, False)
    assert f"remove the folder {path.parent}" in ended.err.replace("\n", " ")


def test_status_and_resume_find_the_run_worked_on_last(
    cli: Cli, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished)
    assert cli("status", "--json").json()[0]["run"] == "tiny"
    assert cli("resume", "--json").json()["runs"][0]["run"] == "tiny"


def test_a_second_train_computes_nothing_and_gives_the_same_summary(finished: Path) -> None:
    before = stamps(finished)
    summary = (finished / "runs/tiny/metrics/summary.json").read_bytes()
    ended, modules = fresh("train", "tiny.yaml", "--json", cwd=finished)
    assert ended.code == 0, ended.err
    assert stamps(finished) == before
    assert (finished / "runs/tiny/metrics/summary.json").read_bytes() == summary
    assert ended.json()["runs"][0] == json.loads(summary)
    assert modules == []  # not even torch was needed


def test_changed_science_is_refused_with_the_keys_that_differ(cli: Cli, finished: Path) -> None:
    folder = finished / "runs" / "tiny"
    changed = save_run(finished / "changed.yaml", yaml.safe_load((finished / "tiny.yaml").read_text(encoding="utf8")))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for verb, where in (("train", changed), ("resume", folder), ("plan", changed)):
        ended = cli(verb, where, "science.method.s_max=60.0", "run.name=tiny", "science.train.epochs=3")
        assert ended.code == 6
        assert "00-food/train is already done with different settings" in ended.err
        assert "method.s_max: finished with 50.0, now 60.0" in ended.err
        assert "train.epochs: finished with 2, now 3" in ended.err
        assert "run.name=" in ended.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_damaged_manifest_is_named_and_exits_6(cli: Cli, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "runs" / "tiny", tmp_path / "tiny")
    manifest = folder / "stages/00-food/train/manifest.json"
    manifest.write_text(manifest.read_text(encoding="utf8")[:100], encoding="utf8")
    ended = cli("resume", folder)
    assert ended.code == 6
    assert str(manifest) in ended.err
    assert "to compute the stage again" in ended.err


def test_cluster_settings_may_change_and_a_run_folder_may_move(cli: Cli, finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "runs" / "tiny", tmp_path / "elsewhere")
    before = stamps(folder)
    assert cli("resume", folder, "cluster.micro_batch=2").code == 0
    assert stamps(folder) == before
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf8"))["cluster"]["micro_batch"] == 2


def test_report_compares_the_run_with_its_baselines(cli: Cli, finished: Path) -> None:
    ended = cli("report", finished / "runs" / "tiny", "--json")
    assert ended.code == 0
    page = Path(ended.json()["report"])
    assert page == finished / "runs/tiny/report/index.html"
    html = page.read_text(encoding="utf8")
    assert "individual" in html
    assert "plain" in html
    main_run, individual, plain = ended.json()["runs"]
    assert [individual["method"], plain["method"]] == ["individual", "sequential"]
    assert main_run["references"] == {"individual": "individual", "joint": None}
    own, one = (run["matrix"]["accuracy"] for run in (main_run, individual))
    expected = sum(own[t][t] - one[t][t] for t in range(2)) / 2
    assert main_run["metrics"]["cl/fwt_one"]["value"] == pytest.approx(expected)
    assert main_run["metrics"]["cl/intransigence"]["value"] is None
    assert json.loads((finished / "runs/tiny/metrics/summary.json").read_text(encoding="utf8")) == main_run


def test_a_reference_fills_what_the_baselines_leave_open(cli: Cli, finished: Path) -> None:
    run = finished / "runs" / "tiny"
    other = {"run": {"name": "joint"}, "science": {"method": {"name": "joint"}}}
    trained = cli("train", save_run(finished / "joint.yaml", tiny.tree(finished, other, tasks=TASKS)), "--json")
    assert trained.code == 0
    ended = cli("report", run, "--reference", f"joint={finished / 'runs/joint'}", "--json")
    main_run = ended.json()["runs"][0]
    assert main_run["references"] == {"individual": "individual", "joint": "joint"}
    own, joint = (summary["matrix"]["accuracy"] for summary in (main_run, trained.json()["runs"][0]))
    expected = sum(joint[1][t] - own[t][t] for t in range(2)) / 2
    assert main_run["metrics"]["cl/intransigence"]["value"] == pytest.approx(expected)

    ended = cli("report", run, "--reference", f"individual={finished / 'runs/joint'}")
    assert ended.code == 2
    assert "its method is 'joint'; expected a run of the method 'individual'" in ended.err


def test_a_reference_on_other_rows_is_refused(cli: Cli, finished: Path, tmp_path: Path) -> None:
    tree = tiny.tree(tmp_path, {"science": {"method": {"name": "joint"}}}, tasks=TASKS, train=22)
    assert cli("train", save_run(tmp_path / "joint.yaml", tree)).code == 0
    ended = cli("report", finished / "runs" / "tiny", "--reference", f"joint={tmp_path / 'runs/tiny'}")
    assert ended.code == 3
    assert "task food has other rows there; the scores do not compare" in ended.err


@pytest.mark.parametrize("reference", ["joint", "upper=runs/x"])
def test_a_reference_is_named_by_its_kind(cli: Cli, finished: Path, reference: str) -> None:
    ended = cli("report", finished / "runs" / "tiny", "--reference", reference)
    assert ended.code == 2
    assert "expected individual=RUN or joint=RUN" in ended.err


def test_a_fault_of_our_own_shows_its_traceback_and_exits_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.runs.recipes", lambda: 1 / 0)
    ended = cli("list", "recipes")
    assert ended.code == 1
    assert "ZeroDivisionError" in ended.err
    assert "please report it" in ended.err


class ToldInside:
    """A dispatcher in whose compiled code the signal arrives; such code wraps what its handler raises."""

    def run(self, *args: object) -> None:
        raise SystemError("returned a result with an exception set") from StoppedError("stopped by SIGTERM")

    def close(self) -> None:
        """Nothing was started."""


def test_a_stop_that_compiled_code_wraps_is_a_stop(
    cli: Cli, run_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("cl_dist.session._dispatcher", lambda config: ToldInside())
    ended = cli("train", run_file)
    assert (ended.code, "Traceback" in ended.err) == (75, False)
    assert "stopped by SIGTERM" in ended.err
    assert json.loads((tmp_path / "runs/tiny/run.json").read_text(encoding="utf8"))["status"] == "stopped"
