"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

Config = Annotated[str, typer.Argument(help="a run file, or the name of a recipe")]
Overrides = Annotated[list[str] | None, typer.Argument(help="settings over the file's: science.train.epochs=3")]
RunFolder = Annotated[Path, typer.Argument(help="a run folder")]
RunOrLast = Annotated[Path | None, typer.Argument(help="a run folder; the one worked on last if left out")]
Task = Annotated[str, typer.Option(help="id of the task")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="job server of a Ray head, http://HOST:8265; RAY_ADDRESS, or one on this machine"),
]
JobId = Annotated[str, typer.Argument(help="id of a job, as `submit` prints it")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="the log on stderr, tracebacks with errors")]
Baselines = Annotated[bool, typer.Option(help="also run the baselines that the run file names")]
FailIf = Annotated[
    list[str] | None,
    typer.Option(metavar="METRIC>NUMBER", help="exit 8 if this holds of the run, or cannot be told; also >= < <="),
]
AddTasks = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="append the tasks of a YAML file (tasks: [...]), also to a finished run"),
]
