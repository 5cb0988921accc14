"""The parts of the report that read the run folder: verdict, groups, curves, mistakes, rehearsal, settings, index."""

import base64
import hashlib
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html import unescape
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_dist.intervals import mean_interval, wilson
from cl_dist.metrics import DEFINITIONS, summarize
from cl_dist.run_intervals import metric_intervals
from launcher.report.answers import answer_views
from launcher.report.comparison import groups
from launcher.report.index import SORT, write_index
from launcher.report.numbers import number, span
from launcher.report.page import write_report
from launcher.report.rehearsal import fisher, warnings
from launcher.report.stored import MOST_POINTS, Answer, Curve, Details
from launcher.report.verdict import verdict
from tests.launcher.commands import Cli
from tests.launcher.summaries import NINETEEN, summaries
from tests.launcher.test_report import CHROMIUM, FLAGS, HOSTILE, section


class Given(Details):
    """Details that a test makes up."""

    folder = Path("runs/given")
    settings = f"run: {{name: {HOSTILE}}}\nscience: {{seed: 0}}\n"
    matrix_csv = "after,a\na,0.5\n"
    group = ""
    curves: list[Curve] = []

    def __init__(self, right: Mapping[tuple[int, int], Sequence[float]] | None = None, **values: Any) -> None:
        self.__dict__.update(values, given=right or {}, stored={})

    def answers(self, after: int, on: int) -> list[Answer] | None:
        found: dict[tuple[int, int], list[Answer]] = self.__dict__["stored"]
        return found.get((after, on))

    def right(self, after: int, on: int) -> Any:
        found = self.__dict__["given"].get((after, on))
        return None if found is None else np.array(found, float)


def summary_of(method: str, accuracy: list[list[float | None]], **values: Any) -> dict[str, Any]:
    """Return a summary with a matrix by hand."""
    T = len(accuracy)
    first = summaries([f"task{k}" for k in range(T)])[0]
    metrics = summarize(accuracy, accuracy)
    return {**first, "run": method, "method": method, "matrix": {"accuracy": accuracy}, "metrics": metrics} | values


def share(right: int, rows: int = 100) -> list[float]:
    return [1.0] * right + [0.0] * (rows - right)


# ------------------------------------------------------------------------------------------------------------- verdict


def test_verdict_says_what_is_forgotten_and_the_distance_to_floor_and_ceiling() -> None:
    ctr = summary_of("ctr", [[0.9, None], [0.9, 0.8]])
    sequential, individual = (
        summary_of("sequential", [[0.9, None], [0.5, 0.8]]),
        summary_of("individual", [[0.9, None], [0.9, 0.9]]),
    )
    details = {
        0: Given({(0, 0): share(90), (1, 0): share(90), (1, 1): share(80)}),
        1: Given({(0, 0): share(90), (1, 0): share(50), (1, 1): share(80)}),
        2: Given({(1, 0): share(90), (1, 1): share(90)}),
    }
    text, note = verdict(ctr, [sequential, individual], 2, details)
    over = mean_interval([np.array(share(90)) - share(50), np.zeros(100)], is_difference=True)
    below = mean_interval([np.zeros(100), np.array(share(90)) - share(80)], is_difference=True)
    assert text == (
        f"Forgets nothing; +0.200 over sequential ({span(over, sign=True)}); "
        f"0.050 below one model per task ({span(below)})."
    )
    assert "95 % intervals" in note
    text, _ = verdict(sequential, [ctr, individual], 2, {0: details[1], 1: details[0], 2: details[2]})
    assert text.startswith("Forgets 0.400 (0.3")
    assert "over sequential" not in text


