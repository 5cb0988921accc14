"""An exported folder gives the run's logits to the bit, whatever the method; every entry of METHODS is exported,
and what writes answers as a plain language model."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    pipeline,
)

from cl_dist.config import parse
from cl_dist.contract import tiny
from cl_dist.data.classify import ClassifyRows
from cl_dist.errors import CheckpointError, ConfigError
from cl_dist.methods import METHODS
from cl_dist.models.backbone import load_backbone, load_tokenizer
from cl_dist.models.classifier import Batch
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import Evaluate
from cl_dist.stages.build import build_learner
from cl_dist.stages.export import BACKBONE, CARD, PARTS, README, export, load_exported
from cl_dist.stages.predict import Predictor
from cl_dist.stages.stage_job import Job
from tests.architectures import TINY

TASKS = ("food", "topic")


def compute(folder: Path, name: str) -> Run:
    """Compute a run of a method over two tasks, with the sizes of tiny.CTR where the method has such settings."""
    fields = METHODS[name].config.model_fields
    method = {key: value for key, value in tiny.CTR.items() if key in fields} | {"name": name}
    over = {"science": {"method": method, "train": {"epochs": 1, "min_round_steps": 1}}}
    return tiny.compute(tiny.make_run(folder, over, tasks=TASKS))


def last_job(run: Run, task: int) -> Job:
    """Return the job of the stage that scored a task last."""
    stages = [stage for t in range(2) for stage in run.plan(t) if isinstance(stage, Evaluate) and task in stage.tasks]
    return run.job(stages[-1])


def batch(run: Run, job: Job, task: int) -> Batch:
    rows = ClassifyRows(load_tokenizer(job.model), job.max_length[task])
    rows.add(task, run.data(task), run.data(task).test)
    return rows.batch(range(len(rows)))


@torch.no_grad()
def logits_of_run(run: Run, job: Job, task: int) -> Tensor:
    learner = build_learner(job)
    learner.model.eval()
    if job.model.dtype == "bfloat16":
        learner.model.to(torch.bfloat16)
    learner.activate(task)
    return learner.model(batch(run, job, task))


@torch.no_grad()
def logits_of_export(run: Run, job: Job, task: int, folder: Path, ask: str | None = None) -> Tensor:
    return load_exported(folder, ask)[0](batch(run, job, task))


@pytest.mark.parametrize("name", [name for name in METHODS if not tiny.writes(name)])
def test_every_method_exported_answers_to_the_bit_as_in_its_run(name: str, tmp_path: Path) -> None:
    run = compute(tmp_path / "run", name)
    for task, labels in enumerate((["bad", "good"], ["garden", "kitchen", "office"])):
        job, folder = last_job(run, task), tmp_path / f"export{task}"
        export(job, task, folder, "f00d")
        expected = logits_of_run(run, job, task)
        assert expected.shape == (10, len(labels))
        assert torch.equal(logits_of_export(run, job, task, folder), expected)
        assert load_exported(folder)[2] == labels
        plain = AutoModel.from_pretrained(folder / BACKBONE)
        assert plain.config.model_type == "bert"
    files = [path for path in tmp_path.glob("export*/**/*") if path.is_file()]
    assert str(tmp_path) not in "".join(p.read_text("utf8") for p in files if p.suffix in (".json", ".md"))
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return compute(tmp_path_factory.mktemp("ctr"), "ctr")


@pytest.fixture(scope="module")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of a CTR run after its second task, exported for the first."""
    folder = tmp_path_factory.mktemp("exported")  # empty
    export(last_job(run, 0), 0, folder, "f00d")
    return folder


def test_the_other_tasks_of_the_model_can_be_asked_too(run: Run, exported: Path) -> None:
    job = last_job(run, 1)
    assert torch.equal(logits_of_export(run, job, 1, exported, "topic"), logits_of_run(run, job, 1))
    with pytest.raises(ConfigError, match=r"task='fod': this model has not learned it; did you mean 'food'"):
        load_exported(exported, "fod")


def test_a_model_of_one_task_alone_answers_for_no_other(tmp_path: Path) -> None:
    run = compute(tmp_path / "run", "individual")
    export(last_job(run, 1), 1, tmp_path / "x", "f00d")
    with pytest.raises(ConfigError, match=r"task='food': this model has not learned it"):
        load_exported(tmp_path / "x", "food")


