import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread

from cl_dist.errors import DataError
from cl_dist.metrics import DEFINITIONS
from launcher import console
from launcher.report.figures import STEPS, contrast, ink, score_range, shade, shorten, spread
from launcher.report.numbers import DASH, duration, number
from launcher.report.page import write_report
from tests.launcher.summaries import NINETEEN, SIX, summaries, unfinished
from tests.pages.run_tables import COLUMNS as RUN_TABLES

HOSTILE = "</title><script>alert('x')</script>\"'$\\frac{\u202e&amp;" + "long" * 60
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-quic", "--hide-scrollbars"),
    *("--enable-logging=stderr", "--virtual-time-budget=2000", "--window-size=1280,4000"),
]


def page(runs: list[dict[str, Any]], folder: Path) -> str:
    return write_report(json.loads(json.dumps(runs)), folder).read_text(encoding="utf8")


def section(html: str, name: str) -> str:
    found = re.search(rf'<section id="{name}"[^>]*>.*?</section>', html, re.DOTALL)
    return found[0] if found else ""


def cells(html: str) -> list[list[tuple[str, str]]]:
    """Return the (style, text) of each cell of the accuracy matrix, a list per row."""
    rows = re.findall(r"<tr.*?</tr>", section(html, "matrix").split("<details>")[0], re.DOTALL)
    return [re.findall(r'<td class="([^"]*)"[^>]*>([^<]*)</td>', row) for row in rows[1:]]


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(summaries(), tmp_path_factory.mktemp("report"))


def test_page_names_the_run_and_the_command_that_made_it(html: str) -> None:
    assert "<title>ctr-demo" in html
    for text in ("cl-dist train ctr-demo science.train.epochs=5", "ZeRO stage 2", "torch 2.13.0", "finished"):
        assert text in html


def test_every_section_of_a_ctr_run_is_there(html: str) -> None:
    for name in ("runs", "matrix", "time", "masks", "transfer", "sharing", "tasks", "stages", "metrics"):
        assert section(html, name), name
        assert f'href="#{name}"' in html


def test_comparison_shows_each_runs_numbers_and_marks_the_best(html: str) -> None:
    ctr, sequential, _ = summaries()
    table = section(html, "runs")
    for run in (ctr, sequential):
        for name in (
            "cl/avg_acc",
            "cl/forgetting_max",
            "cl/bwt",
            "cl/learning_acc",
            "cl/fwt_one",
            "cl/f1_macro",
        ):
            signed = name in {"cl/bwt", "cl/fwt_one"}
            assert number(run["metrics"][name]["value"], sign=signed) in table
    assert 'class="best"' not in table, "a floor and a ceiling are no competitors"
    for role in ("floor", "ceiling"):
        assert f'<span class="role">{role}</span>' in table


def test_the_best_of_several_methods_is_marked_and_floors_and_ceilings_never_are(tmp_path: Path) -> None:
    ctr, sequential, individual = summaries()
    hat = {**ctr, "run": "hat", "method": "hat", "metrics": {**ctr["metrics"], "cl/avg_acc": {"value": 0.1}}}
    individual["metrics"] = {**individual["metrics"], "cl/avg_acc": {"value": 1.0}}
    for name, metric in DEFINITIONS.items():
        for run in (hat, individual):
            run["metrics"].setdefault(name, {"value": None})["formula"] = metric.formula
    table = section(page([ctr, hat, sequential, individual], tmp_path), "runs")
    best = number(ctr["metrics"]["cl/avg_acc"]["value"])
    assert re.search(rf'<td class="best">{re.escape(best)}</td>', table)
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)
    assert not [row for row in rows if "role" in row and "best" in row]


def test_matrix_shows_measured_scores_references_and_change(html: str) -> None:
    ctr, _, individual = summaries()
    rows, a = cells(html), ctr["matrix"]["accuracy"]
    for t in range(6):
        assert [text for _, text in rows[t][: t + 1]] == [number(x) for x in a[t][: t + 1]]
    assert [text for _, text in rows[6][:6]] == [number(task["majority"]) for task in ctr["tasks"]]
    alone = individual["matrix"]["accuracy"]
    assert [text for _, text in rows[7][:6]] == [number(alone[t][t]) for t in range(6)]
    assert rows[8][0][1] == number(a[5][0] - a[0][0], sign=True)


