"""The Dockerfile and the compose file, as far as they can be tried without a Docker engine."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.launcher.manifests import RefusedError, check_ray_start

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = ROOT / "docker" / "compose.yaml"


def instructions() -> list[tuple[str, str, str]]:
    """Return (target, instruction, arguments) of the Dockerfile."""
    text = "\n".join(line for line in DOCKERFILE.read_text(encoding="utf8").splitlines() if not line.startswith("#"))
    found, target = [], ""
    for line in filter(None, text.replace("\\\n", " ").splitlines()):
        name, _, rest = line.partition(" ")
        target = rest.split()[-1] if name == "FROM" else target
        found.append((target, name, rest.strip()))
    return found


def refuses(command: list[str], text: str, tmp_path: Path) -> bool:
    """Return whether a linter refuses a text."""
    path = tmp_path / "file"
    path.write_text(text, encoding="utf8")
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=60)
    return done.returncode != 0


HADOLINT = ["hadolint", "--failure-threshold", "style"]


def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    assert not refuses(HADOLINT, DOCKERFILE.read_text(encoding="utf8"), tmp_path)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("python:3.11.13-slim-bookworm", "python"),
        ("USER 1000\n", "USER root\n"),
        ("COPY cl_dist cl_dist", "ADD cl_dist cl_dist"),
        ("RUN pip install --no-deps .", "RUN cd / && pip install --no-deps numpy"),
        ('CMD ["cl-dist", "--help"]', 'CMD ["cl-dist", --help]'),
        ("WORKDIR /opt", "WORKDIR opt"),
        ("RUN useradd", "RUNS useradd"),
    ],
)
def test_hadolint_refuses_a_planted_mistake(right: str, wrong: str, tmp_path: Path) -> None:
    text = DOCKERFILE.read_text(encoding="utf8")
    assert right in text
    assert refuses(HADOLINT, text.replace(right, wrong), tmp_path)


def test_images_run_as_a_user_whom_kubernetes_can_tell_from_root() -> None:
    users = {target: int(rest) for target, name, rest in instructions() if name == "USER"}
    (made,) = (rest for _, name, rest in instructions() if name == "RUN" and "useradd" in rest)
    (uid,) = re.findall(r"--uid (\d+)", made)
    assert users == {"cpu": int(uid), "gpu": int(uid)}
    assert int(uid) > 0


def test_a_build_may_read_what_it_copies_and_nothing_else() -> None:
    copied = {path for _, name, rest in instructions() if name == "COPY" for path in rest.split()[:-1]}
    lines = (ROOT / "docker/Dockerfile.dockerignore").read_text(encoding="utf8").splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == copied


def test_the_install_steps_work_in_a_clean_directory_from_what_was_copied_alone(tmp_path: Path) -> None:
    """All of it but the downloads: what the package needs must be there already, at the pinned versions."""
    work, venv = tmp_path / "opt", tmp_path / "venv"
    work.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, timeout=100)
    pip = venv / "bin" / "pip"  # the one around, with this environment to install to
    pip.write_text(
        f"#!{venv}/bin/python\nimport sys\nfrom pip._internal.cli.main import main\nsys.exit(main())\n", "utf8"
    )
    pip.chmod(0o755)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "around.pth").write_text(sysconfig.get_path("purelib"), encoding="utf8")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PATH": f"{venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    env |= {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    ran = []
    for target, name, rest in instructions():
        if target == "base" and name == "COPY":
            *sources, place = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, work / place, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, work / place)
        elif target == "base" and name == "RUN" and "pip " in rest:
            done = subprocess.run(["sh", "-c", rest], cwd=work, env=env, capture_output=True, text=True, timeout=100)
            assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"
            ran.append(rest)
    assert len(ran) == 2
    shutil.rmtree(work)  # what is installed needs no source tree
    program = "import cl_dist, launcher; print(cl_dist.__file__, launcher.__file__)"
    args = [str(venv / "bin" / "python"), "-c", program]
    where = subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout.split()
    assert [path for path in where if not Path(path).is_relative_to(venv)] == []
    (command,) = {rest for _, name, rest in instructions() if name == "CMD"}
    done = subprocess.run(yaml.safe_load(command), env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


def test_the_extra_of_the_gpu_image_exists() -> None:
    (step,) = (rest for target, name, rest in instructions() if target == "gpu" and name == "RUN")
    (extra,) = re.findall(r"\[(\w+)\]", step)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    assert extra in project["optional-dependencies"]


SCHEMA = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec"]


def test_the_compose_file_is_one() -> None:
    done = subprocess.run([*SCHEMA, str(COMPOSE)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(("right", "wrong"), [("shm_size", "shm_sizes"), ("replicas: 2", "replicas: two")])
def test_a_planted_mistake_in_the_compose_file_is_refused(right: str, wrong: str, tmp_path: Path) -> None:
    text = COMPOSE.read_text(encoding="utf8")
    assert right in text
    assert refuses(SCHEMA, text.replace(right, wrong), tmp_path)


def test_the_services_of_the_compose_file_fit_the_image_and_this_ray() -> None:
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf8"))["services"]
    build = services["head"]["build"]
    assert (COMPOSE.parent / build["context"] / build["dockerfile"]).resolve() == DOCKERFILE
    assert (build["target"], "FROM", "base AS cpu") in instructions()
    known = {rest.partition("=")[0] for target, name, rest in instructions() if name == "ARG" and target != "gpu"}
    assert set(build["args"]) <= known
    for service in services.values():
        check_ray_start(service["command"])
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert [volume.partition(":")[0] for volume in service["volumes"]] == ["runs"]
    with pytest.raises(RefusedError):
        check_ray_start(services["head"]["command"].replace("--num-cpus", "--num-cpu"))
