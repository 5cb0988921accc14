"""The verbs on the models of a run: `predict`, `eval`, `inspect` and `export`."""

import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from cl_dist.data.rows import Row
from cl_dist.data.unlabelled import read_unlabelled
from cl_dist.errors import CheckpointError, DataError
from cl_dist.model_lookup import number_of
from cl_dist.stored_run import load_run
from launcher import console
from launcher.inspect.contents import inspect_path
from launcher.inspect.tables import tables
from launcher.options import AsJson, RunFolder, Task, Verbose
from launcher.scores import score_text


def predict(run: RunFolder, task: Task, verbose: Verbose = False) -> None:
    """Predict with the last trained model: reads JSON lines from stdin, writes JSON lines to stdout.

    Input: {"text": ..., "text_pair": ..., "id": ...}, or the fields of the task's own data.
    Output: {"id": ..., "prediction": ..., "scores": ...}, where scores are the probabilities of the labels. A language
    model gives no scores.
    """
    console.start_logging(verbose)
    opened = load_run(run)
    known = opened.run.tasks.tasks[number_of(opened.run, task)]
    if sys.stdin is None:
        raise DataError("stdin is closed: expected JSON lines on it")
    ids = deque[Any]()
    with console.results_only() as stdout:
        rows = _noting(read_unlabelled(sys.stdin.buffer, known), ids)
        for found in opened.predict_rows(task, rows):
            line = {"id": ids.popleft(), "prediction": found.answer}
            if found.scores is not None:
                line["scores"] = dict(found.scores)
            if not console.write(f"{json.dumps(line)}\n", stdout):
                return  # the reader of stdout has closed it


def _noting(rows: Iterable[tuple[Any, Row]], ids: deque[Any]) -> Iterator[Row]:
    """Yield rows, and append to `ids` the id of each as the input spells it."""
    for given, row in rows:
        ids.append(given)
        yield row


def eval_(
    run: RunFolder,
    task: Annotated[
        list[str] | None, typer.Option(help="Id of a task; repeatable. Default: all trained tasks.")
    ] = None,
    after: Annotated[
        str | None, typer.Option(help="Use the model after this task. Default: the last trained one.")
    ] = None,
    split: Annotated[Literal["dev", "test"], typer.Option(help="The rows to score.")] = "test",
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Score stored models again in this process, on test or dev rows. Writes nothing."""
    console.start_logging(verbose)
    opened = load_run(run)
    last = opened.tasks[opened.last_task(after)]
    with console.results_only():
        scored = opened.evaluate(task, after=last, split=split)
    if as_json:
        console.document({"run": opened.config.run.name, "after": last, "split": split, "tasks": scored})
        return
    table = Table(title=f"{opened.config.run.name}: {split} rows, after task {last}")
    for heading in ("task", "model", "rows", "score", "accuracy", "macro F1", "majority"):
        table.add_column(heading, justify="left" if heading in ("task", "model") else "right")
    for line in scored:
        score = score_text(line["score"], line["interval"], console.out.width)
        numbers = (score, *(score_text(line[name]) for name in ("accuracy", "f1_macro", "majority")))
        table.add_row(str(line["task"]), str(line["model"]), str(line["rows"]), *numbers)
    console.out.print(table)


def export(
    run: RunFolder,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    task: Task,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Write the last trained model as a folder of its own, with a README that shows how to load it.

    `from cl_dist import load_exported` loads a classifier; transformers alone refuses it. A language model loads with
    AutoModelForCausalLM and AutoTokenizer of transformers.
    """
    console.start_logging(verbose)
    opened = load_run(run)
    with console.results_only():
        model = opened.export(task, folder)
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
    if as_json:
        console.document({"folder": str(folder), "task": task, "model": model, "files": files})
        return
    for name, size in files.items():
        console.out.print(f"{size:>15,} bytes  {folder / name}", soft_wrap=True)


def inspect(
    path: Annotated[Path, typer.Argument(help="A run folder, a stage folder or a .safetensors file.")],
    with_tensors: Annotated[bool, typer.Option("--tensors", help="Also list the tensors of a stage or run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show stored files and tensors, and verify them. Exits with 6 if something is damaged."""
    document = inspect_path(path)
    if as_json:
        console.document(document)
    else:
        for part in tables(document, with_tensors):
            console.out.print(part, soft_wrap=isinstance(part, str))
    if document["faults"] and as_json:
        raise typer.Exit(CheckpointError.exit_code)  # the document names them
    if document["faults"]:
        raise CheckpointError("\n".join(document["faults"]))
