"""The verbs `render kuberay` and `render slurm`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from cl_dist.errors import ConfigError
from launcher import console, runs
from launcher.cluster.render import PodOptions, kuberay_text, ray_cluster, ray_job, slurm_text
from launcher.options import Config, Overrides

Out = Annotated[
    Path | None, typer.Option("-o", "--out", metavar="DIR", help="Write a file to this folder instead of stdout.")
]
PerNode = Annotated[int, typer.Option(min=1, help="Workers on each pod or node.")]


def _write(text: str, out: Path | None, name: str) -> None:
    if out is None:
        console.write(text, utf8=True)
        return
    out.mkdir(parents=True, exist_ok=True)
    (out / name).write_text(text, encoding="utf8")
    console.out.print(str(out / name), soft_wrap=True)


def kuberay(
    config: Config,
    overrides: Overrides = None,
    out: Out = None,
    kind: Annotated[
        Literal["job", "cluster"],
        typer.Option(help="job: a Ray cluster for this run; cluster: a permanent one of the same size."),
    ] = "job",
    image: Annotated[str, typer.Option(help="Image of all pods. Default: cl-dist:gpu or cl-dist:cpu.")] = "",
    claim: Annotated[str, typer.Option(help="PersistentVolumeClaim that all pods mount.")] = "cl-dist",
    memory_gib: Annotated[int, typer.Option(min=2, help="Memory of a pod, including shared memory.")] = 32,
    shm_gib: Annotated[int, typer.Option(min=1, help="Shared memory of a pod, for Ray's object store.")] = 8,
    workers_per_node: PerNode = 1,
) -> None:
    """Write a KubeRay manifest: a RayJob or RayCluster, with the run file as a ConfigMap."""
    run = runs.read(config, overrides)
    if shm_gib >= memory_gib:
        raise ConfigError(f"--shm-gib {shm_gib}: expected less than --memory-gib {memory_gib}, which includes it")
    options = PodOptions(
        image or ("cl-dist:gpu" if run.cluster.gpus_per_worker else "cl-dist:cpu"), claim, memory_gib, shm_gib
    )
    objects = (ray_job if kind == "job" else ray_cluster)(run, workers_per_node, options)
    _write(kuberay_text(objects, claim), out, f"{run.run.name}.ray{kind}.yaml")


def slurm(config: Config, overrides: Overrides = None, out: Out = None, workers_per_node: PerNode = 1) -> None:
    """Write an sbatch script that contains the run file. Pass queue, memory and time to sbatch itself."""
    run = runs.read(config, overrides)
    _write(slurm_text(run, workers_per_node), out, f"{run.run.name}.sbatch")
