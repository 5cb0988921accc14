"""Dispatcher of stages to a Ray cluster: Train stages to a gang (Ray Train), sharded stages to a pool of actors.

The gang's processes outlive a stage, since starting them can cost more than training a task: one `TorchTrainer.fit`
runs all Train stages of a run and of its baselines. Its ranks fetch stages from a mailbox actor; after the loss of a
worker, Ray Train restarts the gang, which finds the current stage in the mailbox. While the pool works the gang waits,
so the pool borrows the gang's CPUs and GPUs; before the gang works, the pool drops its models.
"""

import logging
from pathlib import Path

from ray.exceptions import RayError

from cl_dist.dispatch_ray.cluster import CLOSE_IT, OPEN, check_fits, connect, is_open, last_lines
from cl_dist.dispatch_ray.gang import Gang
from cl_dist.dispatch_ray.nodes import check_storage
from cl_dist.dispatch_ray.pool import Pool
from cl_dist.errors import ClusterError
from cl_dist.kinds import kind_of
from cl_dist.run_config import ClusterConfig
from cl_dist.run_events import Tracker
from cl_dist.stages.stage_job import Job

log = logging.getLogger(__name__)


class RayDispatcher:
    """Gang and pool on a Ray cluster, for any number of stages. Close it when done."""

    def __init__(self, cluster: ClusterConfig, folder: Path) -> None:
        """Join or start the cluster.

        Raises:
            ClusterError: If the cluster cannot be reached, is too small, or has nodes that do not see the run folder.
        """
        self._cluster, self._folder = cluster, folder
        self._gang: Gang | None = None
        self._pool: Pool | None = None
        self._connection = connect(cluster)
        self.dashboard = self._connection.dashboard
        """The address of Ray's dashboard."""
        try:
            if cluster.address is not None and is_open():
                log.warning("%s; %s", OPEN, CLOSE_IT)
            check_fits(cluster)
            check_storage(folder)
        except ClusterError:
            self._connection.close()
            raise

    def run(self, job: Job, out: str, tracker: Tracker) -> None:
        """Run a stage; see sequence.Dispatcher."""
        try:
            self._run(job, out, tracker)
        except RayError as error:
            raise ClusterError(
                f"the Ray cluster failed during the run: {type(error).__name__}: {last_lines(error)}\n"
                "Finished stages are kept: `cl-dist resume` continues from there."
            ) from error

    def _run(self, job: Job, out: str, tracker: Tracker) -> None:
        if self._gang is not None and self._gang.stop is not None:
            raise self._gang.stop
        if kind_of(job.stage).worker is None:
            if self._pool is not None:
                self._pool.release(keep_actors=self._pool.borrowed)
                self._pool = self._pool if self._pool.borrowed else None
            if self._gang is None:
                self._gang = Gang(self._cluster, self._folder, self._connection.folder)
                from cl_dist.stages.shards import import_workers

                import_workers()  # import torch while the gang starts
            self._gang.train(job, out, tracker)
            return
        if self._pool is not None and self._gang is not None and self._pool.slots != self._gang.slots():
            self._pool.release(keep_actors=False)  # the gang restarted on other nodes, or with another size
            self._pool = None
        if self._pool is None:
            self._pool = Pool(self._cluster, self._gang.slots() if self._gang else None)
        from cl_dist.stages.shards import ShardStore

        finished = ShardStore(job, Path(out))
        self._pool.map(tracker, job, finished, Path(out).parents[2] / "logs")
        finished.merge()

    def close(self) -> None:
        """End the gang and the pool, and leave the cluster, or stop it if this run started it."""
        try:
            if self._pool is not None:
                self._pool.release(keep_actors=False)
        finally:
            try:
                if self._gang is not None:
                    self._gang.close()
            finally:
                self._connection.close()
