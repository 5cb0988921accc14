"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

from launcher import runs


def _recipes(incomplete: str) -> list[str]:
    """Return the recipes for shell completion; the shell adds files."""
    return [name for name in runs.recipes() if name.startswith(incomplete)]


Config = Annotated[str, typer.Argument(help="A run file, or the name of a recipe.", autocompletion=_recipes)]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings that replace those of the file: science.train.epochs=3")
]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]
RunOrLast = Annotated[Path | None, typer.Argument(help="A run folder; by default the last one used below runs/.")]
Task = Annotated[str, typer.Option(help="Id of the task.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
Address = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Job server of a Ray head: http://HOST:8265. Default: RAY_ADDRESS, or the cluster on this machine.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="ID", help="Id of a job, as `job submit` and `job list` print it.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="Print the log to stderr, and tracebacks of errors.")]
Baselines = Annotated[bool, typer.Option(help="Also run the baselines that the run file names.")]
BaselinesOrLast = Annotated[
    bool | None,
    typer.Option(
        "--baselines/--no-baselines", help="Also run the baselines. Default: as in the last `train` or `resume`."
    ),
]
Local = Annotated[
    bool, typer.Option("--local", help="Run in this process with one worker and plain torch, without Ray.")
]
Smoke = Annotated[
    bool,
    typer.Option("--smoke", help="Test run under the name NAME-smoke: at most 30 rows of each split, one epoch."),
]
FailIf = Annotated[
    list[str] | None,
    typer.Option(
        metavar="METRIC>NUMBER",
        help="Exit with 8 if the condition is true, or if the metric was not measured. Operators: > >= < <=",
    ),
]
AddTasks = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Append the tasks of a YAML file (tasks: [...]); also to a finished run."),
]