def test_the_verdict_on_forgetting_has_the_interval_of_backward_transfer() -> None:
    then = [share(90), share(80), share(70)]
    now = [share(85), share(80), share(70)]
    table: list[list[float | None]] = [[0.9, None, None], [0.9, 0.8, None], [0.85, 0.8, 0.7]]
    found = metric_intervals(
        [[np.array(then[0]), None, None], [np.array(then[0]), np.array(then[1]), None], [np.array(x) for x in now]]
    )
    right = {(t, j): (now if t == 2 else then)[j] for t in range(3) for j in range(t + 1)}
    text, _ = verdict(summary_of("ctr", table), [], 3, {0: Given(right)})
    low, high = found["cl/bwt"] or (0, 0)
    assert text.startswith(f"Forgets 0.025 ({-high:.3f} to {-low:.3f})")


def test_verdict_sees_no_difference_where_the_interval_contains_zero() -> None:
    ctr, individual = (
        summary_of("ctr", [[0.8, None], [0.78, 0.8]]),
        summary_of("individual", [[0.8, None], [0.8, 0.81]]),
    )
    details = {
        0: Given({(0, 0): share(80), (1, 0): [0.0, 0.0, *share(80)[2:]], (1, 1): share(80)}),
        1: Given({(1, 0): share(80), (1, 1): [0.0, *share(82)[1:]]}),
    }
    text, _ = verdict(ctr, [individual], 2, details)
    assert re.match("Forgets 0.020|No forgetting seen: \\+0.020", text)
    assert "no difference seen from one model per task: " in text


def test_verdict_without_stored_answers_has_no_interval() -> None:
    text, note = verdict(
        summary_of("ctr", [[0.9, None], [0.9, 0.8]]), [summary_of("sequential", [[0.9, None], [0.5, 0.8]])], 2, {}
    )
    assert text == "Forgets nothing; +0.200 over sequential."
    assert note == ""
    assert verdict(summary_of("ctr", [[None, None], [None, None]]), [], 0, {}) == ("", "")


def test_verdict_compares_with_rivals_that_have_learned_the_same_tasks() -> None:
    ctr, rival = summary_of("ctr", [[0.9, None], [None, None]]), summary_of("sequential", [[0.9, None], [0.5, 0.8]])
    assert verdict(ctr, [rival], 1, {})[0] == ""
    assert "level with sequential" in verdict(rival | {"method": "ctr"}, [rival], 2, {})[0]


def test_verdict_of_a_run_alone_compares_with_the_commonest_label() -> None:
    tasks = [{**task, "majority": 0.5} for task in summary_of("ctr", [[0.9]])["tasks"]]
    assert verdict(summary_of("ctr", [[0.9]], tasks=tasks), [], 1, {})[0] == (
        "+0.400 over always answering the commonest label."
    )


# ----------------------------------------------------------------------------------------------------------- intervals


def test_intervals_of_the_summary_are_shown_in_tiles_table_and_hover(tmp_path: Path) -> None:
    (main, *_) = summaries()
    main["metrics"]["cl/avg_acc"]["interval"] = [0.701, 0.799]
    main["metrics"]["cl/bwt"]["interval"] = [-0.02, 0.01]
    main["intervals"] = {"level": 0.95, "accuracy": [[[0.11, 0.22]], [[0.33, 0.44], [0.55, 0.66]]]}
    html = write_report([main], tmp_path).read_text()
    assert "95 % interval 0.701 to 0.799" in html.split('id="runs"')[0]
    assert f"95 % interval {span((-0.02, 0.01), sign=True)}" in html.split('id="runs"')[0]
    assert "<small>±0.049</small>" in section(html, "runs")
    rows = main["tasks"][0]["rows"]["test"]
    assert f"(95 % interval 0.330 to 0.440, {rows} rows)" in section(html, "matrix")
    low, high = wilson(round(main["matrix"]["accuracy"][5][0] * rows), rows)
    assert f"(95 % interval {number(low)} to {number(high)}, {rows} rows)" in section(html, "matrix"), "not stored"


# -------------------------------------------------------------------------------------------------------------- groups