def test_a_frozen_backbone_is_exported_as_it_came_and_a_tuned_one_as_it_is(
    run: Run, exported: Path, tmp_path: Path
) -> None:
    source = load_backbone(run.config.science.model).state_dict()
    frozen = AutoModel.from_pretrained(exported / BACKBONE).state_dict()
    assert all(torch.equal(frozen[name], tensor) for name, tensor in source.items())

    tuned_book = compute(tmp_path / "run", "sequential")
    job = last_job(tuned_book, 1)
    export(job, 1, tmp_path / "x", "f00d")
    tuned = AutoModel.from_pretrained(tmp_path / "x" / BACKBONE).state_dict()
    expected = {name: tensor for name, tensor in build_learner(job).model.state_dict().items() if "backbone." in name}
    assert all(torch.equal(tuned[name.removeprefix("backbone.")], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(tuned[name], tensor) for name, tensor in source.items())
    assert {name.split(".")[1] for name in load_file(tmp_path / "x" / PARTS)} == {"heads"}


def test_the_precision_of_the_run_is_kept(run: Run, tmp_path: Path) -> None:
    job = last_job(run, 1)
    job = replace(job, model=job.model.updated({"dtype": "bfloat16"}))
    export(job, 1, tmp_path / "x", "f00d")
    found = logits_of_export(run, job, 1, tmp_path / "x")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, logits_of_run(run, job, 1))
    assert {tensor.dtype for tensor in load_file(tmp_path / "x" / BACKBONE / "model.safetensors").values()} == {
        torch.float32
    }


def test_the_tokenizer_cuts_where_the_run_did(exported: Path) -> None:
    model, tokenizer, labels = load_exported(exported)
    encoded = tokenizer(["the cake " * 20, "the soup"], padding=True, truncation=True, return_tensors="pt")
    assert encoded["input_ids"].shape == (2, 16)
    assert model(encoded).shape == (2, len(labels))
    assert AutoTokenizer.from_pretrained(exported).model_max_length == 32


@pytest.mark.parametrize("end", [None, "[SEP]"])
def test_a_decoder_whose_tokenizer_does_not_pad_is_given_texts_of_any_length(tmp_path: Path, end: str | None) -> None:
    sizes = {"model_type": "llama", **TINY["llama"], "vocab_size": len(tiny.WORDS)}
    tree = tiny.tree(tmp_path, {"science": {"train": {"epochs": 1}, "model": {"config": sizes}}}, tasks=TASKS)
    settings = tmp_path / "model" / "tokenizer_config.json"
    known = {key: value for key, value in json.loads(settings.read_text("utf8")).items() if key != "pad_token"}
    settings.write_text(json.dumps(known | ({"eos_token": end} if end else {})), "utf8")
    run = tiny.compute(Run(parse(RunConfig, tree)))
    job = last_job(run, 1)
    spelling = load_tokenizer(job.model)
    assert spelling.pad_token is None
    export(job, 1, tmp_path / "x", "f00d")
    model, tokenizer, _ = load_exported(tmp_path / "x")
    assert tokenizer.pad_token == end or (end is None and tokenizer.pad_token in spelling.all_special_tokens)
    assert len(tokenizer) == len(spelling)

    texts = [row.text for row in run.data(1).test]
    encoded = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    assert not encoded["attention_mask"].all()
    together = model(encoded).detach()
    torch.testing.assert_close(together, logits_of_run(run, job, 1))
    for number, text in enumerate(texts):
        alone = spelling(text, return_tensors="pt")
        torch.testing.assert_close(model(alone)[0].detach(), together[number])


