"""The command line: `cl-dist VERB [CONFIG] [dotted.key=value ...] [--json] [-v]`, one function per verb.

Results go to stdout, everything else to stderr. With --json, stdout is one JSON document, also for an error. A reader
that closes its end of stdout ends the output and not the command, whose exit code stays what it is.
What is done with a finished run's model is in `verbs`, with jobs in `job_verbs`.
"""

import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cl_dist.checks import check_data, check_tokens
from cl_dist.errors import ClDistError, ConfigError, QualityError, StorageError
from cl_dist.stopping import stop_on_signals
from launcher import console, runs
from launcher.cluster import preflight, render
from launcher.options import Address, AddTasks, AsJson, Baselines, Config, FailIf, Overrides, RunOrLast, Verbose
from launcher.verbs import job as job_verbs
from launcher.verbs import plan as planning
from launcher.verbs import results as verbs
from launcher.verbs.quality import FailIf as Gate
from launcher.verbs.quality import parse_gates

EXIT_CODES = {
    0: "ok",
    1: "internal",
    2: "usage or settings",
    3: "data",
    4: "cluster",
    5: "training failed after retries",
    6: "stored results missing, damaged, made with other settings or not writable",
    7: "job or job server not reachable",
    8: "a quality gate is broken",
    75: "stopped early but resumable",
    console.INTERRUPTED: "interrupted",
}
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Continual learning of transformers, distributed.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
)
data_app = typer.Typer(no_args_is_help=True, help="Look at the data of a run file.")
app.add_typer(data_app, name="data")
app.add_typer(render.app, name="render")

app.command("eval")(verbs.eval_)
JOBS = (job_verbs.submit, job_verbs.jobs, job_verbs.logs, job_verbs.stop)
for verb in (planning.plan, preflight.check, verbs.predict, verbs.inspect, verbs.export, *JOBS):
    app.command()(verb)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    baselines: Baselines = True,
    fail_if: FailIf = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Run a task sequence; what the run folder already holds is not computed again."""
    console.start_logging(verbose)
    gates = parse_gates(fail_if or [])
    from cl_dist.run_config import load_run

    source = runs.run_file(config)
    _compute(load_run(source, overrides or []), baselines, gates, as_json, source)


@app.command()
def resume(
    run: RunOrLast = None,
    overrides: Overrides = None,
    add_tasks: AddTasks = None,
    baselines: Baselines = True,
    fail_if: FailIf = None,
    address: Address = None,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Go on with a run that was stopped or killed; the number of workers may differ (cluster.workers=4).

    With --address, RUN is the id of a job that has ended: it goes on as a job of that cluster.
    """
    console.start_logging(verbose)
    gates, settings = parse_gates(fail_if or []), overrides or []
    if address is not None:
        job_verbs.resume(run, settings, address, has_more=add_tasks is not None or bool(gates) or not baselines)
        return
    if run is not None and "=" in str(run) and not run.exists():  # `cl-dist resume cluster.workers=4`
        run, settings = None, [str(run), *settings]
    folder = runs.latest(Path("runs")) if run is None else run
    _compute(runs.reopen(folder, settings, add_tasks), baselines, gates, as_json)


def _compute(run: Any, baselines: bool, gates: list[Gate], as_json: bool, source: Path | None = None) -> None:
    stop_on_signals()
    summaries = runs.execute(run, shlex.join(["cl-dist", *sys.argv[1:]]), baselines, source)
    _conclude(run, summaries, gates, as_json)


def _conclude(run: Any, found: dict[Path, dict[str, Any]], gates: list[Gate], as_json: bool) -> None:
    """Write the report, show the numbers, then hold the main run's against the gates.

    The numbers are shown also where the report cannot be written.
    """
    summaries = list(found.values())
    errors: list[ClDistError] = []
    page: Path | None = None
    try:
        page = runs.report(run, found)
    except StorageError as error:
        errors.append(error)
    broken = [reason for gate in gates if (reason := gate.reason(summaries[0]["metrics"])) is not None]
    if broken:
        errors.append(QualityError("\n".join(broken)))
    if as_json:
        document = {"report": page and str(page), "runs": summaries, "broken": broken}
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


@app.command()
def status(
    run: RunOrLast = None,
    address: Address = None,
    as_json: AsJson = False,
) -> None:
    """Tell how far a run is; with --address, RUN is the id of a job."""
    if address is not None:
        job_verbs.status(run, address, as_json)
        return
    from cl_dist.run import Run
    from cl_dist.run_events import read_state
    from cl_dist.stage import ref

    config = runs.reopen(runs.latest(Path("runs")) if run is None else run, [])
    lines = []
    for each in [config, *(config.baseline(name) for name in config.baselines)]:
        opened, state = Run(each), read_state(each.folder)
        stages = [stage for t in range(len(opened.tasks)) for stage in opened.plan(t)]
        manifests = [opened.ledger.manifest(ref(stage)) for stage in stages]
        lines.append(
            {
                "run": each.run.name,
                "status": _alive(state),
                "done": sum(m is not None for m in manifests),
                "stages": len(stages),
                "next": next(
                    (opened.ledger.key(ref(s)) for s, m in zip(stages, manifests, strict=True) if m is None), None
                ),
                "attempts": len(state.get("attempts", [])),
                "seconds": round(sum(m["seconds"] for m in manifests if m is not None), 1),
            }
        )
    if as_json:
        console.document(lines)
        return
    table = Table("run", "status", "stages done", "next", "attempts", "seconds in stages")
    for line in lines:
        done = f"{line['done']}/{line['stages']}"
        table.add_row(
            str(line["run"]),
            str(line["status"]),
            done,
            str(line["next"] or "-"),
            str(line["attempts"]),
            str(line["seconds"]),
        )
    console.out.print(table)