def test_runs_that_differ_by_seed_alone_are_one_group_with_mean_and_deviation(tmp_path: Path) -> None:
    ctr, sequential, _ = summaries()
    other = {**ctr, "run": "seed1", "seed": 1, "metrics": {**ctr["metrics"]}}
    other["metrics"]["cl/avg_acc"] = {**ctr["metrics"]["cl/avg_acc"], "value": 0.5}
    details = [Given(group="a"), Given(group="a"), Given(group="b")]
    runs = [ctr, other, sequential]
    assert groups(runs, dict(enumerate(details))) == [[0, 1], [2]]
    assert groups(runs, {}) == [[0], [1], [2]], "without settings nothing is known to be equal"
    html = write_report(runs, tmp_path, details).read_text()
    table, one = section(html, "runs"), ctr["metrics"]["cl/avg_acc"]["value"]
    row = re.findall(r'<tr class="[^"]*group.*?</tr>', table, re.DOTALL)
    assert len(row) == 1
    assert "ctr, 2 seeds" in row[0]
    spread = abs(one - 0.5) / 2**0.5
    assert f"{number((one + 0.5) / 2)}&nbsp;<small>±{spread:.3f}</small>" in row[0]
    assert f"ctr, 2 seeds: accuracy {number((one + 0.5) / 2)} ±{spread:.3f}, " in html.split("<nav>")[0]
    assert table.count('class="main member"') + table.count('class="member"') == 2
    assert section(html, "time").count('class="band') == 2, "for a desk and for a phone"


def test_seeds_of_a_tiny_run_are_a_group_and_another_rate_is_not(run_folder: Path, tmp_path: Path) -> None:
    from cl_dist.config import apply_overrides, parse, plain_yaml
    from cl_dist.run import Run
    from cl_dist.run_config import RunConfig

    def group(*overrides: str) -> str:
        tree = apply_overrides(plain_yaml(run_folder / "config.yaml"), overrides)
        return Details(Run(parse(RunConfig, tree))).group

    def turned() -> str:
        tree = plain_yaml(run_folder / "config.yaml")
        tree["science"]["tasks"] = tree["science"]["tasks"][::-1]
        return Details(Run(parse(RunConfig, tree))).group

    assert group() == group("science.seed=7") == turned()
    assert group() != group("science.train.lr=0.1")


# ------------------------------------------------------------------------------------------------------------ mistakes


def answer(label: str, prediction: str, probability: float | None = 0.9, text: str = "a text") -> Answer:
    return Answer("id", text, label, prediction, probability)


def given(answers: list[Answer]) -> Given:
    details = Given()
    details.__dict__["stored"] = {(0, 0): answers}
    return details


def test_mistakes_confusion_and_scores_of_labels_agree_with_hand_counts(tmp_path: Path) -> None:
    (main, *_) = summaries(["only"])
    answers = [answer("negative", "negative")] * 6 + [answer("negative", "positive", 0.6)] * 2
    answers += [answer("positive", "positive")] * 3 + [
        answer("positive", "negative", 0.99, f"{HOSTILE} {'long ' * 99}")
    ]
    (view,) = answer_views(given(answers), main, 1)
    assert view["wrong"] == 3
    assert view["right"] == wilson(9, 12)
    assert [[text for text, _, _ in cells] for _, cells in view["confusion"]["rows"]] == [["6", "2"], ["1", "3"]]
    negative, positive = view["labels"]
    assert (negative["precision"], negative["recall"]) == (6 / 7, 6 / 8)
    assert (positive["precision"], positive["recall"], positive["rows"]) == (3 / 5, 3 / 4, 4)
    assert negative["f1"] == pytest.approx(2 * (6 / 7) * (6 / 8) / (6 / 7 + 6 / 8))
    assert [row[3] for row in view["mistakes"]] == [0.99, 0.6, 0.6], "the most certain first"
    assert len(view["mistakes"][0][0]) == 300
    found = section(write_report([main], tmp_path, [given(answers)]).read_text(), "answers")
    assert "3 of 12 rows wrong" in found
    assert "most certain mistakes" in found
    assert "<script" not in found


