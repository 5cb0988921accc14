"""The verb `init`: write a run file for data of one's own."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.table import Table

from cl_dist.data.sniff import Asked, Guess, find_files, guess
from cl_dist.data.sources import listing
from cl_dist.errors import ConfigError, DataError
from cl_dist.ledger import write_text
from cl_dist.storage import written
from launcher import console, starter
from launcher.options import AsJson


def init(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Files (csv, tsv, jsonl, parquet; also .gz) or folders; one of train, dev, test is a task."
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="The run file to write.")] = Path("run.yaml"),
    name: Annotated[str | None, typer.Option(help="Name of the run. Default: that of the file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    method: Annotated[
        str, typer.Option(help="Method: see `cl-dist list methods`. [default: ctr, or lamol with --output lm]")
    ] = "",
    model: Annotated[
        str | None,
        typer.Option(help="Backbone: a folder, package:NAME/path or a name on the hub. Default: an installed one."),
    ] = None,
    output: Annotated[
        Literal["classifier", "lm"] | None,
        typer.Option(help="classifier predicts labels; lm is a decoder that answers in text."),
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the text, in every file.")] = None,
    label: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of the label or answer.")] = None,
    id_: Annotated[str | None, typer.Option("--id", metavar="COLUMN", help="Column of the row id.")] = None,
    split: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column with the name of the split.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a run file for your data: guess columns of text, label, id and split, and settings that train at once."""
    if out.exists() and not force:
        raise ConfigError(f"--out {str(out)!r}: this file exists; choose another one, or replace it with --force")
    chosen = method or ("lamol" if output == "lm" else "ctr")
    given = starter.check_method(chosen, output)
    run = starter.run_name(out, name)
    source, why = starter.backbone(model, given)
    asked = Asked(text, label, id_, split)
    guesses = [guess(files, asked, free_text=given == "lm") for files in find_files(data)]
    tasks, rows = zip(*(starter.checked(each) for each in guesses), strict=True)
    sizes = [max(1, len(each.data.train)) for each in rows]
    tree = starter.settings(run, tasks, guesses, sizes, method=chosen, model=source, output=given)
    page = starter.text(tree, guesses, rows, why)
    with written(out.parent):
        write_text(out, page)
    faults = [f"task {each.data.id}:\n{listing(each.faults, 5)}" for each in rows if each.faults]
    warnings = [f"task {each.data.id}: {line}" for each in rows for line in each.warnings]
    if as_json:
        columns = {
            each.task["id"]: [
                {"column": c.name, "values": c.shown, "use": c.use or None, "why": c.why} for c in each.columns
            ]
            for each in guesses
        }
        console.document({"file": str(out), "run": tree, "columns": columns, "warnings": warnings, "faults": faults})
    else:
        for each in guesses:
            console.out.print(_table(each))
        for line in warnings:
            console.out.print(f"warning: {line}", soft_wrap=True)
        console.out.print(f"wrote {out}: {chosen} on {len(guesses)} task(s), backbone {source} ({why})", soft_wrap=True)
        for step in _next(out, tree["run"]["name"], [task["id"] for task in tasks]):
            console.out.print(step, soft_wrap=True)
    if faults and as_json:
        raise typer.Exit(DataError.exit_code)  # the document names them
    if faults:
        raise DataError("fix these rows before training (cl-dist data check lists all):\n" + "\n".join(faults))


def _table(found: Guess) -> Table:
    source = found.task["source"]
    files = source.get("path") or ", ".join(source["paths"].values())
    more = " or more" if found.more else ""
    table = Table(
        "column",
        "values",
        "used as",
        "why",
        title=f"{found.task['id']}: {files}, {found.rows}{more} rows",
        title_justify="left",
    )
    for column in found.columns:
        table.add_row(column.name, column.shown, column.use or "-", column.why)
    return table


def _next(out: Path, run: str, tasks: list[str]) -> list[str]:
    """Return the commands that follow, with what each does."""
    file, folder = shlex.quote(str(out)), f"runs/{run}"
    steps = [
        (f"cl-dist data check {file}", "every row, by file and line"),
        (f"cl-dist train {file} --local", "in this process; without --local on a Ray cluster"),
        (f"cl-dist report {folder}", "the page again"),
        (f"cl-dist export {folder} exported --task {tasks[-1]}", "the model in a folder of its own"),
    ]
    width = max(len(command) for command, _ in steps)
    return ["next:", *(f"  {command:{width}}  # {what}" for command, what in steps)]
