"""The command line: `cl-dist VERB [ARGUMENTS] [dotted.key=value ...] [--json]`. VERBS lists every verb.

A new verb is a function in a module of `launcher/verbs` and a line of VERBS.
Results go to stdout, everything else to stderr. With --json, stdout is one JSON document, also for an error. If a
reader closes its end of stdout, the output ends; the command continues and keeps its exit code.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import cl_dist
from launcher import console
from launcher.verbs import check, data, init, job, plan, reference, render, report, results, study, train

EXIT_CODES = {
    0: "ok",
    1: "internal error",
    2: "wrong usage or settings",
    3: "faulty data",
    4: "cluster cannot run it",
    5: "training failed after retries",
    6: "stored results are missing, damaged, made with other settings, or cannot be written",
    7: "job or job server not reachable",
    8: "a --fail-if condition is true",
    75: "stopped early; can be resumed",
    console.INTERRUPTED: "interrupted",
}
START, RUN, LOOK, USE, CLUSTER, HELP = "Start", "Run", "Look", "Use", "Cluster", "Environment"
GROUPS = {
    "data": ("Check a run's data, or show it as the model reads it.", START),
    "render": ("Write manifests for KubeRay or Slurm.", CLUSTER),
    "job": ("Submit, watch, stop and resume runs as jobs of a Ray cluster.", CLUSTER),
}
"""Help and panel of the groups of verbs."""


@dataclass(frozen=True, slots=True)
class Verb:
    """A line of the command line's help."""

    name: str
    run: Callable[..., None]
    panel: str
    example: str


VERBS = (
    Verb("init", init.init, START, "cl-dist init data/laptop.csv data/restaurant.csv --out run.yaml"),
    Verb("list", reference.list_, START, "cl-dist list recipes"),
    Verb("show", reference.show, START, "cl-dist show ctr-demo > run.yaml"),
    Verb("schema", reference.schema, START, "cl-dist schema --for science.method.ctr"),
    Verb("data check", data.check, START, "cl-dist data check run.yaml"),
    Verb("data show", data.show, START, "cl-dist data show run.yaml"),
    Verb("check", check.check, START, "cl-dist check run.yaml cluster.workers=2"),
    Verb("plan", plan.plan, START, "cl-dist plan run.yaml --device-gib 24"),
    Verb("train", train.train, RUN, "cl-dist train run.yaml --local science.seed=1 run.name=seed1"),
    Verb("resume", train.resume, RUN, "cl-dist resume runs/seed1 cluster.workers=4"),
    Verb("study", study.study, RUN, "cl-dist study study.yaml --parallel 2"),
    Verb("status", train.status, LOOK, "cl-dist status runs/seed1"),
    Verb("runs", reference.runs_, LOOK, "cl-dist runs runs"),
    Verb("report", report.report, LOOK, "cl-dist report runs/seed1 runs/seed2"),
    Verb("eval", results.eval_, LOOK, "cl-dist eval runs/seed1 --split dev"),
    Verb("inspect", results.inspect, LOOK, "cl-dist inspect runs/seed1"),
    Verb("predict", results.predict, USE, "cl-dist predict runs/seed1 --task movies < texts.jsonl"),
    Verb("export", results.export, USE, "cl-dist export runs/seed1 exported --task movies"),
    Verb("render kuberay", render.kuberay, CLUSTER, "cl-dist render kuberay run.yaml --out manifests"),
    Verb("render slurm", render.slurm, CLUSTER, "cl-dist render slurm run.yaml > run.sbatch"),
    Verb("job submit", job.submit, CLUSTER, "cl-dist job submit run.yaml --address http://HOST:8265"),
    Verb("job list", job.list_, CLUSTER, "cl-dist job list --address http://HOST:8265"),
    Verb("job status", job.status, CLUSTER, "cl-dist job status ID --address http://HOST:8265"),
    Verb("job logs", job.logs, CLUSTER, "cl-dist job logs -f ID --address http://HOST:8265"),
    Verb("job stop", job.stop, CLUSTER, "cl-dist job stop ID --address http://HOST:8265"),
    Verb("job resume", job.resume, CLUSTER, "cl-dist job resume ID cluster.workers=4 --address http://HOST:8265"),
    Verb("env", reference.env, HELP, "cl-dist env"),
)
"""All verbs in order of use."""


class _InOrder(TyperGroup):
    """Lists verbs and groups in the order of VERBS; typer lists groups last."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        order = list(dict.fromkeys(verb.name.split()[0] for verb in VERBS))
        self.commands = dict(sorted(self.commands.items(), key=lambda item: order.index(item[0])))


def _print_version(is_asked: bool) -> None:
    if is_asked:
        console.out.print(f"cl-dist {cl_dist.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Continual learning of transformer language models, on one machine or a cluster."""


def _app() -> typer.Typer:
    """Return the command line that VERBS describes."""
    codes = "; ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    app = typer.Typer(cls=_InOrder, no_args_is_help=True, epilog=f"Exit codes: {codes}.")
    app.callback()(_root)
    groups = {name: typer.Typer(no_args_is_help=True) for name in GROUPS}
    for name, (about, panel) in GROUPS.items():
        app.add_typer(groups[name], name=name, help=about, rich_help_panel=panel)
    for verb in VERBS:
        group, _, name = verb.name.rpartition(" ")
        command = (groups[group] if group else app).command(
            name, rich_help_panel=None if group else verb.panel, epilog=f"Example: {verb.example}"
        )
        command(verb.run)
    return app


app = _app()


def main() -> None:
    """Run the command line and turn errors into messages and exit codes."""
    as_json, verbose = "--json" in sys.argv, "-v" in sys.argv or "--verbose" in sys.argv
    console.prepare_streams()
    try:
        sys.exit(app(standalone_mode=False))  # it returns the code of a typer.Exit, else what the verb returns: None
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # the reader of --help has closed its end
            sys.exit(0)
        raise
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(console.show_error(error, verbose, as_json))