def test_mistakes_without_probabilities_say_so_and_many_labels_are_pairs(tmp_path: Path) -> None:
    (main, *_) = summaries(["only"])
    main["tasks"] = [{**main["tasks"][0], "labels": [f"label{k}" for k in range(40)]}]
    answers = [answer(f"label{k}", "label0", None) for k in range(40)]
    (view,) = answer_views(given(answers), main, 1)
    assert view["confusion"] is None
    assert len(view["pairs"]) == len(view["mistakes"]) == 10
    assert (len(view["labels"]), view["more_labels"]) == (30, 10)
    found = section(write_report([main], tmp_path, [given(answers)]).read_text(), "answers")
    assert "no probabilities are stored" in found


def test_free_text_has_mistakes_and_no_labels() -> None:
    (main, *_) = summaries(["only"])
    main["tasks"] = [{**main["tasks"][0], "labels": []}]
    (view,) = answer_views(given([answer("42", "43", None), answer("1", "1", None)]), main, 1)
    assert (view["confusion"], view["pairs"], view["labels"]) == (None, [], [])
    assert view["mistakes"] == [("a text", "42", "43", None)]


# ----------------------------------------------------------------------------------------------------------- rehearsal


def samples(agreement: float | None, kept: int, labels: dict[str, int], real: float = 0.87) -> dict[str, Any]:
    numbers = {"requested": kept, "generated": kept, "malformed": 0, "surplus": 0, "duplicate": 0, "kept": kept}
    shares = {"first_attempt_yield": 1.0, "label_agreement": agreement, "label_agreement_real": real}
    return {"before": "b", "task": "spam", "labels": labels, "real": ["r"], "firsts": ["w"], **numbers, **shares}


def test_fishers_test_equals_the_sum_of_hypergeometric_terms() -> None:
    expected = sum(comb(23, k) * comb(30, 37 - k) for k in range(7, 12)) / comb(53, 37)
    assert fisher(11, 23, 26, 30) == pytest.approx(expected)
    assert fisher(10, 10, 10, 10) == pytest.approx(1.0)


def test_a_banner_names_samples_whose_labels_cannot_be_trusted(tmp_path: Path) -> None:
    task = {"id": "spam", "labels": ["ham", "spam"], "rows": {"train": 80, "dev": 20, "test": 30}, "majority": 0.7}
    both = samples(0.48, 23, {"ham": 23, "spam": 0})
    (reason,) = warnings([both], [task])
    chance = fisher(11, 23, 26, 30)
    assert chance < 0.01
    assert reason == (
        f"spam before b: labels agree 0.48 (23 samples) against 0.87 (30 real rows), p = {chance:.2g}; "
        "all 23 samples are “ham”"
    )
    assert warnings([samples(0.80, 23, {"ham": 12, "spam": 11})], [task]) == [], "a drop below 0.1"
    assert warnings([samples(0.60, 5, {"ham": 3, "spam": 2})], [task]) == [], "chance, with five samples"
    assert warnings([samples(None, 23, {"ham": 23})], [{**task, "majority": 0.9}]) == [], "0.9^23 is 0.09"
    main = {**summaries()[0], "replay": [both]}
    main["tasks"] = [{**main["tasks"][0], **task}, *main["tasks"][1:]]
    html = write_report([main], tmp_path).read_text()
    assert "Rehearsal cannot be trusted" in html.split("<main>")[0]
    assert "<details open><summary>spam" in section(html, "replay")
    main["replay"] = [samples(0.85, 23, {"ham": 12, "spam": 11})]
    assert "cannot be trusted" not in write_report([main], tmp_path).read_text()


# ---------------------------------------------------------------------------------------- settings, curves, run folders


@pytest.fixture
def run_folder(finished: Path) -> Path:
    """The folder of a finished tiny run with two baselines."""
    return finished / "runs" / "tiny"


