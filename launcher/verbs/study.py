"""The verb `study`: arms x orders x seeds as runs of one folder, and their comparison."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cl_dist.stopping import stop_on_signals
from cl_dist.study.driver import OpenStudy, run_study
from cl_dist.study.file import METRICS, Study, read_study
from cl_dist.study.results import NAMES, points
from launcher import console, runs
from launcher.options import AsJson, Verbose
from launcher.scores import score_text
from launcher.watch import Watch


def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A study file, or the folder of a study to continue.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Settings that replace those of the file: seeds=5; with base. in front those of the base."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="List runs, shared stages and hours; start nothing.")] = False,
    parallel: Annotated[int, typer.Option(metavar="N", help="Runs at a time, each with its own processes.")] = 1,
    compute: Annotated[
        bool, typer.Option("--compute/--no-compute", help="Compute missing runs, or report on the finished ones alone.")
    ] = True,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Compare methods over orders and seeds: run every arm, and report paired differences with intervals.

    Finished stages are not computed again, and equal stages of different runs are computed once: the same command
    continues a study that was stopped or killed.
    """
    console.start_logging(verbose)
    given = overrides or []
    found = read_study(
        file,
        [text for text in given if not text.startswith("base.")],
        runs.run_file,
        [text.removeprefix("base.") for text in given if text.startswith("base.")],
    )
    if plan:
        _show_plan(found, as_json)
        return
    from launcher.report.study import write_page

    stop_on_signals()
    document = run_study(
        found,
        parallel=parallel,
        compute=compute,
        watch=lambda: Watch(command=f"cl-dist study {shlex.quote(str(found.folder))}"),
        note=lambda line: console.err.print(line, soft_wrap=True),
        report=write_page,
        command=shlex.join(["cl-dist", *sys.argv[1:]]),
    )
    page = found.folder / "report" / "index.html"
    if as_json:
        console.document({"report": str(page), **document})
        return
    for part in tables(document):
        console.out.print(part, soft_wrap=isinstance(part, str))
    console.out.print(f"report: {page}", soft_wrap=True)


def _show_plan(found: Study, as_json: bool) -> None:
    opened = OpenStudy(found)
    opened.check()
    lines, stages = opened.plan(), opened.num_stages()
    hours = [line.hours for line in lines]
    total = None if any(each is None for each in hours) else sum(each or 0.0 for each in hours)
    if as_json:
        runs_ = [
            {"run": each.name, "arm": each.arm, "pair": each.pair.name, "finished": not opened.missing(each.name)}
            for each in found.runs
        ]
        arms = [dataclasses.asdict(line) for line in lines]
        console.document(
            {"study": found.file.name, "folder": str(found.folder), "stages": stages, "hours": total}
            | {"arms": arms, "runs": runs_}
        )
        return
    table = Table(title=f"plan of study {found.file.name}")
    for heading in ("arm", "runs", "finished", "stages", "done", "shared, to link", "hours to compute"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for line in lines:
        counts = (line.runs, line.finished, line.stages, line.done, line.shared)
        table.add_row(line.arm, *map(str, counts), _hours(line.hours))
    console.out.print(table)
    for pair in found.pairs:
        names = ", ".join(each.name for each in found.runs if each.pair == pair)
        console.out.print(f"order {pair.order_number}, seed {pair.seed}: {' > '.join(pair.order)}", soft_wrap=True)
        console.out.print(f"  {names}", soft_wrap=True)
    console.out.print(
        f"{len(found.runs)} runs with {stages['of_runs']} stages, {stages['distinct']} of them distinct; "
        f"{_hours(total)} hours to compute with one run at a time",
        soft_wrap=True,
    )
    if total is None:
        console.out.print(
            "Hours are unknown for an arm with an unfinished stage whose like it has not finished yet: they come from "
            "the seconds of finished stages.",
            soft_wrap=True,
        )


def _hours(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"


def tables(document: dict[str, Any]) -> list[Table | str]:
    """Return the results of a study for a terminal."""
    shown = [name for name in METRICS if any(arm["metrics"].get(name) for arm in document["arms"])]
    arms = Table(title=f"study {document['study']}: means over pairs and tasks, with 95 % intervals")
    arms.add_column("arm")
    for heading in ("runs", *(NAMES[name] for name in shown), "seconds a run"):
        arms.add_column(heading, justify="right")
    for arm in document["arms"]:
        cells = [interval(arm["metrics"][name]) for name in shown]
        seconds = "-" if arm["seconds"] is None else f"{arm['seconds']:.0f}"
        arms.add_row(f"{arm['arm']} ({arm['method']})", f"{arm['finished']}/{arm['runs']}", *cells, seconds)
    pairs = Table(title="paired differences in points")
    pairs.add_column("comparison")
    pairs.add_column("metric")
    for heading in ("pairs", "difference", "95 % interval", "p", "sign test", "McNemar", "detectable", "verdict"):
        pairs.add_column(heading, justify="right")
    for line in document["comparisons"]:
        name = f"{line['name']}{' (primary)' if line['primary'] else ''}"
        if not line["pairs"]:
            pairs.add_row(name, NAMES[line["metric"]], "0", *["-"] * 6, line["verdict"])
            continue
        p = line["p"] if line.get("p_holm") is None else line["p_holm"]
        low, high = line["low"], line["high"]
        pairs.add_row(
            name,
            NAMES[line["metric"]],
            f"{line['pairs']}/{line['planned_pairs']}",
            points(line["value"]),
            "-" if low is None else f"{points(low)} to {points(high)}",
            _p(p),
            f"{line['sign']['wins']}:{line['sign']['losses']} {_p(line['sign']['p'])}",
            "-" if line["mcnemar"] is None else _p(line["mcnemar"]["p"]),
            "-" if line["detectable"] is None else points(line["detectable"], sign=False),
            line["verdict"],
        )
    parts: list[Table | str] = [arms, pairs]
    parts += [line["sentence"] for line in document["comparisons"]]
    if len(document["comparisons"]) > 2:
        parts.append("p-values of comparisons other than the primary one are corrected for their number (Holm).")
    if document["missing"]:
        parts.append(f"{document['missing']} of {len(document['runs'])} runs are missing so far.")
    for change in document["registered"]["changes"]:
        runs_ = "run" if change["after_runs"] == 1 else "runs"
        parts.append(f"The primary comparison or its margin was changed after {change['after_runs']} {runs_}.")
    return parts


def interval(metric: dict[str, Any] | None) -> str:
    """Return a mean with its interval."""
    if metric is None:
        return "-"
    return score_text(metric["value"], None if metric["low"] is None else (metric["low"], metric["high"]))


def _p(value: float | None) -> str:
    return "-" if value is None else "<.0001" if value < 0.0001 else f"{value:.4f}".removeprefix("0")
