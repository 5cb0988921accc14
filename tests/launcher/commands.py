"""`cl-dist` for tests: in this process, or in one of its own."""

import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from launcher.cli import main

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "deepspeed", "ray", "cl_dist.dispatch_ray")
PROGRAM = """
import json, sys
from launcher.cli import main
try:
    main()
finally:
    print(json.dumps([name for name in sys.argv[0].split(",") if name in sys.modules]), file=sys.stderr)
"""
TASKS = ("food", "film")
BASELINES = {"individual": {"method": {"name": "individual"}}, "plain": {"method": {"name": "sequential"}}}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """`cl-dist` in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self._capture, self._patch = capture, patch

    def __call__(self, *args: object, stdin: bytes = b"") -> Ended:
        self._patch.setattr(sys, "argv", ["cl-dist", *map(str, args)])
        self._patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        self._capture.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        out, err = self._capture.readouterr()
        return Ended(code, out, err)


def save_run(path: Path, tree: Any) -> Path:
    path.write_text(yaml.safe_dump(tree), encoding="utf8")
    return path


def fresh(*args: object, cwd: Path) -> tuple[Ended, list[str]]:
    """Return how `cl-dist` ended in a process of its own, and which of the HEAVY modules it had imported."""
    program = f"import sys; sys.argv[0] = {','.join(HEAVY)!r}\n{PROGRAM}"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    *err, modules = done.stderr.splitlines()
    return Ended(done.returncode, done.stdout, "\n".join(err)), json.loads(modules)


def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return when each result of a run was written, and its bytes."""
    stages = sorted(folder.rglob("stages/**/*"))
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in stages if p.is_file()}
