"""The verbs `job submit|list|status|logs|stop|resume`: runs as jobs of a Ray cluster."""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from cl_dist.errors import ConfigError, TrainingError, printable
from cl_dist.pace import duration
from launcher import console, runs
from launcher.cluster.jobs import ENDED, Info, Jobs
from launcher.options import Address, AsJson, Config, JobId, Overrides

LAST_LINES = 10
SHOWN = ("run", "stage", "step", "total_steps", "loss", "train/loss", "steps_per_s", "stage_left_s", "left_s")


def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    job_id: Annotated[
        str | None, typer.Option("--id", help="Id of the job. Default: derived from the run file.")
    ] = None,
) -> None:
    """Submit a run as a job and print its id. Submitting the same run again finds the same job."""
    known = Jobs(address)
    found, is_new = known.submit(runs.read(config, overrides), job_id)
    if not is_new:
        console.err.print(f"job {found} exists already")
    console.out.print(found)
    _show_commands(known, found, address)


def _show_commands(known: Jobs, job_id: str, address: str | None) -> None:
    """Print to stderr how to watch a job."""
    where = f" --address {shlex.quote(address)}" if address else ""
    for name, value in {
        "log": f"cl-dist job logs -f {job_id}{where}",
        "status": f"cl-dist job status {job_id}{where}",
        "dashboard": known.dashboard,
    }.items():
        console.err.print(f"{name:<10} {value}", soft_wrap=True)


def list_(address: Address = None, as_json: AsJson = False) -> None:
    """List the cluster's cl-dist jobs, the latest first."""
    found = Jobs(address).list()
    if as_json:
        console.document([dataclasses.asdict(job) for job in found])
        return
    table = Table("job", "status", "run folder", "started", "ended")
    for job in found:
        table.add_row(job.id, job.status, job.folder, _time(job.started), _time(job.ended))
    console.out.print(table)


def status(job_id: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Show the status of a job, its stage, step, loss and time left, and the last lines of its log."""
    known = Jobs(address)
    _show(known, known.get(job_id), as_json)


def logs(
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Continue until the job ends, and exit with its exit code.")
    ] = False,
    address: Address = None,
) -> None:
    """Print the log of a job's driver: a line for each stage, training round and score."""
    known = Jobs(address)
    if not follow:
        console.write(printable(known.logs(job_id)))
        return
    for part in known.follow(job_id):
        if not console.write(printable(part)):
            return  # the reader of stdout has closed it
    job = known.wait(job_id, timeout_s=60.0)
    raise typer.Exit(_exit_code(job))


def stop(job_id: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Stop a job once it has saved its current stage. `job resume` continues it."""
    known = Jobs(address)
    _show(known, known.stop(job_id), as_json)


def resume(job_id: JobId, overrides: Overrides = None, address: Address = None) -> None:
    """Continue a job that has ended, under the same id, and print the id."""
    settings = overrides or []
    if moved := [text for text in settings if text.partition("=")[0] in ("run", "run.dir", "run.name")]:
        raise ConfigError(f"{moved[0]!r}: a job resumes in its own run folder")
    known = Jobs(address)
    known.resume(job_id, settings)
    console.out.print(job_id)
    _show_commands(known, job_id, address)


def _show(known: Jobs, job: Info, as_json: bool) -> None:
    log = known.logs(job.id).splitlines()
    lines, progress = log[-LAST_LINES:], last_progress(log)
    if as_json:
        console.document({**dataclasses.asdict(job), "progress": progress, "log": lines})
        return
    started, ended = _time(job.started), f", ended {_time(job.ended)}" if job.status in ENDED else ""
    console.out.print(f"{job.id} {job.status}, started {started}{ended}, run folder {job.folder}")
    if progress is not None:
        console.out.print(_sentence(progress), soft_wrap=True)
    for line in lines:
        console.out.print(f"  {line}", soft_wrap=True)


def last_progress(log: Sequence[str]) -> dict[str, str] | None:
    """Return the words of the last line of a driver's log that has a step, if no stage has begun or ended since."""
    for line in reversed(log):
        _, _, text = line.partition(" ")
        kind, _, words = text.partition(" ")
        if kind in ("stage_start", "stage_done", "finished", "begin"):
            return None
        if kind in ("progress", "round", "saved", "continued"):
            found = dict(word.partition("=")[::2] for word in words.split() if "=" in word)
            return {name.removeprefix("train/"): value for name, value in found.items() if name in SHOWN}
    return None


def _sentence(progress: Mapping[str, str]) -> str:
    parts = [progress.get("stage", ""), f"step {progress.get('step', '?')} of {progress.get('total_steps', '?')}"]
    parts += [f"loss {progress['loss']}"] if "loss" in progress else []
    parts += [f"about {duration(float(progress['left_s']))} left"] if "left_s" in progress else []
    return ", ".join(filter(None, parts))


def _exit_code(job: Info) -> int:
    """Return the driver's exit code; an equivalent one where Ray does not know it."""
    if job.exit_code is not None:
        return job.exit_code
    return 0 if job.status == "SUCCEEDED" else 75 if job.status == "STOPPED" else TrainingError.exit_code


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
