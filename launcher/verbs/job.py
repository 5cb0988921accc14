"""The verbs of jobs: `submit`, `jobs`, `logs`, `stop`, and what `status` and `resume` do when they are given an id."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path
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
    job_id: Annotated[str | None, typer.Option("--id", help="id of the job; else made from the run file")] = None,
) -> None:
    """Run a task sequence as a job of a Ray cluster; prints the job's id. Doing it twice makes no second job."""
    from cl_dist.run_config import read_run_file

    found, is_new = Jobs(address).submit(read_run_file(runs.run_file(config), overrides or []), job_id)
    if not is_new:
        console.err.print(f"job {found} is there already")
    console.out.print(found)


def jobs(address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs of a cluster that are runs of cl-dist, the latest first."""
    found = Jobs(address).list()
    if as_json:
        console.document([dataclasses.asdict(job) for job in found])
        return
    table = Table("job", "status", "run folder", "started", "ended")
    for job in found:
        table.add_row(job.id, job.status, job.folder, _time(job.started), _time(job.ended))
    console.out.print(table)


def logs(
    job_id: JobId,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="go on until the job ends, and exit as it does")
    ] = False,
    address: Address = None,
) -> None:
    """Print what a job's driver has written: a line for each stage, round and score."""
    known = Jobs(address)
    if not follow:
        console.write(printable(known.logs(job_id)))
        return
    for part in known.follow(job_id):
        if not console.write(printable(part)):
            return  # nobody reads any more
    job = known.wait(job_id, timeout_s=60.0)
    raise typer.Exit(_exit_code(job))


def stop(job_id: JobId, address: Address = None, as_json: AsJson = False) -> None:
    """Have a job save the stage it is at and end; `cl-dist resume ID --address URL` goes on from there."""
    known = Jobs(address)
    _show(known, known.stop(job_id), as_json)


def resume(run: Path | None, overrides: list[str], address: str, *, has_more: bool) -> None:
    """Go on with a job that has ended; prints its id."""
    job_id = _id(run)
    if has_more:
        raise ConfigError("--address: a job takes overrides and nothing else; resume its run folder on the cluster")
    if moved := [text for text in overrides if text.partition("=")[0] in ("run", "run.dir", "run.name")]:
        raise ConfigError(f"{moved[0]!r}: a job is resumed in its own run folder")
    Jobs(address).resume(job_id, overrides)
    console.out.print(job_id)


def status(run: Path | None, address: str, as_json: bool) -> None:
    """Tell how far a job is: from its last lines, since its run folder need not be visible from here."""
    known = Jobs(address)
    _show(known, known.get(_id(run)), as_json)


def _show(known: Jobs, job: Info, as_json: bool) -> None:
    lines = known.logs(job.id).splitlines()[-LAST_LINES:]
    if as_json:
        console.document({**dataclasses.asdict(job), "log": lines})
        return
    began, ended = _time(job.started), f", ended {_time(job.ended)}" if job.status in ENDED else ""
    console.out.print(f"{job.id} {job.status}, began {began}{ended}, run folder {job.folder}")
    for line in lines:
        console.out.print(f"  {line}", soft_wrap=True)


def _id(run: Path | None) -> str:
    if run is None:
        raise ConfigError("--address: expected the id of a job before it; `cl-dist jobs` lists them")
    return str(run)


def _exit_code(job: Info) -> int:
    """Return the driver's exit code, as far as Ray knows it."""
    if job.exit_code is not None:
        return job.exit_code
    return 0 if job.status == "SUCCEEDED" else 75 if job.status == "STOPPED" else TrainingError.exit_code


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")