def test_the_page_of_a_run_has_settings_links_and_the_matrix(run_folder: Path, cli: Cli) -> None:
    assert cli("report", run_folder).code == 0
    html = (run_folder / "report/index.html").read_text()
    settings = section(html, "settings")
    assert "global_batch" in settings
    assert unescape(settings).count("tsm_size") == (run_folder / "config.yaml").read_text().count("tsm_size")
    for link in ("../config.yaml", "../metrics/R.csv", "../metrics/summary.json"):
        assert f'href="{link}"' in html
        assert (run_folder / "report" / link).resolve().is_file()
    data = re.findall(r'href="data:text/csv;base64,([^"]+)"', html)
    assert [base64.b64decode(text).decode() for text in data] == [(run_folder / "metrics/R.csv").read_text()]
    assert section(html, "answers").count("<details") == 2
    assert "most certain mistakes" in html or " 0 of " in section(html, "answers")


def test_learning_curves_come_from_the_events_of_the_run(run_folder: Path) -> None:
    from cl_dist.stored_run import load_run

    (first, *_) = Details(load_run(run_folder).run).curves
    events = [json.loads(line) for line in (run_folder / "metrics/events.jsonl").read_text().splitlines()]
    own = [event for event in events if event.get("stage") == "00-food/train"]
    rounds = [(event["step"], event["dev/accuracy"]) for event in own if event["event"] == "round"]
    steps = [(event["step"], event["train/loss"]) for event in own if event["event"] == "telemetry"]
    assert first.dev == rounds != []
    assert first.losses == steps != []