def test_metrics_have_the_words_of_the_table_of_metrics_everywhere(html: str) -> None:
    for name in ("cl/avg_acc", "cl/forgetting_max", "cl/bwt", "cl/fwt_one", "cl/learning_acc", "cl/f1_macro"):
        word = DEFINITIONS[name].word
        assert f"{word}&nbsp;" in section(html, "runs")
        assert f"{word} <code>{name}</code>" in section(html, "metrics")
        assert word in {*console_words(), *RUN_TABLES.values()}
    assert "forward transfer" not in html.lower().replace("forward transfer <code>cl/fwt</code>", "")


def console_words() -> list[str]:
    """Return the headings of the terminal's table of results."""
    return [str(column.header) for column in console.comparison(summaries()).columns]


def test_a_marker_of_a_chart_says_its_number(html: str) -> None:
    accuracy = summaries()[0]["matrix"]["accuracy"]
    found = re.findall(r"<title>([^<]*), after (\d+): ([\d.]+)</title>", section(html, "time"))
    first = [(int(t), score) for name, t, score in found if name == "1 movies"]
    assert first[:6] == [(t + 1, f"{accuracy[t][0]:.4f}") for t in range(6)]


def test_what_sharing_is_worth_has_the_sign_of_the_change(html: str) -> None:
    ctr = summaries()[0]
    bare, own = ctr["plugins"]["accuracy_without_ksm"][1], ctr["matrix"]["accuracy"][1][1]
    assert f"without it: {number(bare - own, sign=True)}" in section(html, "sharing")
    assert "drop" not in section(html, "sharing")
    own = [ctr["matrix"]["accuracy"][t][t] for t in range(1, 6)]
    for key in ("accuracy_without_ksm", "accuracy_without_earlier"):
        mean = sum(without - score for without, score in zip(ctr["plugins"][key][1:], own, strict=True)) / 5
        assert f"<td>{number(mean, sign=True)}</td><td>5</td>" in section(html, "sharing")
    assert "a coin" not in section(html, "sharing")  # not measured


def test_metrics_stand_beside_their_formulas(html: str) -> None:
    for name, metric in summaries()[0]["metrics"].items():
        assert name in section(html, "metrics")
        assert metric["formula"].replace("<", "&lt;") in section(html, "metrics")


def test_overlapping_texts_are_a_warning(html: str) -> None:
    task = summaries()[0]["tasks"][0]
    rows = task["rows"]["dev"] + task["rows"]["test"]
    assert f"<bdi>movies</bdi>: {task['overlap']} of its {rows} dev and test rows" in section(html, "tasks")


def test_page_asks_for_nothing_from_outside(html: str) -> None:
    outside = r"""(?:src|href|action|srcset)\s*=\s*["']?\s*(?:\w+:|//)|url\(|@import|<script|<link|<i?frame"""
    assert not re.search(outside, html, re.IGNORECASE)
    assert "default-src 'none'" in html
    assert set(re.findall(r'href="([^"#][^"]*)"', html)) == {"matrix.png"}


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    runs = summaries()
    for run in runs:
        run["tasks"][1]["id"] = run["tasks"][1]["labels"][0] = HOSTILE
        run["stages"][2]["key"] = run["run"] = run["command"] = run["stages"][0]["kind"] = HOSTILE
        run["references"] = {"individual": HOSTILE, "joint": HOSTILE}
        run["versions"] = {HOSTILE: HOSTILE}
    runs[0]["plugins"]["layers"][0] = HOSTILE
    html = page(runs, tmp_path)
    assert "<script" not in html
    assert html.count("</title>") - html.count("<title>") == 0
    assert "\u202e" not in html
    assert "&lt;script&gt;alert" in html
    assert (tmp_path / "matrix.png").stat().st_size > 10_000


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    _, sequential, _ = summaries()
    html = page([sequential | {"stages": [], "references": {}}], tmp_path)
    for name in ("masks", "transfer", "sharing", "stages"):
        assert not section(html, name)
        assert f'href="#{name}"' not in html
    assert "Compared runs" not in html
    assert "capsule" not in html


def test_ctr_figures_are_left_out_one_by_one(tmp_path: Path) -> None:
    run = summaries()[0]
    run["plugins"] = run["plugins"] | {"mask_use": None, "accuracy_without_ksm": [None] * 6}
    html = page([run], tmp_path)
    assert section(html, "transfer")
    assert not section(html, "masks")
    assert not section(html, "sharing")


