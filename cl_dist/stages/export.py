"""Export of a trained model as a self-contained folder: no run, no data, no pickle.

A classifier: backbone/ has the backbone with its trained weights, parts.safetensors every tensor added by the method
and the learner's state, cl_dist.json how to combine the two (see `Card`). config.json names an architecture unknown to
transformers, so that its Auto classes and pipelines refuse the folder, instead of predicting with a new head on a
backbone without its parts.

    model, tokenizer, labels = load_exported(folder)
    logits_BK = model(tokenizer(texts, padding=True, truncation=True, return_tensors="pt"))

A language model does not need cl-dist: AutoModelForCausalLM and AutoTokenizer load it, and it continues a text rendered
by the tokenizer's chat template (see export_text), or generates a sample after "<task-0>".
README.md of the folder shows how to load it.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cl_dist.config import Section, did_you_mean, parse
from cl_dist.data.language import TextCodec
from cl_dist.errors import CheckpointError, ConfigError
from cl_dist.learners.base import Learner
from cl_dist.ledger import write_json, write_text
from cl_dist.methods import get_method
from cl_dist.models.backbone import load_backbone, load_tokenizer, lower
from cl_dist.models.causal import CausalModel
from cl_dist.models.config import ModelConfig
from cl_dist.parallel.seeds import seeded
from cl_dist.stage import Evaluate
from cl_dist.stages.build import build_learner, new_learner, writes_text
from cl_dist.stages.export_text import Example, count_mismatches, generation, text_tokenizer
from cl_dist.stages.model_card import class_card, text_card
from cl_dist.stages.stage_job import Job, task_data

log = logging.getLogger(__name__)
CARD, PARTS, README, BACKBONE = "cl_dist.json", "parts.safetensors", "README.md", "backbone"
MODEL_TYPE = "cl_dist (load it with cl_dist.load_exported; see README.md)"
"""Shown by transformers when it refuses a folder."""
EXAMPLES = 100
"""Train rows of each task on which the chat template is compared with the layout of training."""
_MODEL, _LEARNER = "model.", "learner."


class ExportedTask(Section):
    """A task of the model."""

    id: str
    labels: tuple[str, ...]
    """Class k of the logits is labels[k]."""
    max_length: int
    """Length to which inputs were truncated."""
    is_answered: bool
    """Whether the model can be used for this task; if not, its parts are untrained placeholders."""


class Card(Section):
    """Contents of cl_dist.json."""

    format_version: Literal[1, 2] = 2
    """1: a classifier's backbone is in the folder itself."""
    task: int
    """Index in `tasks` of the exported task."""
    tasks: tuple[ExportedTask, ...] = Field(min_length=1)
    """In learned order."""
    method: dict[str, Any]
    output: Literal["classifier", "lm"] = "classifier"
    pooling: Literal["mean", "cls", "pooler", "last"] | None
    dtype: Literal["float32", "bfloat16"]
    """Precision of the forward pass; the files are float32."""
    dropout: float
    weight_bits: Literal[4, 8] | None = None
    """The files are not quantized; weights are quantized on loading."""
    seed: int
    fingerprint: str
    """Fingerprint of the model's Train stage."""


