"""The verbs `job submit|list|status|logs|stop|resume`: runs as jobs of a Ray cluster."""

import dataclasses
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from cl_dist.errors import ConfigError, TrainingError, printable
from launcher import console, runs
from launcher.cluster.jobs import ENDED, Info, Jobs
from launcher.options import Address, AsJson, Config, JobId, Overrides

LAST_LINES = 10


def submit(
    config: Config,
    overrides: Overrides = None,
    address: Address = None,
    job_id: Annotated[
        str | None, typer.Option("--id", help="Id of the job. Default: derived from the run file.")
    ] = None,
) -> None:
    """Submit a run as a job and print its id. Submitting the same run again finds the same job."""
    found, is_new = Jobs(address).submit(runs.read(config, overrides), job_id)
    if not is_new:
        console.err.print(f"job {found} exists already")
    console.out.print(found)


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
    """Show the status of a job and the last lines of its log."""
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
    Jobs(address).resume(job_id, settings)
    console.out.print(job_id)


def _show(known: Jobs, job: Info, as_json: bool) -> None:
    lines = known.logs(job.id).splitlines()[-LAST_LINES:]
    if as_json:
        console.document({**dataclasses.asdict(job), "log": lines})
        return
    started, ended = _time(job.started), f", ended {_time(job.ended)}" if job.status in ENDED else ""
    console.out.print(f"{job.id} {job.status}, started {started}{ended}, run folder {job.folder}")
    for line in lines:
        console.out.print(f"  {line}", soft_wrap=True)


def _exit_code(job: Info) -> int:
    """Return the driver's exit code; an equivalent one where Ray does not know it."""
    if job.exit_code is not None:
        return job.exit_code
    return 0 if job.status == "SUCCEEDED" else 75 if job.status == "STOPPED" else TrainingError.exit_code


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