def test_pseudo_samples_stand_beside_real_rows(tmp_path: Path) -> None:
    written = {
        "requested": 40,
        "generated": 57,
        "malformed": 15,
        "surplus": 2,
        "duplicate": 2,
        "kept": 38,
        "labels": {HOSTILE: 38},
    }
    shares = {"first_attempt_yield": 0.7, "label_agreement": 0.61, "label_agreement_real": None}
    texts = {"real": ["a real row => good"], "firsts": [f"{HOSTILE} => good  [no_end]"]}
    replay = [{"before": "amazon", "task": "movies", **written, **shares, **texts}]
    html = page([summaries()[0] | {"replay": replay}], tmp_path)
    found = section(html, "replay")
    for text in ("movies", "40", "57", "15", "38", "0.70", "0.61", "a real row", "[no_end]", DASH):
        assert text in found
    assert "<script" not in html
    assert not section(page([summaries()[0]], tmp_path), "replay")


def test_votes_are_shown_as_a_map_of_layers_and_heads(tmp_path: Path) -> None:
    vote = {
        "task": HOSTILE,
        "level": "head",
        "used": 40,
        "skipped": {"no_rationale": 3},
        "voting_tasks": ["movies"],
        "is_decisive": False,
        "chosen": [[1, 0]],
        "votes": [[5, 10], [20, 5]],
        "margin": 0.025,
        "ties": 2,
        "mean_c": [[0.9, 0.8], [0.5, 1.0]],
        "distribution": {"chosen": [[30, 10, 0, 0]], "others": [0, 0, 30, 90]},
        "rationales": "invrat",
        "agreement": {"f1": 0.25, "iou": 0.14},
        "example": {"row": "r1", "words": ["the", HOSTILE, "plot"], "rationale": [1], "looked_at": [1, 2]},
    }
    html = page([summaries()[0] | {"votes": [vote]}], tmp_path)
    found = section(html, "votes")
    for text in (
        "head 1.0",
        "40 rows of movies voted",
        "3 did not (no rationale)",
        "2.5 %",
        "not decisive",
        "frozen",
        "come from InvRat; against those of people: token F1 0.25",
        "<mark>plot",
        "head 1.0: 75.0% with c in [0.00, 0.25]",
        "others: 75.0% with c in [0.75, 1.00]",
    ):
        assert text in found
    assert "<script" not in html
    assert not section(page([summaries()[0]], tmp_path), "votes")


def test_units_that_were_tried_are_shown_with_their_scores(tmp_path: Path) -> None:
    tried = [{"unit": [0, 0], "accuracy": 0.5}, {"unit": [1, 0], "accuracy": 0.8125}]
    vote = {"task": HOSTILE, "level": "block", "chosen": [[1, 0]], "tried": tried}
    found = section(page([summaries()[0] | {"votes": [vote]}], tmp_path), "votes")
    for text in ("block 1", "0.0: 0.5000;", "1.0: 0.8125."):
        assert text in found


def test_a_cell_that_was_not_measured_is_hatched_and_has_no_number(tmp_path: Path) -> None:
    run = summaries()[0]
    run["matrix"]["accuracy"][4][1] = None
    run["tasks"][2]["majority"] = None
    run["metrics"]["cl/bwt"]["value"] = None
    rows = cells(page([run], tmp_path))
    assert rows[4][1] == ("void", "")
    assert rows[4][6] == ("side void", ""), "a mean over what is left would not be the mean"
    assert rows[6][2] == ("void", "")
    assert all(text == "" for t in range(6) for style, text in rows[t][t + 1 : 6] if style == "later")


def test_nothing_measured_shows_dashes_and_no_zero(tmp_path: Path) -> None:
    run = unfinished(summaries()[0], 0)
    html = page([run | {"stages": [], "plugins": {**run["plugins"], "accuracy_without_ksm": None}}], tmp_path)
    for name in ("matrix", "time", "masks", "transfer", "sharing", "stages"):
        assert not section(html, name)
    assert not re.search(r">[^<\d]?0\.0+<", html)
    assert f">{DASH}<" in section(html, "metrics")


