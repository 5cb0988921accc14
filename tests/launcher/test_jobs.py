"""What a run submitted as a job takes along, and when it is the same job. Real jobs are in tests/integration."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.errors import ConfigError
from cl_dist.run_config import RunConfig
from launcher.cluster.jobs import RUN_FILE, Jobs
from tests.launcher.commands import Cli, save_run

LOG = """10:00:00 begin run=demo stages=6 done=0
10:00:00 stage_start stage=00-food/train
10:00:40 progress stage=00-food/train step=12 total_steps=24 loss=0.4321 steps_per_s=0.4 left_s=1500 run=demo
"""


class Server:
    """A job server that notes what it is sent."""

    jobs: tuple[Any, ...] = ()

    def __init__(self, address: str) -> None:
        self.sent: list[dict[str, Any]] = []

    def get_address(self) -> str:
        return "http://192.0.2.1:8265"

    def get_job_logs(self, job_id: str) -> str:
        return LOG

    def list_jobs(self) -> tuple[Any, ...]:
        return self.jobs

    def submit_job(self, **job: Any) -> None:
        into = Path(job["runtime_env"]["working_dir"])
        files = {str(path.relative_to(into)): path.read_bytes() for path in into.rglob("*") if path.is_file()}
        self.sent.append({**job, "files": files})


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Server)
    return Jobs("http://192.0.2.1:8265")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def config(here: Path, **run: str) -> RunConfig:
    """Return a run whose model and rows lie in the working directory, named by relative paths."""
    tree = tiny.tree(here, {"run": {"dir": str(here.parent / "runs"), **run}}, tasks=("food",))
    (task,) = tree["science"]["tasks"]
    task["source"]["path"] = Path(task["source"]["path"]).name
    tree["science"]["model"]["source"] = Path(tree["science"]["model"]["source"]).name
    return parse(RunConfig, tree)


def sent(jobs: Jobs) -> list[dict[str, Any]]:
    server: Any = jobs._client
    found: list[dict[str, Any]] = server.sent
    return found


def test_what_a_run_file_names_by_relative_paths_travels(jobs: Jobs, here: Path) -> None:
    run = config(here)
    job_id, new = jobs.submit(run)
    assert new
    (job,) = sent(jobs)
    model, rows = run.science.model.source, run.science.tasks[0].source.path
    expected = {str(path.relative_to(here)): path.read_bytes() for path in (here / model).rglob("*") if path.is_file()}
    assert len(expected) > 2
    assert job["files"].pop(RUN_FILE)
    assert job["files"] == expected | {rows: (here / rows).read_bytes()}
    assert job["submission_id"] == job_id


def test_a_job_is_another_when_a_file_that_it_takes_along_has_changed(jobs: Jobs, here: Path) -> None:
    run = config(here)
    first, _ = jobs.submit(run)
    assert jobs.submit(run)[0] == first
    inside = here / run.science.model.source / "config.json"
    inside.write_text(inside.read_text() + "\n")
    second, _ = jobs.submit(run)
    rows = here / run.science.tasks[0].source.path
    rows.write_text(rows.read_text() + "\n")
    third, _ = jobs.submit(run)
    assert len({first, second, third}) == 3


def test_a_job_that_is_there_is_not_sent_again(jobs: Jobs, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = config(here)
    job_id, _ = jobs.submit(run)
    there = SimpleNamespace(
        submission_id=job_id, status="RUNNING", message="", start_time=1, end_time=None, driver_exit_code=None,
        runtime_env={}, metadata=sent(jobs)[0]["metadata"],
    )  # fmt: skip
    monkeypatch.setattr(Server, "jobs", (there,))
    assert jobs.submit(run) == (job_id, False)
    assert len(sent(jobs)) == 1
    there.status = "FAILED"
    with pytest.raises(ConfigError, match=rf"{job_id} is FAILED; `cl-dist job resume {job_id}"):
        jobs.submit(run)


def test_submit_prints_the_id_and_to_stderr_how_to_watch_the_job(
    cli: Cli, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Server)
    run = save_run(here / "run.yaml", config(here).tree())
    ended = cli("job", "submit", run, "--id", "mine", "--address", "http://192.0.2.1:8265")
    assert (ended.code, ended.out) == (0, "mine\n"), ended.err
    assert ended.err.splitlines() == [
        "log        cl-dist job logs -f mine --address http://192.0.2.1:8265",
        "status     cl-dist job status mine --address http://192.0.2.1:8265",
        "dashboard  http://192.0.2.1:8265",
    ]


def test_the_status_of_a_job_has_its_stage_step_loss_and_time_left(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.job_submission.JobSubmissionClient", Server)
    metadata = {"cl-dist-folder": "/shared/runs/demo", "cl-dist-run": "demo"}
    job = SimpleNamespace(
        submission_id="mine", status="RUNNING", message="", metadata=metadata, runtime_env={}, start_time=0,
        end_time=0, driver_exit_code=None,
    )  # fmt: skip
    monkeypatch.setattr(Server, "jobs", (job,))
    ended = cli("job", "status", "mine", "--address", "http://192.0.2.1:8265")
    assert "\n00-food/train, step 12 of 24, loss 0.4321, about 25 min left\n" in ended.out
    found = cli("job", "status", "mine", "--address", "http://192.0.2.1:8265", "--json").json()["progress"]
    assert (found["step"], found["total_steps"], found["left_s"]) == ("12", "24", "1500")


def test_a_relative_run_folder_and_a_path_that_leaves_are_refused(jobs: Jobs, here: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.dir='runs': a job needs an absolute folder"):
        jobs.submit(config(here, dir="runs"))
    run = config(here)
    outside = here.parent / "rows.jsonl"
    (here / run.science.tasks[0].source.path).rename(outside)
    tree = run.tree()
    tree["science"]["tasks"][0]["source"]["path"] = "../rows.jsonl"
    with pytest.raises(ConfigError, match=r"\.\./rows\.jsonl: leaves the working directory"):
        jobs.submit(parse(RunConfig, tree))
    assert sent(jobs) == []
