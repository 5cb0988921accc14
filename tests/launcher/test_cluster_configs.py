"""Every file of cluster_configs/ is read as strictly as the system it is for reads it, and so is a planted mistake."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_dist.errors import ConfigError
from cl_dist.parallel.config import EngineConfig, deepspeed_settings
from cl_dist.run_config import read_run_file
from tests.launcher import manifests
from tests.launcher.commands import Cli
from tests.launcher.manifests import RefusedError

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "cluster_configs"
SAMPLE = CONFIGS / "reviews.yaml"
Check = Callable[[Path], Any]


def reading(check: Callable[[str], Any]) -> Check:
    return lambda path: check(path.read_text(encoding="utf8"))


CHECKS: dict[str, Check] = {
    "local.yaml": reading(manifests.check_launcher),
    "aws.yaml": reading(manifests.check_launcher),
    "gcp.yaml": reading(manifests.check_launcher),
    "kuberay/reviews.rayjob.yaml": reading(manifests.check_kuberay),
    "kuberay/reviews.raycluster.yaml": reading(manifests.check_kuberay),
    "slurm/reviews.sbatch": manifests.check_sbatch,
    "deepspeed/zero1.json": reading(manifests.check_deepspeed),
    "deepspeed/zero2.json": reading(manifests.check_deepspeed),
    "deepspeed/zero3.json": reading(manifests.check_deepspeed),
    "deepspeed/zero3-offload.json": reading(manifests.check_deepspeed),
    "reviews.yaml": read_run_file,
}
KUBERAY = (
    ("kind: Ray", "kind: Rays"),
    ("headGroupSpec:", "headGroup:"),
    ("minReplicas: 2", "minReplicas: two"),
    ("rayStartParams: {}", "rayStartParams: {num-cpus: 4}"),  # an integer where KubeRay wants text
    ("name: shared\n              mountPath", "name: shred\n              mountPath"),
    ("name: shared\n            mountPath", "name: shred\n            mountPath"),
    ("workingDir", "workDir"),
    ("runAsUser: 1000", "runAsUser: trainer"),
    ("medium: Memory", "mediun: Memory"),
    ("name: cl-dist-reviews\n", "name: Reviews\n"),
    ("rayVersion: 2", "rayVersion: 1"),
    ("mode: token", "mode: tokens"),
)
LAUNCHER = (
    ("cluster_name", "cluster_nam"),
    ("  type:", "  typ:"),
    ("auth: {ssh_user", "auth: {sshuser"),
    ("auth:\n  ssh_user", "auth:\n  sshuser"),
    ("available_node_types", "node_types"),
    ("    min_workers: 4", "    min_workers: 5"),
    ("    resources: {CPU: 8", "    resource: {CPU: 8"),
    ("head_node_type: head", "head_node_type: had"),
    ("  region", "  regions"),
    ("worker_ips", "worker_ip"),
    ("--disable-usage-stats", "--disable-usage-statistics"),
)
SBATCH = (
    ("--cpus-per-task", "--cpu-per-task"),
    ("--time=24:00:00", "--time=a-day"),
    ("--signal=B:TERM@120", "--signal=TERM"),
    ("set -euo pipefail\n", "set -euo pipefail\n#SBATCH --mem=4G\n"),
    ('kill -TERM "$driver"', "kill -TERM $driver"),
    ("\ndone\n", "\n"),
    ("--ray-client-server-port", "--client-server-port"),
)
DEEPSPEED = (
    ('"stage": ', '"stage": 1'),
    ('"bf16"', '"bfloat16"'),
    ('"gradient_clipping"', '"gradient_clip"'),
    ('"stage"', '"stages"'),
    ('"enabled": true', '"enabled": 2'),
)
RUN = (("workers: 4", "worker: 4"), ("method: {name: ctr", "method: {name: ctrl"))
MISTAKES = {
    name: {"kuberay": KUBERAY, "slurm": SBATCH, "deepspeed": DEEPSPEED}.get(
        name.partition("/")[0], RUN if name == SAMPLE.name else LAUNCHER
    )
    for name in CHECKS
}
PLANTED = [
    (name, right, wrong)
    for name, mistakes in MISTAKES.items()
    for right, wrong in mistakes
    if right in (CONFIGS / name).read_text(encoding="utf8")
]


def test_every_file_has_a_check_and_a_line_in_the_readme() -> None:
    files = {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*") if path.is_file() and path.suffix != ".md"}
    assert files == set(CHECKS)
    readme = (CONFIGS / "README.md").read_text(encoding="utf8")
    assert [name for name in CHECKS if f"| `{name}` |" not in readme] == []


@pytest.mark.parametrize("name", CHECKS)
def test_the_system_that_a_file_is_for_accepts_it(name: str) -> None:
    assert CHECKS[name](CONFIGS / name)


@pytest.mark.parametrize(("name", "right", "wrong"), PLANTED)
def test_a_planted_mistake_is_refused(name: str, right: str, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / Path(name).name
    path.write_text((CONFIGS / name).read_text(encoding="utf8").replace(right, wrong), encoding="utf8")
    with pytest.raises((RefusedError, ConfigError)):
        CHECKS[name](path)


def test_every_mistake_is_planted_somewhere() -> None:
    planted = {(right, wrong) for _, right, wrong in PLANTED}
    assert {*KUBERAY, *LAUNCHER, *SBATCH, *DEEPSPEED, *RUN} == planted


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("kuberay/reviews.rayjob.yaml", ["kuberay"]),
        ("kuberay/reviews.raycluster.yaml", ["kuberay", "--kind", "cluster"]),
        ("slurm/reviews.sbatch", ["slurm"]),
    ],
)
def test_a_committed_manifest_is_what_render_makes_of_the_sample(name: str, args: list[str], cli: Cli) -> None:
    verb, *options = args
    ended = cli("render", verb, SAMPLE, *options)
    assert (ended.code, ended.out) == (0, (CONFIGS / name).read_text(encoding="utf8")), ended.err


@pytest.mark.parametrize(
    ("name", "settings"),
    [(f"zero{stage}", {"zero_stage": stage}) for stage in (1, 2, 3)]
    + [("zero3-offload", {"zero_stage": 3, "offload": "all"})],
)
def test_deepspeed_files_are_what_the_engine_writes(name: str, settings: dict[str, Any]) -> None:
    """Four workers with one GPU each share a global batch of 32, as in the sample."""
    written = deepspeed_settings(EngineConfig(**settings), num_micro=1, micro_batch=8, clip=1.0, bf16=True)
    assert json.loads((CONFIGS / f"deepspeed/{name}.json").read_text(encoding="utf8")) == written


@pytest.fixture(scope="module")
def crds() -> Path:
    """A folder of KubeRay's CRDs: ray-operator/config/crd/bases of its repository."""
    if "KUBERAY_CRDS" not in os.environ:
        pytest.skip("needs KubeRay's CRDs: set KUBERAY_CRDS")
    return Path(os.environ["KUBERAY_CRDS"])


@pytest.mark.parametrize("kind", manifests.SPECS)
def test_our_account_of_kuberay_is_that_of_its_crds(kind: str, crds: Path) -> None:
    assert list(manifests.differences(manifests.SPECS[kind], manifests.crd(crds, kind))) == []


@pytest.mark.parametrize("kind", manifests.SPECS)
def test_kuberays_crds_accept_the_manifests_and_refuse_unknown_fields(kind: str, crds: Path) -> None:
    text = (CONFIGS / f"kuberay/reviews.{kind.lower()}.yaml").read_text(encoding="utf8")
    (found,) = (each for each in manifests.check_kuberay(text) if each["kind"] == kind)
    manifests.check_schema(found["spec"], manifests.crd(crds, kind))
    cluster = found["spec"].get("rayClusterSpec", found["spec"])
    cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["workDir"] = "/"
    with pytest.raises(RefusedError, match="workDir"):
        manifests.check_schema(found["spec"], manifests.crd(crds, kind))