def test_an_unfinished_run_says_so_and_covers_what_is_learned(tmp_path: Path) -> None:
    html = page([unfinished(summaries()[0], 3)], tmp_path)
    assert "has not finished: the numbers below are those of the 3 tasks learned so far" in html
    assert all(style == "void" for row in cells(html)[3:6] for style, _ in row[:4])
    short = unfinished(summaries()[0], 3)
    short["matrix"] = {name: rows[:3] for name, rows in short["matrix"].items()}
    short["plugins"] = {
        key: [*value, *[None] * 3] for key, value in short["plugins"].items() if key not in {"layers", "units"}
    }
    short["plugins"] |= {key: summaries()[0]["plugins"][key] for key in ("layers", "units")}
    assert page([short], tmp_path) == html, "rows not reached may be absent or null"


def test_runs_over_other_tasks_are_not_ranked(tmp_path: Path) -> None:
    ctr, sequential, _ = summaries()
    html = page([ctr, unfinished({**sequential, "plugins": {}}, 4)], tmp_path)
    assert '<td class="best"' not in html
    assert "no best is marked" in html


def test_one_task_and_nineteen_tasks_can_be_shown(tmp_path: Path) -> None:
    assert section(page(summaries(["only"], 2), tmp_path), "matrix")
    html = page(summaries(NINETEEN, 12), tmp_path)
    assert section(html, "time").count("<h3 title=") == 19


def test_summaries_of_another_schema_and_an_empty_list_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="schema_version=2: expected 1"):
        write_report([summaries()[0] | {"schema_version": 2}], tmp_path)
    with pytest.raises(DataError, match="no run to report on"):
        write_report([], tmp_path)


@pytest.mark.parametrize("ramp", ["blue", "orange", "green"])
def test_numbers_can_be_read_on_every_shade_of_both_colour_schemes(ramp: str) -> None:
    for dark in (False, True):
        fills = [shade(ramp, k, dark=dark) for k in range(STEPS)]
        assert min(contrast(fill, ink(fill)) for fill in fills) >= 4.5
        against = [contrast(fill, "#ffffff") for fill in fills]
        assert against == sorted(against, reverse=dark), "a higher value is always further from the page"


def test_labels_are_spread_without_leaving_the_chart() -> None:
    assert spread([50, 52, 10], gap=16, low=0, high=60) == [44, 60, 10]
    crowded = spread([5.0] * 9, gap=16, low=0, high=80)
    assert sorted(crowded) == [10.0 * k for k in range(9)]


def test_long_names_keep_both_ends_and_numbers_read_well() -> None:
    assert shorten("Bing5domains_CreativeLabsNomadJukeboxZenXtra40GB", 16) == "Bing5d…nXtra40GB"
    assert shorten("short", 5) == "short"
    assert [number(x, sign=True) for x in (0.0123, -0.0001, -0.5, None)] == [
        "+0.012",
        "0.000",
        "\N{MINUS SIGN}0.500",
        DASH,
    ]
    assert [duration(x) for x in (0.42, 75, 3725, None)] == ["0.4 s", "1 min 15 s", "1 h 02 min", DASH]
    assert score_range([0.712, 0.931]) == (0.7, 0.95)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium or Chrome on this machine")
@pytest.mark.parametrize(("scheme", "ids"), [("light", SIX), ("dark", NINETEEN)], ids=["light", "dark"])
def test_a_browser_draws_the_page_without_errors(tmp_path: Path, scheme: str, ids: list[str]) -> None:
    runs = summaries(ids)
    path = write_report(runs, tmp_path / "report")
    picture = tmp_path / "page.png"
    scheme_flag = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    flags = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", scheme_flag, "--dump-dom"]
    command = [str(CHROMIUM), *flags, f"--screenshot={picture}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert "CONSOLE" not in done.stderr, "the browser reports script, style and blocked-resource errors there"
    digits = 3 if len(ids) <= 8 else 2
    assert number(runs[0]["matrix"]["accuracy"][-1][0], digits) in section(done.stdout, "matrix")
    assert "</footer>" in done.stdout
    pixels = imread(picture)[..., :3]
    assert pixels.shape[:2] == (4000, 1280)
    assert (pixels.mean() > 0.5) == (scheme == "light")
    assert min(pixels[top : top + 1000].std() for top in range(0, 4000, 1000)) > 0.02, "a part of it is blank"
