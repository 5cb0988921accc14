"""The verb `check`."""

import dataclasses

import typer

from launcher import console, runs
from launcher.cluster.preflight import preflight
from launcher.options import AsJson, Config, Overrides


def check(config: Config, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Check data, model, nodes, storage and time limits before a run starts workers.

    Exits with 4 if a check fails; with 2 if the model's settings or files are wrong.
    """
    findings = preflight(runs.read(config, overrides))
    failed = [finding for finding in findings if finding.state == "fail"]
    if as_json:
        document = {"passed": not failed, "findings": [dataclasses.asdict(finding) for finding in findings]}
        console.document(document)
    else:
        for finding in findings:
            console.out.print(f"{finding.state:4}  {finding.check:9}  {finding.where}: {finding.found}", soft_wrap=True)
            if finding.remedy:
                console.out.print(f"      -> {finding.remedy}", soft_wrap=True)
    if failed:
        raise typer.Exit(min(finding.code for finding in failed))
