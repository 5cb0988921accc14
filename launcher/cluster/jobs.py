"""Runs as jobs of a Ray cluster, over Ray's job API.

Files that a run file names by relative paths are uploaded with the job, which copies them to `<run folder>/package` and
works there: every node sees them, and a later job can continue the run. Files with an absolute path or a URL must be
accessible from every node. SIGTERM stops a job: it saves its stage, and the driver exits with 75.
"""

import asyncio
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cl_dist
from cl_dist.config import parse
from cl_dist.errors import ClusterError, ConfigError, JobError
from cl_dist.run_config import RunConfig
from cl_dist.stage import digest_of
from cl_dist.strict_yaml import yaml_text

ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
FOLDER, RUN, VERSION = "cl-dist-folder", "cl-dist-run", "cl-dist-version"
PACKAGE, RUN_FILE = "package", "run.yaml"
PATH_KEYS = ("path", "order_file", "source")
"""Settings of `science` that may name a file or folder; so may all values of `paths`."""
MAX_BYTES = 400 * 2**20
"""Ray refuses packages of 512 MiB."""
GRACE_S = 30.0
"""Time after cluster.stop_timeout_s for the driver's last lines, before Ray kills it."""

AGENTS_S = 60.0
"""Time for a cluster that has just started to accept jobs."""


@dataclass(frozen=True, slots=True)
class Info:
    """One job."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    message: str
    run: str
    folder: str
    started: float | None
    """Seconds since 1970."""
    ended: float | None
    exit_code: int | None
    """The driver's exit code; None if Ray does not know it."""
    stop_s: float
    """Seconds that a stop may take."""


