"""What `cl-dist inspect` says of a finished CTR run; expected numbers are counted by safetensors and torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cl_dist.errors import CheckpointError
from cl_dist.models.plugin import unpack
from cl_dist.stages.weights import ShardedWeights
from launcher.inspect.tensors import groups, read_header, read_weights
from tests.launcher.commands import Cli, fresh

STAGES = ["00-food/evaluate", "00-food/train", "01-film/evaluate", "01-film/train"]


@pytest.fixture
def run(finished: Path) -> Path:
    return finished / "runs" / "tiny"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def manifest(stage: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((stage / "manifest.json").read_text("utf8"))
    return found


def plugin_tensors(*files: Path) -> dict[str, torch.Tensor]:
    """Return what the method has put into the backbone: its own backbone is frozen, so all that is stored of it."""
    return {name: tensor for file in files for name, tensor in load_file(file).items() if name.startswith("backbone.")}


# -------------------------------------------------------------------------------------------------------------- files


def test_a_header_tells_what_safetensors_loads(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).reshape(2, 3), "b": torch.ones((), dtype=torch.bfloat16), "c": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "x.safetensors", {"made": "by hand"})
    header = read_header(tmp_path / "x.safetensors")
    assert {name: (t.dtype, t.shape, t.elements, t.size) for name, t in header.items()} == {
        "a": ("I64", (2, 3), 6, 48),
        "b": ("BF16", (), 1, 2),
        "c": ("F32", (0, 4), 0, 0),
    }
    data = (tmp_path / "x.safetensors").read_bytes()
    assert data[header["a"].start :][:48] == bytes(tensors["a"].numpy().tobytes())


@pytest.mark.parametrize("length", [0, 5, 40, -1, 1000])
def test_a_file_of_another_length_than_its_header_says_is_damaged(tmp_path: Path, length: int) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(8)}, path)
    data = path.read_bytes()
    path.write_bytes(data + b"\0" * 9 if length == 1000 else data[:length])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged: "):
        read_header(path)


def test_tensors_are_grouped_where_numbers_alone_tell_them_apart(tmp_path: Path) -> None:
    shapes = {
        "layer.0.fc1": (2, 3),
        "layer.1.fc1": (2, 3),
        "layer.0.fc2": (3, 2),
        "layer.1.fc2": (3, 2),
        "head.0": (2,),
    }
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "x.safetensors")
    found = groups(read_header(tmp_path / "x.safetensors"))
    assert [tuple(group[key] for key in ("name", "shape", "dtype", "count", "bytes")) for group in found] == [
        ("head.0", [2], "F32", 1, 8),
        ("layer.*.fc1", [2, 3], "F32", 2, 48),
        ("layer.*.fc2", [3, 2], "F32", 2, 48),
    ]


def test_a_stored_file_is_held_against_the_manifest_beside_it(cli: Cli, run: Path, tmp_path: Path) -> None:
    weights = run / "stages/01-film/train/trainable.safetensors"
    document = cli("inspect", weights, "--json").json()
    assert (document["what"], document["state"], document["digest"]) == ("tensors", "OK", "OK")
    tensors = load_file(weights)
    assert sum(group["count"] for group in document["groups"]) == len(tensors)
    assert sum(group["bytes"] for group in document["groups"]) == sum(t.numel() * 4 for t in tensors.values())
    lone = shutil.copyfile(weights, tmp_path / "lone.safetensors")
    document = cli("inspect", lone, "--json").json()
    assert (document["state"], document["digest"]) == ("OK", "unknown")
    assert "OK (no manifest)" in cli("inspect", lone).out


def pieces(folder: Path, ranks: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors as a gang under ZeRO does: flat pieces, and their places in the header's metadata."""
    for rank in range(ranks):
        flat, places = {}, {}
        for name, tensor in tensors.items():
            size = -(-tensor.numel() // ranks)
            flat[name] = tensor.flatten()[rank * size : (rank + 1) * size].clone()
            places[name] = list(tensor.shape), rank * size
        path = folder / f"trainable-{rank:05d}-of-{ranks:05d}.safetensors"
        save_file(flat, path, metadata={"places": json.dumps(places)})


def test_pieces_that_a_gang_has_written_count_as_the_tensors_they_make_up(tmp_path: Path) -> None:
    tensors = {"layer.0.fc1": torch.zeros(2, 3), "layer.1.fc1": torch.zeros(2, 3), "norm": torch.zeros(5)}
    pieces(tmp_path, 4, tensors)
    assert groups(read_weights(tmp_path)) == [
        {"name": "layer.*.fc1", "shape": [2, 3], "dtype": "F32", "count": 2, "bytes": 48},
        {"name": "norm", "shape": [5], "dtype": "F32", "count": 1, "bytes": 20},
    ]
    assert dict(ShardedWeights(tmp_path)).keys() == tensors.keys()  # what loads them reads the same files
    (tmp_path / "trainable-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="3 parts of it, which are not all"):
        read_weights(tmp_path)


def test_pieces_with_a_gap_are_damage(tmp_path: Path) -> None:
    pieces(tmp_path, 2, {"norm": torch.zeros(6)})
    cut = {"norm": torch.zeros(2)}
    path = tmp_path / "trainable-00001-of-00002.safetensors"
    save_file(cut, path, metadata={"places": json.dumps({"norm": [[6], 3]})})
    with pytest.raises(CheckpointError, match="norm: 5 of 6 elements are stored"):
        read_weights(tmp_path)


# ------------------------------------------------------------------------------------------------------ stages, runs


def test_a_stage_tells_what_it_was_made_from_and_holds(cli: Cli, run: Path) -> None:
    folder = run / "stages/01-film/train"
    document = cli("inspect", folder, "--json").json()
    kept = manifest(folder)
    assert (document["what"], document["stage"], document["kind"]) == ("stage", "01-film/train", "train")
    assert [document[key] for key in ("fingerprint", "started", "seconds")] == [
        kept[key] for key in ("fingerprint", "started", "seconds")
    ]
    assert document["inputs"] == {"00-food/train": manifest(run / "stages/00-food/train")["fingerprint"]}
    assert {file["name"]: file["bytes"] for file in document["files"]} == {
        name: (folder / name).stat().st_size for name in kept["files"]
    }
    assert {file["state"] for file in document["files"]} == {"OK"}
    assert document["tensors"].keys() == {"trainable", "learner.safetensors"}
    own = plugin_tensors(folder / "trainable.safetensors")
    assert document["plugins"]["bytes"] == sum(tensor.numel() * 4 for tensor in own.values())
    table = cli("inspect", folder).out
    assert "01-film/train: train, OK" in table
    assert f"made from 00-food/train {document['inputs']['00-food/train']}" in table


def test_masks_are_counted_as_the_model_reads_them(cli: Cli, run: Path) -> None:
    folder = run / "stages/01-film/train"
    widths = {"mask1": 24, "mask2": 32}  # tsm_size of tiny.CTR, and the width of the tiny model
    stored = load_file(folder / "learner.safetensors")
    whole = [unpack(bits, widths[name.rpartition(".")[2]]) for name, bits in stored.items()]
    found = cli("inspect", folder, "--json").json()["masks"]
    assert len(whole) == 2 * 2 * 2  # two masks behind two sub-blocks in two layers
    assert found == {
        "units": sum(mask_TU.shape[1] for mask_TU in whole),
        "used": sum(int(mask_TU.any(0).sum()) for mask_TU in whole),
        "tasks": [
            {
                "task": task,
                "used": sum(int(mask_TU[task].sum()) for mask_TU in whole),
                "new": sum(int((mask_TU[task] & ~mask_TU[:task].any(0)).sum()) for mask_TU in whole),
            }
            for task in range(2)
        ],
    }
    assert f"masks: {found['used']:,} of {found['units']:,} units in use" in cli("inspect", folder).out


def test_a_run_tells_of_its_stages_and_of_its_last_model(cli: Cli, run: Path) -> None:
    document = cli("inspect", run, "--json").json()
    assert (document["what"], document["run"], document["method"], document["state"]) == ("run", "tiny", "ctr", "OK")
    assert [stage["stage"] for stage in document["stages"]] == STAGES
    assert document["baselines"] == ["individual", "plain"]
    assert document["model"] == "01-film/train"
    files = [run / "stages" / key / "trainable.safetensors" for key in ("00-food/train", "01-film/train")]
    elements = sum(tensor.numel() for tensor in plugin_tensors(*files).values())
    assert document["plugins"]["elements"] == elements
    assert document["plugins"]["bytes"] == document["plugins"]["bytes_per_rank"] == 4 * elements
    whole = {name for file in files for name in load_file(file)}
    assert sum(group["count"] for group in document["groups"]) == len(whole)
    assert len(document["masks"]["tasks"]) == 2
    table = cli("inspect", run).out
    assert "unfinished" not in table
    assert all(key in table for key in STAGES)


@pytest.mark.parametrize(("zero_stage", "shares"), [(2, 1), (3, 3)])
def test_a_rank_holds_its_share_of_every_plugin_tensor_under_zero_3(
    cli: Cli, copy: Path, zero_stage: int, shares: int
) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text("utf8"))
    config["cluster"] = {"workers": 3, "zero_stage": zero_stage}
    (copy / "config.yaml").write_text(yaml.safe_dump(config), "utf8")
    files = [copy / "stages" / key / "trainable.safetensors" for key in ("00-food/train", "01-film/train")]
    expected = sum((tensor.numel() + shares - 1) // shares * 4 for tensor in plugin_tensors(*files).values())
    found = cli("inspect", copy, "--json").json()["plugins"]
    assert (found["workers"], found["zero_stage"], found["bytes_per_rank"]) == (3, zero_stage, expected)
    assert f"{expected:,} bytes on each of 3 worker(s) at ZeRO stage {zero_stage}" in cli("inspect", copy).out


def test_a_method_that_tunes_the_backbone_has_no_plugins(cli: Cli, run: Path) -> None:
    document = cli("inspect", run / "baselines" / "plain", "--json").json()
    assert (document["plugins"], document["masks"]) == (None, None)
    assert document["groups"]


def test_plugins_are_not_guessed_where_the_backbone_is_not_at_hand(cli: Cli, copy: Path) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text("utf8"))
    config["science"]["model"]["source"] = "somebody/not-downloaded"
    (copy / "config.yaml").write_text(yaml.safe_dump(config), "utf8")
    (reason,) = cli("inspect", copy, "--json").json()["plugins"].values()
    assert reason.startswith("the backbone 'somebody/not-downloaded' is not on this machine")
    assert f"plugins: {reason}" in cli("inspect", copy).out


def test_nothing_heavy_is_imported(run: Path) -> None:
    ended, modules = fresh("inspect", run, "--json", cwd=run)
    assert (ended.code, modules) == (0, []), ended.err


def test_a_path_that_holds_nothing_of_ours_is_refused(cli: Cli, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.safetensors"):
        ended = cli("inspect", path)
        assert ended.code == 2
        assert "expected a run folder (with config.yaml in it), a finished stage's folder" in ended.err


# ------------------------------------------------------------------------------------------------------------- damage


def flipped(run: Path) -> str:
    path = run / "stages/00-food/train/trainable.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    return f"{path}: damaged; remove the folder {path.parent}"


def gone(run: Path) -> str:
    path = run / "stages/01-film/evaluate/scores.json"
    path.unlink()
    return f"{path}: missing; remove the folder {path.parent}"


def edited(run: Path) -> str:
    path = run / "stages/01-film/train/manifest.json"
    path.write_text(path.read_text("utf8").replace('"seed": 0', '"seed": 1'), "utf8")
    return f"{path}: damaged: its fingerprint does not match its facts"


def half_written(run: Path) -> str:
    path = run / "stages/01-film/train/manifest.json"
    path.write_text(path.read_text("utf8")[:100], "utf8")
    return f"{path}: damaged: "


def of_another_run(run: Path) -> str:
    shutil.rmtree(run / "stages/00-food/train")
    shutil.copytree(run / "baselines/plain/stages/00-food/train", run / "stages/00-food/train")
    return f"{run / 'stages/01-film/train'}: was made from a different 00-food/train"


def without_its_predecessor(run: Path) -> str:
    shutil.rmtree(run / "stages/00-food/train")
    return f"{run / 'stages/01-film/train'}: was made from 00-food/train, which is missing"


@pytest.mark.parametrize("spoil", [flipped, gone, edited, half_written, of_another_run, without_its_predecessor])
def test_damage_is_named_and_exits_6(cli: Cli, copy: Path, spoil: Any) -> None:
    message = spoil(copy)
    ended = cli("inspect", copy)
    assert ended.code == 6
    assert message in ended.err
    assert "Traceback" not in ended.err
    assert "01-film/evaluate" in ended.out  # what is whole is shown
    ended = cli("inspect", copy, "--json")
    assert ended.code == 6
    assert ended.json()["state"] == "damaged"
    assert any(message in fault for fault in ended.json()["faults"])


def test_damage_is_named_for_a_stage_and_for_a_file_too(cli: Cli, copy: Path) -> None:
    message = flipped(copy)
    stage = copy / "stages/00-food/train"
    for path, expected in ((stage, message), (stage / "trainable.safetensors", "its digest differs")):
        ended = cli("inspect", path)
        assert ended.code == 6
        assert expected in ended.err
        assert "damaged" in ended.out
    (stage / "learner.safetensors").write_bytes(b"short")
    ended = cli("inspect", stage / "learner.safetensors", "--json")
    assert ended.code == 6
    assert "no safetensors header" in ended.json()["faults"][0]


def test_an_unfinished_stage_is_named_and_is_no_damage(cli: Cli, copy: Path) -> None:
    (copy / "stages/01-film/train").rename(copy / "stages/01-film/train.partial-0123456789ab")
    (copy / "stages/01-film/train.partial-0123456789ab/manifest.json").unlink()
    shutil.rmtree(copy / "stages/01-film/evaluate")
    ended = cli("inspect", copy, "--json")
    assert ended.code == 0
    assert ended.json()["unfinished"] == ["01-film/train.partial-0123456789ab"]
    assert ended.json()["model"] == "00-food/train"
    assert "unfinished: 01-film/train.partial-0123456789ab" in cli("inspect", copy).out