def test_a_folder_of_the_version_before_is_still_read(run: Run, exported: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(exported, tmp_path / "x")
    for path in (folder / BACKBONE).iterdir():
        path.replace(folder / path.name)
    edited_card(folder, format_version=1)
    job = last_job(run, 0)
    assert torch.equal(logits_of_export(run, job, 0, folder), logits_of_run(run, job, 0))


def code(folder: Path) -> str:
    """Return the lines of a folder's README.md that load it, with the folder filled in."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / README).read_text("utf8"), flags=re.DOTALL)
    return str(block).replace("DIR", str(folder))


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("method", ["ctr", "adapter", "sequential"])
def test_a_classifier_is_refused_by_all_that_would_answer_without_its_parts(
    tmp_path: Path, method: str, kind: str
) -> None:
    model = {"config": {"model_type": kind, **TINY[kind], "vocab_size": len(tiny.WORDS)}} if kind != "bert" else {}
    settings = {key: value for key, value in tiny.CTR.items() if key in METHODS[method].config.model_fields}
    science = {"method": settings | {"name": method}, "train": {"epochs": 1, "min_round_steps": 1}, "model": model}
    run = tiny.compute(tiny.make_run(tmp_path / "run", {"science": science}, tasks=TASKS))
    folder = tmp_path / "exported"
    export(last_job(run, 1), 1, folder, "f00d")
    loaders: list[Any] = [
        *(AutoModel, AutoModelForSequenceClassification, AutoModelForCausalLM, AutoModelForTokenClassification),
        AutoConfig,
    ]
    chained: Any = pipeline  # its many types name tasks
    calls: list[Any] = [loader.from_pretrained for loader in loaders]
    calls += [lambda where: chained("text-classification", where), lambda where: chained(model=where)]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError), match=r"load it with cl_dist\.load_exported"):
            call(str(folder))
    plain: Any = BertForSequenceClassification if kind == "bert" else LlamaForSequenceClassification
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):  # nor is there anything to load by force
        plain.from_pretrained(folder)
    described = json.loads((folder / "config.json").read_text("utf8"))
    assert described["id2label"] == {"0": "garden", "1": "kitchen", "2": "office"}

    names: dict[str, Any] = {}
    exec(code(folder), names)
    rows = run.data(1).test
    encoded = names["tokenizer"]([row.text for row in rows], padding=True, truncation=True, return_tensors="pt")
    answers = [names["labels"][k] for k in names["model"](encoded).argmax(-1)]
    assert answers == Predictor(last_job(run, 1)).answers(1, rows)
    assert names["labels"] == list(described["id2label"].values())


def test_a_folder_that_holds_something_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "notes.txt").write_text("mine", "utf8")
    for folder in (tmp_path / "x", tmp_path / "x" / "notes.txt"):
        with pytest.raises(ConfigError, match="exists and is not an empty folder"):
            export(last_job(run, 0), 0, folder, "f00d")
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["notes.txt"]


def without_card(folder: Path) -> str:
    (folder / CARD).unlink()
    return "expected a folder written by `cl-dist export`"


def edited_card(folder: Path, **changes: Any) -> None:
    card = json.loads((folder / CARD).read_text("utf8"))
    (folder / CARD).write_text(json.dumps(card | changes), "utf8")


def of_a_later_version(folder: Path) -> str:
    edited_card(folder, format_version=3)
    return "format_version=3: this version of cl-dist reads 1 and 2"


def of_an_unknown_method(folder: Path) -> str:
    edited_card(folder, method={"name": "crt"})
    return "name='crt' is not a method; did you mean 'ctr'"


def with_a_strange_key(folder: Path) -> str:
    edited_card(folder, pool="mean")
    return "unknown key 'pool'; did you mean 'pooling'"


def cut_off(folder: Path) -> str:
    (folder / CARD).write_text("{", "utf8")
    return "cl_dist.json: damaged"


def without_parts(folder: Path) -> str:
    (folder / PARTS).unlink()
    return "cannot be loaded"


def with_a_part_missing(folder: Path) -> str:
    parts = load_file(folder / PARTS)
    del parts["model.heads.0.weight"]
    save_file(parts, folder / PARTS)
    return r"does not fit this model, see 'heads\.0\.weight'"


def with_a_part_of_another_shape(folder: Path) -> str:
    parts = load_file(folder / PARTS)
    save_file(parts | {"model.heads.0.weight": torch.zeros(5, 32)}, folder / PARTS)
    return "does not fit this model: .*heads.0.weight"


@pytest.mark.parametrize(
    "spoil",
    [
        without_card,
        of_a_later_version,
        of_an_unknown_method,
        with_a_strange_key,
        cut_off,
        without_parts,
        with_a_part_missing,
        with_a_part_of_another_shape,
    ],
)
def test_a_damaged_folder_is_refused(exported: Path, tmp_path: Path, spoil: Any) -> None:
    folder = shutil.copytree(exported, tmp_path / "x")
    message = spoil(folder)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_exported(folder)


@pytest.mark.parametrize("lora", [None, {"r": 4}])
def test_a_model_that_writes_needs_transformers_alone(tmp_path: Path, lora: Any) -> None:
    over = {"science": {"method": {**tiny.METHODS["lamol"], "lora": lora}, "train": {**tiny.TEXT_TRAIN, "lr": 0.02}}}
    run = tiny.compute(tiny.make_run(tmp_path / "run", over, tasks=("food", "film")))
    last = run.plan(1)[-1]
    assert isinstance(last, Evaluate)
    folder = tmp_path / "exported"
    export(run.job(last), 0, folder, "print")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    rows = run.data(0).test
    expected = Predictor(run.job(last)).answers(0, rows)
    assert len(set(expected)) > 1
    for row, answer in zip(rows, expected, strict=True):
        asked = tokenizer(f"{row.text} which one ? <ans>", return_tensors="pt")
        written = model.generate(**asked)[0, asked["input_ids"].shape[1] :]
        assert written[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(written, skip_special_tokens=True).strip() == answer
    with pytest.raises(ConfigError, match="load it with AutoModelForCausalLM"):
        load_exported(folder)
