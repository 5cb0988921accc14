"""A pytest plugin: in CI a test may only skip for a reason that `allowed_skips.txt` names.

A skip is how a test silently stops proving anything, so each one that CI accepts stands in a reviewed file.
"""

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest


def read_allowed(path: Path) -> list[tuple[str, str]]:
    """Return (glob of node ids, part of the reason) for each line of the form `glob :: reason`."""
    allowed = []
    for number, line in enumerate(path.read_text(encoding="utf8").splitlines(), start=1):
        if line.strip() and not line.startswith("#"):
            glob, separator, reason = line.partition(" :: ")
            if not separator or not reason.strip():
                raise pytest.UsageError(f"{path}:{number}: expected `glob of node ids :: part of the reason`")
            allowed.append((glob.strip(), reason.strip()))
    return allowed


class SkipGate:
    """Collects the skips of a run and fails the run if one of them is not allowed."""

    def __init__(self, allowed: list[tuple[str, str]]) -> None:
        self.allowed = allowed
        self.refused: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not hasattr(report, "wasxfail"):  # an expected failure reads as skipped too
            self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.refused and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.refused:
            terminalreporter.section("skips that tests/allowed_skips.txt does not allow", red=True)
            for line in self.refused:
                terminalreporter.line(line)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped:
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(fnmatchcase(report.nodeid, glob) and part in reason for glob, part in self.allowed):
            self.refused.append(f"{report.nodeid}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") == "true":
        allowed = read_allowed(config.rootpath / "tests" / "allowed_skips.txt")
        config.pluginmanager.register(SkipGate(allowed), "skip-gate")