def export(job: Job, task: int, folder: Path, fingerprint: str) -> None:
    """Write the model of an Evaluate stage's job to a folder; its card is written last and required for loading.

    Raises:
        ConfigError: If the folder exists and is not empty.
    """
    assert isinstance(job.stage, Evaluate)
    check_free(folder)
    learner = build_learner(job)
    card = Card(
        task=task,
        tasks=tuple(
            ExportedTask(
                id=config.id,
                labels=task_data(job, number).labels,
                max_length=job.max_length[number],
                is_answered=number in job.stage.tasks,
            )
            for number, config in enumerate(job.tasks)
        ),
        method=job.method.model_dump(mode="json"),  # with its defaults, which another version may change
        output=get_method(job.method.name).output(job.model.output),
        pooling=job.model.pooling,
        dtype=job.model.dtype,
        dropout=job.model.dropout,
        weight_bits=job.model.weight_bits,
        seed=job.seed,
        fingerprint=fingerprint,
    )
    tokenizer = load_tokenizer(job.model)
    if writes_text(job.method, job.model):
        assert isinstance(learner.model, CausalModel)
        _export_text(job, card, learner.model, tokenizer, folder)
        return
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs.pop("name_or_path", None)
    if tokenizer.pad_token is None and tokenizer.all_special_tokens:
        # Padding is masked, so any special token will do; a normal token, such as id 0, would be split off in texts.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.all_special_tokens[0]
    untrained, backbone_names = _untrained(card, job.model)
    weights = untrained.model.state_dict().keys()  # without masks of finished tasks, which are the learner's state
    found = learner.model.state_dict().items()
    tensors = {name: tensor.detach().cpu() for name, tensor in found if name in weights}
    plain = job.model.model_copy(update={"weight_bits": None})
    backbone = load_backbone(plain)  # without the method's modules
    backbone.load_state_dict({inner: tensors[name] for name, inner in backbone_names.items()}, strict=False)
    parts = {_MODEL + name: tensor for name, tensor in tensors.items() if name not in backbone_names}
    parts |= {_LEARNER + name: tensor.cpu() for name, tensor in learner.state_dict().items()}

    _save(backbone, folder / BACKBONE)
    tokenizer.save_pretrained(folder)
    save_file({name: tensor.clone().contiguous() for name, tensor in parts.items()}, folder / PARTS)
    labels = card.tasks[task].labels
    names = {"id2label": dict(enumerate(labels)), "label2id": {name: number for number, name in enumerate(labels)}}
    write_json(folder / "config.json", {"model_type": MODEL_TYPE, "architectures": ["ClDistClassifier"], **names})
    ids = [known.id for known in card.tasks]
    answered = [known.id for known in card.tasks if known.is_answered]
    write_text(folder / README, class_card(job.method.name, ids[task], ids, labels, answered))
    write_json(folder / CARD, card.model_dump(mode="json"))


def _save(backbone: PreTrainedModel, folder: Path) -> None:
    backbone.config._name_or_path = ""  # a path of this machine
    folder.mkdir(parents=True, exist_ok=True)
    backbone.save_pretrained(folder)


def _export_text(job: Job, card: Card, model: CausalModel, source: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a language model as a plain causal language model."""
    from cl_dist.models.lowrank import merge_updates  # peft takes seconds to import

    codec = TextCodec(source)
    data = {known.id: task_data(job, number) for number, known in enumerate(card.tasks) if known.is_answered}
    examples = [
        Example(row, rows.question)
        for rows in data.values()
        for row in rows.train[:: max(1, len(rows.train) // EXAMPLES)]
    ]
    asked = card.tasks[card.task].id
    tokenizer = text_tokenizer(source, len(card.tasks), job.model.spare_task_tokens, data[asked].question, examples)
    longest = max(max(codec.lengths(sorted({row.label for row in rows.train}))) for rows in data.values())
    merge_updates(model.backbone)
    special, config = codec.special, model.backbone.config
    config.eos_token_id, config.pad_token_id, config.bos_token_id = special.eos, special.pad, None
    model.backbone.generation_config = generation(special, longest)
    _save(model.backbone, folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # a name that older versions of transformers know too
    write_json(settings, json.loads(settings.read_text("utf8")) | {"tokenizer_class": "PreTrainedTokenizerFast"})

    stored: Any = load_tokenizer(ModelConfig(source=str(folder.absolute())))
    wrong = count_mismatches(stored, codec, examples)
    if wrong:
        log.warning(
            "export task=%s rows=%d mismatches=%d: tokens of the chat template differ from training; see %s",
            *(asked, len(examples), wrong, folder / README),
        )
    ans, eos, gen = stored.convert_ids_to_tokens([special.ans, special.eos, special.task(card.task)])
    prompt = stored.apply_chat_template([{"role": "user", "content": "a text"}], tokenize=False)
    write_text(
        folder / README,
        text_card(
            job.method.name,
            asked,
            [known.id for known in card.tasks],
            {name: rows.question for name, rows in data.items()},
            prompt,
            (ans, eos, gen),
            (card.tasks[card.task].max_length, longest + 1),
            (wrong, len(examples)),
        ),
    )
    write_json(folder / CARD, card.model_dump(mode="json"))


def check_free(folder: Path) -> None:
    """Raise ConfigError unless an export may be written to a folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"DIR={str(folder)!r}: exists and is not an empty folder; choose another one, or remove it")