class Jobs:
    """The jobs of a cluster."""

    def __init__(self, address: str | None) -> None:
        """Connect to the job server at an address such as http://HOST:8265; None uses RAY_ADDRESS, or this machine.

        Raises:
            JobError: If it cannot be reached, or requires another token.
        """
        from ray.job_submission import JobSubmissionClient

        from cl_dist.dispatch_ray.cluster import find_cluster

        self._address = address
        with self._errors():
            named = any(os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"))
            if address in (None, "auto") and not named:
                address = find_cluster()  # Ray itself would choose a cluster that a run started for itself
            self._client = JobSubmissionClient(address)

    @property
    def dashboard(self) -> str:
        """The address of Ray's dashboard, which serves the jobs too."""
        return str(self._client.get_address())

    def submit(self, config: RunConfig, job_id: str | None = None) -> tuple[str, bool]:
        """Submit a run; return the job's id, and whether the job is new. The same run file always gives the same id.

        Raises:
            ConfigError: If the run folder is relative, a relative path leaves the working directory, the files are
                too large to upload, or a job of that id has ended.
        """
        folder = _absolute(config)
        tree = config.tree()
        tree.setdefault("cluster", {})["address"] = "auto"
        job_id = job_id or f"{config.run.name}-{digest_of({'tree': tree, 'files': _sizes(tree)})[:8]}"
        known = self.find(job_id)
        if known is not None and known.status in ENDED:
            raise ConfigError(
                f"job {job_id} is {known.status}; `cl-dist job resume {job_id}` continues it, and `--id ANOTHER` "
                "submits a new job"
            )
        if known is not None:
            return job_id, False
        package = folder / PACKAGE
        there, run = shlex.quote(str(package)), f"exec cl-dist train {RUN_FILE}"
        with TemporaryDirectory(prefix="cl-dist-") as made:
            _pack(tree, Path(made))
            with self._errors():
                self._send(
                    entrypoint=f"mkdir -p {there} && cp -R . {there} && cd {there} && {run}",
                    submission_id=job_id,
                    runtime_env={"working_dir": made, **_environment(config)},
                    metadata={FOLDER: str(folder), RUN: config.run.name, VERSION: cl_dist.__version__},
                )
        return job_id, True

    def resume(self, job_id: str, overrides: list[str]) -> None:
        """Continue a job that has ended, under its id, from its run folder.

        Raises:
            ConfigError: If it is still running.
            JobError: If the job does not exist.
        """
        known = self.get(job_id)
        if known.status not in ENDED:
            raise ConfigError(f"job {job_id} is {known.status}: stop it first with `cl-dist job stop {job_id}`")
        words = ["cl-dist", "resume", known.folder, "cluster.address=auto", *overrides]
        enter = f"cd {shlex.quote(str(Path(known.folder) / PACKAGE))}"
        with self._errors():
            old = self._client.get_job_info(job_id)
            env = {key: value for key, value in (old.runtime_env or {}).items() if key == "env_vars"}
            self._client.delete_job(job_id)  # Ray accepts an id only once
            self._send(
                entrypoint=f"{enter} && exec {shlex.join(words)}",
                submission_id=job_id,
                runtime_env=env,
                metadata=old.metadata,
            )

    def _send(self, **job: Any) -> None:
        """Submit a job; wait for a cluster whose agents are still starting."""
        deadline = time.monotonic() + AGENTS_S
        while True:
            try:
                self._client.submit_job(**job)
            except RuntimeError as error:
                if "No available agent" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(1.0)
            else:
                return

    def list(self) -> list[Info]:
        """Return the cluster's cl-dist jobs, the latest first."""
        with self._errors():
            found = [_info(job) for job in self._client.list_jobs() if FOLDER in (job.metadata or {})]
        return sorted(found, key=lambda job: -(job.started or 0.0))

    def find(self, job_id: str) -> Info | None:
        """Return a job, or None if it does not exist."""
        return next((job for job in self.list() if job.id == job_id), None)

    def get(self, job_id: str) -> Info:
        """Return a job.

        Raises:
            JobError: If it does not exist.
        """
        known = self.find(job_id)
        if known is None:
            raise JobError(f"no job {job_id!r} on this cluster; `cl-dist job list` lists its jobs")
        return known

    def logs(self, job_id: str) -> str:
        """Return the driver's log so far."""
        self.get(job_id)
        with self._errors():
            text: str = self._client.get_job_logs(job_id)
            return text

    def follow(self, job_id: str) -> Iterator[str]:
        """Yield the driver's log until the job ends."""
        self.get(job_id)
        with self._errors():
            stream = aiter(self._client.tail_job_logs(job_id))
            loop = asyncio.new_event_loop()
            try:
                while (part := loop.run_until_complete(anext(stream, None))) is not None:
                    yield part
            finally:
                loop.close()

    def stop(self, job_id: str) -> Info:
        """Stop a job once it has saved its stage, and return it.

        Raises:
            JobError: If it has not ended within the run file's cluster.stop_timeout_s and a margin.
        """
        known = self.get(job_id)
        if known.status in ENDED:
            return known
        with self._errors():
            self._client.stop_job(job_id)
        return self.wait(job_id, known.stop_s + GRACE_S)

    def wait(self, job_id: str, timeout_s: float) -> Info:
        """Wait for a job to end, and return it.

        Raises:
            JobError: If it has not ended in time.
        """
        deadline = time.monotonic() + timeout_s
        while (known := self.get(job_id)).status not in ENDED:
            if time.monotonic() > deadline:
                raise JobError(
                    f"job {job_id} is still {known.status} after {timeout_s:g} s; see `cl-dist job logs {job_id}`"
                )
            time.sleep(0.5)
        return known

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn errors of Ray's client into a JobError with a remedy."""
        from ray.exceptions import RayError

        try:
            yield
        except (ClusterError, ConnectionError, OSError, RuntimeError, RayError) as error:
            where = self._address or os.environ.get("RAY_ADDRESS") or "a Ray cluster on this machine"
            raise JobError(
                f"{where}: {str(error).strip()}\nExpected the job server of a Ray head, as --address http://HOST:8265 "
                "or RAY_ADDRESS; if it requires a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN as on the head."
            ) from error


def _info(job: Any) -> Info:
    metadata, env = job.metadata or {}, (job.runtime_env or {}).get("env_vars", {})
    return Info(
        id=job.submission_id,
        status=str(job.status.value if hasattr(job.status, "value") else job.status),
        message=job.message or "",
        run=metadata[RUN],
        folder=metadata[FOLDER],
        started=None if not job.start_time else job.start_time / 1000,
        ended=None if not job.end_time else job.end_time / 1000,
        exit_code=job.driver_exit_code,
        stop_s=float(env.get("RAY_JOB_STOP_WAIT_TIME_S", "3")),
    )


def _environment(config: RunConfig) -> Mapping[str, Any]:
    """Return the environment of the job's driver; by default Ray kills a driver 3 seconds after SIGTERM."""
    return {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": f"{config.cluster.stop_timeout_s + GRACE_S:g}"}}


def _absolute(config: RunConfig) -> Path:
    if not Path(config.run.dir).is_absolute():
        raise ConfigError(
            f"run.dir={config.run.dir!r}: a job needs an absolute folder that every node of the cluster can write: "
            "run.dir=/shared/runs"
        )
    return config.folder


def _paths(tree: Any, key: str = "") -> Iterator[str]:
    """Yield the relative paths in a run file that name existing files and folders."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _paths(value, "path" if key == "paths" else name)
    elif isinstance(tree, list):
        for value in tree:
            yield from _paths(value, key)
    elif key in PATH_KEYS and isinstance(tree, str) and _is_local(tree):
        yield tree


def _is_local(path: str) -> bool:
    return path != "" and not Path(path).expanduser().is_absolute() and Path(path).exists()


def _sizes(tree: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return size and modification time of the run file's local files, to identify their state."""
    places = [Path(path) for path in _paths(_science(tree))]
    files = [file for place in places for file in ([place] if place.is_file() else sorted(place.rglob("*")))]
    found = {str(file): file.stat() for file in files if file.is_file()}
    return {path: [facts.st_size, facts.st_mtime_ns] for path, facts in found.items()}


def _science(tree: Mapping[str, Any]) -> list[Any]:
    return [tree["science"], tree.get("baselines", {})]


def _pack(tree: Mapping[str, Any], into: Path) -> None:
    """Write a run file, and copy the files that it names by relative paths, to a folder.

    Raises:
        ConfigError: If a path leaves the working directory, or the files are too large to upload.
    """
    parse(RunConfig, tree)
    (into / RUN_FILE).write_text(yaml_text(tree), encoding="utf8")
    for path in sorted(set(_paths(_science(tree)))):
        if not Path(path).resolve().is_relative_to(Path.cwd()):
            raise ConfigError(f"{path}: leaves the working directory; use an absolute path that every node can read")
        target = into / path
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(path, target, dirs_exist_ok=True) if Path(path).is_dir() else shutil.copyfile(path, target)
    size = sum(file.stat().st_size for file in into.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise ConfigError(
            f"the files of the run file's relative paths have {size / 2**20:.0f} MiB, and a job can upload "
            f"{MAX_BYTES / 2**20:.0f} MiB; put them in a folder that every node can read, and use absolute paths"
        )