def test_long_curves_are_averaged_and_repeated_steps_count_once(run_folder: Path, tmp_path: Path) -> None:
    from cl_dist.stored_run import load_run

    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    start = {"stage": "00-food/train", "event": "stage_start", "fingerprint": "f"}
    step = {"stage": "00-food/train", "event": "telemetry"}
    lines: list[Any] = [start, *({**step, "step": k + 1, "train/loss": 9.0} for k in range(500)), start]
    lines += [{**step, "step": k + 1, "train/loss": float(k // 3)} for k in range(450, 600)]
    text = "\n".join(map(json.dumps, lines)) + '\n{"stage": "00-food/tr'
    (copy / "metrics/events.jsonl").write_text(text)
    losses = Details(load_run(copy).run).curves[0].losses
    assert len(losses) == MOST_POINTS
    assert losses[0] == (3, 9.0)
    assert losses[-1] == (600, 199.0)
    other = {**start, "fingerprint": "g"}
    (copy / "metrics/events.jsonl").write_text(text.splitlines()[0] + "\n" + json.dumps(other) + "\n")
    assert Details(load_run(copy).run).curves[0].losses == []


def test_a_comparison_leaves_the_page_of_the_run_alone(run_folder: Path, cli: Cli, tmp_path: Path) -> None:
    assert cli("report", run_folder).code == 0
    page = run_folder / "report/index.html"
    before = page.read_text()
    ended = cli("report", run_folder, run_folder / "baselines/individual", "--json")
    assert ended.json()["report"] == str(run_folder / "report/compared/index.html")
    assert 'href="../../config.yaml"' in Path(ended.json()["report"]).read_text()
    assert page.read_text() == before
    ended = cli("report", run_folder, run_folder / "baselines/individual", "--out", tmp_path / "out")
    assert ended.code == 0
    assert (tmp_path / "out/index.html").is_file()
    assert (tmp_path / "out/matrix.png").is_file()


def test_an_index_lists_all_runs_below_a_folder(run_folder: Path, cli: Cli, tmp_path: Path) -> None:
    cli("report", run_folder)
    shutil.copytree(run_folder, tmp_path / run_folder.name)  # other tests put runs next to it
    ended = cli("report", "--index", tmp_path, "--json")
    found = ended.json()
    assert sorted(run["path"] for run in found["runs"]) == sorted(
        [run_folder.name, f"{run_folder.name}/baselines/individual", f"{run_folder.name}/baselines/plain"]
    )
    html = Path(found["index"]).read_text()
    assert f'href="{run_folder.name}/report/index.html"' in html
    assert number(found["runs"][0]["metrics"]["cl/avg_acc"]) in html
    assert cli("report", "--index", run_folder.parent, run_folder).code == 2
    assert cli("report").code == 2


def test_the_policy_of_the_index_admits_its_own_script_alone(tmp_path: Path) -> None:
    html = write_index(tmp_path)[0].read_text()
    (policy,) = re.findall(r"script-src '(sha256-[^']+)'", html)
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script == SORT
    assert policy == "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
def test_a_click_on_a_heading_sorts_the_index(tmp_path: Path) -> None:
    for summary, accuracy in zip(summaries(), (0.5, None, 0.75), strict=True):
        folder = tmp_path / str(summary["run"]) / "metrics"
        folder.mkdir(parents=True)
        summary["metrics"]["cl/avg_acc"]["value"] = accuracy
        (folder / "summary.json").write_text(json.dumps(summary))
    page = write_index(tmp_path)[0]
    click = "<script>document.querySelectorAll('th button')[1].click()</script>"
    html = re.sub(r"<meta http-equiv.*?>", "", page.read_text()).replace("</body>", f"{click}</body>")
    (tmp_path / "clicked.html").write_text(html)
    for name, order in (("index.html", None), ("clicked.html", ["individual", "ctr-demo", "sequential"])):
        flags = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", (tmp_path / name).as_uri()]
        done = subprocess.run([str(CHROMIUM), *flags], capture_output=True, text=True, timeout=100, check=True)
        assert "CONSOLE" not in done.stderr
        found = re.findall(r'<th scope="row" class="left" data-key="([^"]+)"', done.stdout)
        assert order is None or found == order


def test_the_index_says_that_a_run_was_killed(tmp_path: Path) -> None:
    summary = summaries()[0] | {"status": "running"}
    gone = subprocess.Popen(["true"])
    gone.wait()
    attempt = {"pid": gone.pid, "host": platform.node()}
    state = {"status": "running", "command": "", "versions": {}, "attempts": [attempt]}
    (tmp_path / "run/metrics").mkdir(parents=True)
    (tmp_path / "run/metrics/summary.json").write_text(json.dumps(summary))
    (tmp_path / "run/run.json").write_text(json.dumps(state))
    assert write_index(tmp_path)[1][0]["status"] == "killed"
    (tmp_path / "run/run.json").write_text("{")
    assert write_index(tmp_path)[1][0]["status"] == "running"


def test_hostile_summaries_stay_text_in_the_index(tmp_path: Path) -> None:
    summary = summaries()[0] | {"method": HOSTILE, "model": HOSTILE, "status": HOSTILE}
    (tmp_path / "run/metrics").mkdir(parents=True)
    (tmp_path / "run/metrics/summary.json").write_text(json.dumps(summary))
    (tmp_path / "broken/metrics").mkdir(parents=True)
    (tmp_path / "broken/metrics/summary.json").write_text("{")
    html = write_index(tmp_path)[0].read_text()
    assert html.count("<script") == 1
    assert "\u202e" not in html


# ---------------------------------------------------------------------------------------------------------------- size


def test_twenty_tasks_with_curves_and_mistakes_stay_below_a_megabyte(tmp_path: Path) -> None:
    runs = summaries([*NINETEEN, "the twentieth"], 12)
    labels = [f"label number {k}" for k in range(12)]
    for summary in runs:
        summary["tasks"] = [{**task, "labels": labels} for task in summary["tasks"]]
    curve = Curve([(10 * k, 2.0 / (k + 1)) for k in range(1, 201)], [(200 * k, 0.8) for k in range(1, 11)])
    rows = [answer(labels[k % 12], labels[k * 7 % 12], 0.123456, "“quoted” text & more " * 40) for k in range(500)]
    details = Given(curves=[curve] * 20, settings="key: value\n" * 400)
    details.__dict__["stored"] = {(19, j): rows for j in range(20)}
    page = write_report(runs, tmp_path, [details, Given(), Given()])
    assert section(page.read_text(), "curves").count("<h3 title=") == 20
    assert 200_000 < page.stat().st_size < 1_000_000


def test_every_metric_of_a_column_has_a_word() -> None:
    assert len({definition.word for definition in DEFINITIONS.values()}) == len(DEFINITIONS)
