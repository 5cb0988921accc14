"""The verbs `list`, `show`, `schema`, `runs` and `env`."""

import dataclasses
import os
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from cl_dist.errors import ConfigError
from cl_dist.methods import descriptions
from cl_dist.metrics import FORMULAS
from cl_dist.run_config import json_schema
from cl_dist.run_list import list_runs
from launcher import console, runs, settings
from launcher.options import AsJson, Config

LISTS: dict[str, Callable[[], Mapping[str, str]]] = {
    "methods": descriptions,
    "recipes": lambda: {name: _first_comment(path) for name, path in runs.recipes().items()},
    "metrics": lambda: FORMULAS,
}
PACKAGES = ("cl-dist", "torch", "deepspeed", "accelerate", "transformers", "datasets", "ray", "peft", "safetensors")


def list_(
    what: Annotated[str, typer.Argument(help="methods, recipes or metrics", autocompletion=lambda: list(LISTS))],
    as_json: AsJson = False,
) -> None:
    """List the methods, recipes or metrics."""
    if what not in LISTS:
        raise ConfigError(f"list {what}: expected one of {', '.join(LISTS)}")
    entries = LISTS[what]()
    if as_json:
        console.document(entries)
        return
    for name, about in entries.items():
        console.out.print(f"{name:24} {about}", soft_wrap=True)


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf8").splitlines()[0].removeprefix("#").strip()


def show(config: Config) -> None:
    """Print a recipe or run file with its comments."""
    path = runs.run_file(config)
    try:
        text = path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    console.write(text if text.endswith("\n") else f"{text}\n")


def schema(
    part: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="KEY",
            help="Print a table of one section or setting: science.train, science.method.ctr, cluster.zero_stage.",
        ),
    ] = None,
) -> None:
    """Print the JSON Schema of run files: every setting with its type, default and description."""
    if part is None:
        console.document(json_schema())
        return
    for key, found in settings.sections(part):
        table = Table("setting", "default", "value", "meaning", title=key, title_justify="left")
        for each in found:
            table.add_row(each.name, each.default, each.value, each.meaning)
        console.out.print(table)


def runs_(
    folder: Annotated[Path, typer.Argument(help="A folder of run folders.")] = Path("runs"), as_json: AsJson = False
) -> None:
    """List the runs below a folder: method, finished tasks, average score, status and age; the latest first."""
    found = list_runs(folder)
    if as_json:
        console.document([dataclasses.asdict(line) for line in found])
        return
    table = Table()
    for heading in ("run", "method", "tasks", "score", "status", "age"):
        table.add_column(heading, overflow="fold")
    for line in found:
        _, is_baseline, name = line.run.rpartition("/baselines/")
        tasks = "-" if line.tasks is None else f"{line.tasks_done}/{line.tasks}"
        score = "-" if line.score is None else f"{line.score:.4f}"
        status = line.status if line.fault is None else f"{line.status}: {line.fault}"
        table.add_row(
            f"  {name}" if is_baseline else line.run, line.method or "-", tasks, score, status, _age(line.age_s)
        )
    console.out.print(table)


def _age(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def env(as_json: AsJson = False) -> None:
    """Print the versions and the machine, for a bug report."""
    facts = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count())}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if as_json:
        console.document(facts)
        return
    for name, value in facts.items():
        console.out.print(f"{name:14} {value}")
