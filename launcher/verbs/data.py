"""The verbs `data check` and `data show`."""

import typer
from rich.table import Table

from cl_dist.checks import check_data, check_tokens
from cl_dist.data.load import check_task
from cl_dist.data.rows import SPLITS
from cl_dist.data.sources import listing
from cl_dist.errors import DataError
from cl_dist.run import Run
from launcher import console, runs
from launcher.options import AsJson, Config, Overrides


def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check every row of every task. Prints file, line and field of each fault, and exits with 3 if there is one."""
    science = runs.read(config, overrides).science
    checked = {task.id: check_task(task, science.data) for task in science.sequence().tasks}
    if as_json:
        tasks = {
            name: {
                "rows": {split: len(task.data.rows(split)) for split in SPLITS},
                "labels": list(task.data.labels),
                "faults": [str(fault) for fault in task.faults],
                "warnings": list(task.warnings),
                "counts": task.counts,
            }
            for name, task in checked.items()
        }
        console.document(tasks)
    else:
        table = Table("task", *SPLITS, "labels", "faults", "warnings")
        for name, task in checked.items():
            counts = [str(len(task.data.rows(split))) for split in SPLITS]
            labels = ", ".join(f"{k} {n}" for k, n in task.label_counts("train").items())
            table.add_row(name, *counts, labels, str(len(task.faults)), "\n".join(task.warnings))
        console.out.print(table)
    faults = [f"task {name}: {listing(task.faults)}" for name, task in checked.items() if task.faults]
    if faults and as_json:
        raise typer.Exit(DataError.exit_code)  # the document names them
    if faults:
        raise DataError("\n".join(faults))


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