def _alive(state: dict[str, Any]) -> str:
    """Return a run's status; one whose driver is gone is not running, whatever it wrote last."""
    if state.get("status") != "running" or not state.get("attempts"):
        return str(state.get("status", "not begun"))
    attempt = state["attempts"][-1]
    if attempt["host"] != platform.node():
        return f"running on {attempt['host']}"
    try:
        os.kill(attempt["pid"], 0)
    except (ProcessLookupError, OverflowError):
        return "killed"
    except PermissionError:
        pass
    return "running"


@app.command()
def report(
    run: Annotated[list[Path], typer.Argument(help="run folders; the first is the main one")],
    reference: Annotated[list[str] | None, typer.Option(help="individual=RUN or joint=RUN")] = None,
    fail_if: FailIf = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained page with the matrix, its metrics and what the method did."""
    gates, references = parse_gates(fail_if or []), dict[str, Path]()
    for text in reference or []:
        kind, equals, folder = text.partition("=")
        if kind not in ("individual", "joint") or not equals:
            raise ConfigError(f"--reference {text!r}: expected individual=RUN or joint=RUN")
        references[kind] = Path(folder)
    config = runs.reopen(run[0], [])
    summaries = runs.conclude(config, references)
    for other in run[1:]:
        summaries |= runs.conclude(runs.reopen(other, []))
    _conclude(config, summaries, gates, as_json)


@app.command("list")
def list_(
    what: Annotated[str, typer.Argument(help="methods, recipes or metrics")],
    as_json: AsJson = False,
) -> None:
    """List what can be named in a run file."""
    from cl_dist.methods import descriptions
    from cl_dist.metrics import FORMULAS

    known = {
        "methods": descriptions,
        "recipes": lambda: {name: _first_comment(path) for name, path in runs.recipes().items()},
        "metrics": lambda: FORMULAS,
    }
    if what not in known:
        raise ConfigError(f"list {what}: expected one of {', '.join(known)}")
    entries = known[what]()
    if as_json:
        console.document(entries)
        return
    for name, about in entries.items():
        console.out.print(f"{name:24} {about}", soft_wrap=True)


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf8").splitlines()[0].removeprefix("#").strip()


@data_app.command("check")
def data_check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Read every row of every task; name file, line and field of each fault; exit 3 if there is one."""
    from cl_dist.data.load import check_task
    from cl_dist.data.rows import SPLITS
    from cl_dist.data.sources import listing
    from cl_dist.errors import DataError
    from cl_dist.run_config import load_run

    science = load_run(runs.run_file(config), overrides or []).science
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


@data_app.command("show")
def data_show(config: Config, overrides: Overrides = None) -> None:
    """Print the first train row of each task as the model reads it."""
    from cl_dist.models.backbone import load_tokenizer
    from cl_dist.run import Run
    from cl_dist.run_config import load_run

    run = Run(load_run(runs.run_file(config), overrides or []))
    check_data(run)
    check_tokens(run)
    tokenizer = load_tokenizer(run.config.science.model)
    for number, task in enumerate(run.tasks.tasks):
        data = run.data(number)
        row = data.train[0]
        length = run.config.science.train_of(task).max_length
        if run.output == "lm":
            from cl_dist.data.language import TextCodec, encode_row

            codec = TextCodec(tokenizer)
            context, asked, answer = encode_row(codec, row, data.question, length)
            prefix = [*context, *asked]
            console.out.rule(f"{task.id}: row {row.id}")
            console.out.print(f"decoder reads  {codec.decode(prefix)}", soft_wrap=True)
            console.out.print(f"and answers    {codec.decode(answer)}", soft_wrap=True)
            console.out.print(f"tokens         {len(prefix)} + {len(answer)} of at most {length - 2}")
            continue
        ids = tokenizer(row.text, row.text_pair, truncation=True, max_length=length)["input_ids"]
        console.out.rule(f"{task.id}: row {row.id}")
        console.out.print(f"encoder reads  {tokenizer.decode(ids)}", soft_wrap=True)
        console.out.print(f"tokens         {len(ids)} of at most {length}: {ids}", soft_wrap=True)
        console.out.print(f"class          {data.labels.index(row.label)} = {row.label} of {list(data.labels)}")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a run file."""
    from cl_dist.run_config import json_schema

    console.document(json_schema())


@app.command()
def env(as_json: AsJson = False) -> None:
    """Print what a bug report needs: versions and machine."""
    names = ("cl-dist", "torch", "deepspeed", "accelerate", "transformers", "datasets", "ray", "peft", "safetensors")
    facts = {"python": platform.python_version(), "platform": platform.platform(), "cpus": str(os.cpu_count())}
    for name in names:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if as_json:
        console.document(facts)
        return
    for name, value in facts.items():
        console.out.print(f"{name:14} {value}")


def main() -> None:
    """Run the command line and turn errors into messages and exit codes."""
    as_json, verbose = "--json" in sys.argv, "-v" in sys.argv or "--verbose" in sys.argv
    console.prepare_streams()
    try:
        sys.exit(app(standalone_mode=False))  # it returns the code of a typer.Exit, else what the verb returns: None
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # whoever read --help has seen enough
            sys.exit(0)
        raise
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(console.show_error(error, verbose, as_json))
