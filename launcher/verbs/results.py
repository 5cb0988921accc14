"""Verbs on what a run has stored: score a model again, ask it, look into its files, take it elsewhere."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from cl_dist.errors import CheckpointError, ConfigError, DataError
from launcher import console, runs
from launcher.inspect.contents import inspect_path
from launcher.inspect.tables import tables
from launcher.model_lookup import answering, last_learned, number_of
from launcher.options import AsJson, RunFolder, Task, Verbose

if TYPE_CHECKING:
    from cl_dist.run import Run


def eval_(
    run: RunFolder,
    task: Annotated[list[str] | None, typer.Option(help="id of a task, repeatable; all learned ones if not")] = None,
    after: Annotated[str | None, typer.Option(help="with the model after this task; the last one if left out")] = None,
    split: Annotated[Literal["dev", "test"], typer.Option(help="rows to score")] = "test",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score tasks of a run again, in this process; nothing is written."""
    from cl_dist.metrics import majority_accuracy

    console.start_logging(verbose)
    opened = _open(run)
    last = last_learned(opened) if after is None else number_of(opened, after, "--after")
    tasks = [number_of(opened, name) for name in dict.fromkeys(task)] if task else list(range(last + 1))
    for number in tasks:
        if not opened.data(number).rows(split):
            raise ConfigError(f"--split {split}: task {opened.data(number).id} has no {split} rows")
    models = answering(opened, tasks, last)
    from cl_dist.stages.evaluate import score_answers
    from cl_dist.stages.predict import Predictor

    lines = {}
    if split == "test":
        opened.check_rows(*(stage for stage, _ in models))
    for stage, own in models:
        with console.results_only():
            predictor = Predictor(opened.job(stage))
            answers = {number: predictor.answers(number, opened.data(number).rows(split)) for number in own}
        for number in own:
            data, rows = opened.data(number), opened.data(number).rows(split)
            lines[number] = {
                "task": data.id,
                "model": opened.ledger.key(stage.model),
                "rows": len(rows),
                **score_answers(opened.tasks.tasks[number], data.labels, rows, answers[number]),
                "majority": majority_accuracy([row.label for row in data.train], [row.label for row in rows]),
            }
    scored = [lines[number] for number in tasks]
    after = opened.tasks.tasks[last].id
    if as_json:
        document = {"run": opened.config.run.name, "after": after, "split": split, "tasks": scored}
        console.document(document)
        return
    table = Table(title=f"{opened.config.run.name}: {split} rows, after task {after}")
    for heading in ("task", "model", "rows", "score", "accuracy", "macro F1", "majority"):
        table.add_column(heading, justify="left" if heading in ("task", "model") else "right")
    for line in scored:
        values = (line[name] for name in ("score", "accuracy", "f1_macro", "majority"))
        numbers = ("-" if value is None else f"{value:.4f}" for value in values)
        table.add_row(str(line["task"]), str(line["model"]), str(line["rows"]), *numbers)
    console.out.print(table)


def predict(run: RunFolder, task: Task, verbose: Verbose = False) -> None:
    """Answer JSON lines from stdin with JSON lines on stdout, by the model after the last learned task.

    A line is {"text": ..., "text_pair": ..., "id": ...}, or has the fields of the task's own data. The answer is
    {"id": ..., "prediction": ..., "scores": {label: probability}}; a method that writes its answers gives no scores.
    """
    from cl_dist.data.unlabelled import read_unlabelled

    console.start_logging(verbose)
    opened = _open(run)
    number = number_of(opened, task)
    ((stage, _),) = answering(opened, [number], last_learned(opened))
    if sys.stdin is None:
        raise DataError("stdin is closed: expected JSON lines on it")
    rows = read_unlabelled(sys.stdin.buffer, opened.tasks.tasks[number])
    from cl_dist.stages.predict import Predictor

    with console.results_only() as stdout:
        predictor = Predictor(opened.job(stage))
        # As many rows at a time as a shard has: a task's own rows meet in the batches of its Evaluate stage.
        while shard := list(islice(rows, opened.config.science.evaluate.shard_rows)):
            chosen = [row for _, row in shard]
            predictor.refuse_unreadable(number, chosen)
            found: list[dict[str, object]]
            if predictor.writes:
                found = [{"prediction": text} for text in predictor.answers(number, chosen)]
            else:
                shares = predictor.probabilities(number, chosen)
                found = [{"prediction": max(own, key=own.__getitem__), "scores": own} for own in shares]
            lines = [{"id": given} | answer for (given, _), answer in zip(shard, found, strict=True)]
            if not console.write("".join(f"{json.dumps(line)}\n" for line in lines), stdout):
                return  # nobody reads any more


def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="a folder that does not exist, or is empty")],
    task: Task,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write the model after the last learned task as a folder; its README.md has the lines that load it.

    A classifier is loaded by cl_dist.stages.export.load_exported; plain transformers refuses it.
    A model that writes its answers is loaded by AutoModelForCausalLM and AutoTokenizer.
    """
    console.start_logging(verbose)
    opened = _open(run)
    number = number_of(opened, task)
    ((stage, _),) = answering(opened, [number], last_learned(opened))
    from cl_dist.stages.export import check_free
    from cl_dist.stages.export import export as write

    check_free(folder)
    with console.results_only():
        write(opened.job(stage), number, folder, opened.ledger.fingerprint(opened.stage(stage.model)))
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    if as_json:
        model = opened.ledger.key(stage.model)
        console.document({"folder": str(folder), "task": task, "model": model, "files": files})
        return
    for name, size in files.items():
        console.out.print(f"{size:>15,} bytes  {folder / name}", soft_wrap=True)


def inspect(
    path: Annotated[Path, typer.Argument(help="a run folder, a stage folder or a .safetensors file")],
    as_json: AsJson = False,
) -> None:
    """Show what is stored and whether it is whole; exit 6 if something is damaged."""
    document = inspect_path(path)
    if as_json:
        console.document(document)
    else:
        for part in tables(document):
            console.out.print(part, soft_wrap=isinstance(part, str))
    if document["faults"] and as_json:
        raise typer.Exit(CheckpointError.exit_code)  # the document names them
    if document["faults"]:
        raise CheckpointError("\n".join(document["faults"]))


def _open(run: Path) -> "Run":
    from cl_dist.run import Run

    return Run(runs.reopen(run, []))