def load_exported(folder: Path | str, task: str | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase, list[str]]:
    """Load an exported classifier and return (model, tokenizer, labels).

    model maps a batch (input_ids, attention_mask, token_type_ids if the tokenizer returns them) to logits (B, K), and
    labels[k] is class k. On the same batch the logits are bit-equal to those of the run.

    Args:
        folder: A folder written by `cl-dist export`.
        task: Id of another task that the model has learned; None uses the exported one.

    Raises:
        CheckpointError: If a file is missing, damaged or of another version.
        ConfigError: If the model is a language model, or has not learned the task.
    """
    folder = Path(folder)
    card = _read_card(folder)
    if card.output == "lm":
        raise ConfigError(
            f"{folder}: this is a language model; load it with AutoModelForCausalLM and AutoTokenizer of transformers, "
            f"and render its prompts with apply_chat_template (see {README} in the folder)"
        )
    answered = {known.id: number for number, known in enumerate(card.tasks) if known.is_answered}
    if task is not None and task not in answered:
        raise ConfigError(f"task={task!r}: this model has not learned it{did_you_mean(task, list(answered))}")
    number = card.task if task is None else answered[task]

    config = ModelConfig(
        source=str((folder if card.format_version == 1 else folder / BACKBONE).absolute()),
        dtype=card.dtype,
        dropout=card.dropout,
        pooling=card.pooling,
        weight_bits=card.weight_bits,
    )
    try:
        parts = load_file(folder / PARTS)
        learner, backbone_names = _untrained(card, config)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error
    model = learner.model
    own = {name.removeprefix(_MODEL): tensor for name, tensor in parts.items() if name.startswith(_MODEL)}
    if wrong := own.keys() ^ (model.state_dict().keys() - backbone_names.keys()):
        raise CheckpointError(f"{folder / PARTS}: does not fit this model, see {min(wrong)!r}; export the run again")
    try:
        model.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / PARTS}: does not fit this model: {error}") from error
    if state := {name.removeprefix(_LEARNER): tensor for name, tensor in parts.items() if name.startswith(_LEARNER)}:
        learner.load_state_dict(state)
    model = model.eval()
    if card.dtype == "bfloat16":
        lower(model)
    learner.activate(number)
    tokenizer = load_tokenizer(ModelConfig(source=str(folder.absolute())))
    tokenizer.model_max_length = card.tasks[number].max_length
    return model, tokenizer, list(card.tasks[number].labels)


def _read_card(folder: Path) -> Card:
    path = folder / CARD
    try:
        tree = json.loads(path.read_text(encoding="utf8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; expected a folder written by `cl-dist export`") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if version not in (1, 2):
        raise CheckpointError(f"{path}: format_version={version!r}: this version of cl-dist reads 1 and 2")
    try:
        return parse(Card, tree)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _untrained(card: Card, model: ModelConfig) -> tuple[Learner, dict[str, str]]:
    """Return an untrained learner for a card, and the backbone's tensors in its model.

    The latter map names in the model to names in the backbone. Methods wrap modules and so rename tensors; they are
    identified by object identity.
    """
    name = str(card.method.get("name"))
    method = parse(get_method(name).config, card.method, "method.")
    learner = new_learner(method, model, tuple(len(task.labels) for task in card.tasks), card.seed)
    with seeded(card.seed, "build", card.tasks[-1].id):  # as in a run: some random initial values are never trained
        backbone = load_backbone(model, causal=writes_text(method, model))
        inner: dict[str, Tensor] = backbone.state_dict(keep_vars=True)  # keep references, so that ids stay unique
        outer: dict[str, Tensor] = learner.build(backbone, len(card.tasks) - 1).state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in inner.items()}
    return learner, {name: names[id(tensor)] for name, tensor in outer.items() if id(tensor) in names}
