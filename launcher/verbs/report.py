"""The verb `report`, and the end of every verb that runs: write the page, print the numbers, check the gates."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from cl_dist.errors import ClDistError, ConfigError, QualityError, StorageError
from cl_dist.storage import written
from cl_dist.stored_run import StoredRun, load_run
from launcher import console
from launcher.options import AsJson, FailIf
from launcher.report.index import write_index
from launcher.report.page import write_report
from launcher.report.stored import Details
from launcher.verbs.quality import FailIf as Gate
from launcher.verbs.quality import parse_gates


def report(
    run: Annotated[list[Path] | None, typer.Argument(help="Run folders; the first is the main run.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the page. Default: report/ of the run folder, or report/compared/ for several runs.",
        ),
    ] = None,
    index: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write DIR/index.html, a sortable table of all runs below DIR."),
    ] = None,
    reference: Annotated[
        list[str] | None,
        typer.Option(metavar="KIND=RUN", help="A run to compare with: individual=RUN or joint=RUN; repeatable."),
    ] = None,
    fail_if: FailIf = None,
    as_json: AsJson = False,
) -> None:
    """Write an HTML page with the accuracy matrix, the metrics and what the method learned; compare several runs."""
    if index is not None:
        if run or out is not None or reference or fail_if:
            raise ConfigError("--index DIR: expected no run, --out, --reference or --fail-if with it")
        _index(index, as_json=as_json)
        return
    if not run:
        raise ConfigError("report: expected a run folder, or --index DIR")
    gates, references = parse_gates(fail_if or []), dict[str, Path]()
    for text in reference or []:
        kind, equals, folder = text.partition("=")
        if kind not in ("individual", "joint") or not equals:
            raise ConfigError(f"--reference {text!r}: expected individual=RUN or joint=RUN")
        references[kind] = Path(folder)
    main, *others = [load_run(run[0], references=references), *(load_run(other) for other in run[1:])]
    conclude(main, others, gates=gates, as_json=as_json, out=out)


def _index(folder: Path, *, as_json: bool) -> None:
    if not folder.is_dir():
        raise ConfigError(f"--index {str(folder)!r}: expected a folder with run folders below it")
    with written(folder):
        page, runs = write_index(folder)
    if as_json:
        console.document({"index": str(page), "runs": runs})
    else:
        console.out.print(f"index of {len(runs)} runs: {page}", soft_wrap=True)


def conclude(
    stored: StoredRun,
    others: Sequence[StoredRun] = (),
    *,
    gates: Sequence[Gate],
    as_json: bool,
    out: Path | None = None,
) -> None:
    """Write summaries and the page of a run, print the numbers, then check the main run against the gates.

    A comparison of several runs is a page of its own next to that of the main run, unless `out` names a folder. The
    numbers are printed even if the page cannot be written.
    """
    runs = (stored, *others)
    summaries = list(({folder: found for each in runs for folder, found in each.summaries().items()}).values())
    details = list({each.config.folder: Details(each) for one in runs for each in (one.run, *one.baselines)}.values())
    folder = out or stored.folder / ("report/compared" if others else "report")
    errors: list[ClDistError] = []
    page: Path | None = None
    try:
        for each in runs:
            each.write_summaries()
        with written(folder if out else stored.folder):
            page = write_report(summaries, folder, details)
    except StorageError as error:
        errors.append(error)
    broken = [reason for gate in gates if (reason := gate.reason(summaries[0]["metrics"])) is not None]
    if broken:
        errors.append(QualityError("\n".join(broken)))
    if as_json:
        document: dict[str, Any] = {"report": page and str(page), "runs": summaries, "broken": broken}
        console.document(document | ({"unwritten": str(errors[0])} if page is None else {}))
    else:
        console.out.print(console.comparison(summaries))
        if page is not None:
            console.out.print(f"report: {page}", soft_wrap=True)
    if errors and as_json:
        raise typer.Exit(errors[0].exit_code)  # the document names them
    for other in errors[1:]:
        console.show_error(other, verbose=False, as_json=False)
    if errors:
        raise errors[0]
