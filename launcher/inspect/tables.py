"""Tables of an inspected path."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from cl_dist.config import Tree
from launcher.inspect.contents import OK


def tables(document: Tree, with_tensors: bool = False) -> Iterator[Table | str]:
    """Yield tables and lines of text that describe an inspected path; the tensors of stages and runs come on demand."""
    if document["what"] == "tensors":
        digest = {OK: "matches its manifest", "unknown": "no manifest"}.get(document["digest"], "damaged")
        yield f"{document['path']}: {document['bytes']:,} bytes, {document['state']} ({digest})"
        yield _groups_table(document["path"], document["groups"])
    elif document["what"] == "stage":
        yield from _stage_tables(document)
    else:
        yield from _run_tables(document)
    yield from _plugin_tables(document)
    for title, found in _tensor_groups(document):
        if with_tensors:
            yield _groups_table(title, found)
        else:
            count, size = (sum(line[key] for line in found) for key in ("count", "bytes"))
            yield f"{title}: {count:,} tensors, {size:,} bytes; --tensors lists them"


def _plugin_tables(document: Tree) -> Iterator[Table | str]:
    plugin = document.get("plugins")
    if plugin and "unknown" in plugin:
        yield f"plugins: {plugin['unknown']}"
    elif plugin:
        yield (
            f"plugins: {plugin['tensors']} tensors, {plugin['elements']:,} elements, {plugin['bytes']:,} bytes; "
            f"{plugin['bytes_per_rank']:,} bytes on each of {plugin['workers']} worker(s) at ZeRO stage "
            f"{plugin['zero_stage']}"
        )
    if found := document["masks"]:
        of = "" if found["units"] is None else f" of {found['units']:,}"
        table = Table("task", "units used", "not used before", title=f"masks: {found['used']:,}{of} units in use")
        for line in found["tasks"]:
            table.add_row(str(line["task"]), f"{line['used']:,}", f"{line['new']:,}")
        yield table


def _tensor_groups(document: Tree) -> Iterator[tuple[str, Sequence[Tree]]]:
    """Yield title and tensors of each model in a stage or run."""
    if document["what"] == "run" and document["model"]:
        yield f"model after {document['model']}", document["groups"]
    elif document["what"] == "stage":
        yield from document.get("tensors", {}).items()


def _stage_tables(document: Tree) -> Iterator[Table | str]:
    yield f"{document['stage']}: {document['kind']}, {document['state']}"
    if document["kind"] is None:
        return
    yield f"fingerprint {document['fingerprint']}, started {document['started']}, {document['seconds']} s"
    for name, fingerprint in document["inputs"].items():
        yield f"made from {name} {fingerprint}"
    table = Table("file", "bytes", "state")
    for file in document["files"]:
        table.add_row(file["name"], "-" if file["bytes"] is None else f"{file['bytes']:,}", file["state"])
    yield table


def _run_tables(document: Tree) -> Iterator[Table | str]:
    yield f"{document['run']}: {document['method']}, {document['bytes']:,} bytes in stages, {document['state']}"
    table = Table("stage", "kind", "fingerprint", "started", "seconds", "inputs", "bytes", "state")
    for stage in document["stages"]:
        size = f"{sum(file['bytes'] or 0 for file in stage['files']):,}"
        what = (str(stage["kind"]), str(stage["fingerprint"])[:12], str(stage["started"]), str(stage["seconds"]))
        table.add_row(stage["stage"], *what, ", ".join(stage["inputs"]) or "-", size, stage["state"])
    yield table
    for name in document["unfinished"]:
        yield f"unfinished: {name}"
    if document["baselines"]:
        yield f"baselines, each a run of its own: {', '.join(document['baselines'])}"


def _groups_table(title: str, found: Sequence[Tree]) -> Table:
    table = Table(title=title)
    for heading in ("tensors", "shape", "type", "count", "bytes"):
        table.add_column(heading, justify="right" if heading in ("count", "bytes") else "left")
    for line in found:
        shape = " x ".join(map(str, line["shape"])) or "-"
        table.add_row(line["name"], shape, line["dtype"], str(line["count"]), f"{line['bytes']:,}")
    table.add_section()
    total = (str(sum(line["count"] for line in found)), f"{sum(line['bytes'] for line in found):,}")
    table.add_row("all", "", "", *total)
    return table
