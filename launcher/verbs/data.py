"""The verbs `data check` and `data show`."""

from collections.abc import Mapping

import typer
from rich.table import Table

from cl_dist.checks import check_data, check_tokens
from cl_dist.data.load import Checked, check_task
from cl_dist.data.rows import SPLITS
from cl_dist.data.sources import listing
from cl_dist.errors import DataError
from cl_dist.run import Run
from launcher import console, runs
from launcher.options import AsJson, Config, Overrides

MOST_LABELS = 20
"""Labels of a task in the table of `data check`."""


def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check every row of every task, and count the labels of each split.

    Prints file, line and field of each fault, and exits with 3 if there is one.
    """
    science = runs.read(config, overrides).science
    checked = {task.id: check_task(task, science.data) for task in science.sequence().tasks}
    if as_json:
        tasks = {
            name: {
                "rows": {split: len(task.data.rows(split)) for split in SPLITS},
                "labels": list(task.data.labels),
                "label_counts": {split: task.label_counts(split) for split in SPLITS},
                "label_shares": {split: task.label_shares(split) for split in SPLITS},
                "faults": [str(fault) for fault in task.faults],
                "warnings": list(task.warnings),
                "counts": task.counts,
            }
            for name, task in checked.items()
        }
        console.document(tasks)
    else:
        console.out.print(_label_table(checked))
        for name, task in checked.items():
            for warning in task.warnings:
                console.out.print(f"task {name}: {warning}", soft_wrap=True)
    faults = [f"task {name}: {listing(task.faults)}" for name, task in checked.items() if task.faults]
    if faults and as_json:
        raise typer.Exit(DataError.exit_code)  # the document names them
    if faults:
        raise DataError("\n".join(faults))


def _label_table(checked: Mapping[str, Checked]) -> Table:
    """Return the rows of each task and split, in all and by label, with the share of each label in its split."""
    table = Table("task", "label")
    for heading in (*SPLITS, "faults"):
        table.add_column(heading, justify="right")
    for name, task in checked.items():
        totals = [str(len(task.data.rows(split))) for split in SPLITS]
        table.add_row(name, "all", *totals, str(len(task.faults)))
        counts = {split: task.label_counts(split) for split in SPLITS}
        shares = {split: task.label_shares(split) for split in SPLITS}
        for label in task.data.labels[:MOST_LABELS]:
            cells = (f"{counts[split][label]}  {shares[split].get(label, 0):4.0%}" for split in SPLITS)
            table.add_row("", label, *cells, "")
        if (more := len(task.data.labels) - MOST_LABELS) > 0:
            table.add_row("", f"and {more} more (--json lists all)", *[""] * len(SPLITS), "")
        table.add_section()
    return table


def show(config: Config, overrides: Overrides = None) -> None:
    """Print the first training row of each task as the model reads it."""
    from cl_dist.data.language import TextCodec, encode_row
    from cl_dist.models.backbone import load_tokenizer

    run = Run(runs.read(config, overrides))
    check_data(run)
    check_tokens(run)
    tokenizer = load_tokenizer(run.config.science.model)
    for number, task in enumerate(run.tasks.tasks):
        data = run.data(number)
        row = data.train[0]
        length = run.config.science.train_of(task).max_length
        console.out.rule(f"{task.id}: row {row.id}")
        if run.output == "lm":
            codec = TextCodec(tokenizer)
            context, asked, answer = encode_row(codec, row, data.question, length)
            prefix = [*context, *asked]
            console.out.print(f"decoder reads  {codec.decode(prefix)}", soft_wrap=True)
            console.out.print(f"and answers    {codec.decode(answer)}", soft_wrap=True)
            console.out.print(f"tokens         {len(prefix)} + {len(answer)} of at most {length - 2}")
            continue
        ids = tokenizer(row.text, row.text_pair, truncation=True, max_length=length)["input_ids"]
        console.out.print(f"encoder reads  {tokenizer.decode(ids)}", soft_wrap=True)
        console.out.print(f"tokens         {len(ids)} of at most {length}: {ids}", soft_wrap=True)
        console.out.print(f"class          {data.labels.index(row.label)} = {row.label} of {list(data.labels)}")
