"""Knowledge sharing raises the accuracy of a task that was seen before: planted answers, the real learner and engine.

Every row holds words of two concepts, each concept in one of two polarities, among fillers. Task 0 asks for the
polarity of concept 0 and task 1 for that of concept 1, with many rows; task 2 asks one of the two questions again, with
few rows. The capsule of the task that asked it knows the answer; the other one's knows about words of the same rows
that are beside the question. Each question is asked again in turn, so that recency cannot decide.
"""

from statistics import mean

import pytest
import torch

from cl_dist.learners.ctr import Ctr
from cl_dist.methods.ctr import CtrConfig
from cl_dist.models.classifier import Batch
from cl_dist.models.config import ModelConfig
from tests.encoders import WORDS, encoder, train

LENGTH, HITS, SYNONYMS, FIRST_WORD = 8, 2, 4, 5
FIRST_FILLER = FIRST_WORD + 4 * SYNONYMS
MANY, FEW, BATCH, STEPS, FEW_STEPS, SEEDS = 1000, 64, 32, 200, 40, 2
CONFIG = CtrConfig(tsm_size=64, filters=16, capsule_layers=1, sharing_lr=1e-2)


def rows(question: int, num: int, generator: torch.Generator) -> Batch:
    """Rows labelled with the polarity of the concept asked for; the other concept's is a coin of its own."""
    polarity_BC = torch.randint(0, 2, (num, 2), generator=generator)
    ids_BL = torch.randint(FIRST_FILLER, WORDS, (num, LENGTH), generator=generator)
    for row in range(num):
        places = torch.randperm(LENGTH, generator=generator)
        for concept in (0, 1):
            first = FIRST_WORD + (2 * concept + int(polarity_BC[row, concept])) * SYNONYMS
            words = first + torch.randint(0, SYNONYMS, (HITS,), generator=generator)
            ids_BL[row, places[concept * HITS : (concept + 1) * HITS]] = words
    return {
        "input_ids": ids_BL,
        "attention_mask": torch.ones_like(ids_BL),
        "label": polarity_BC[:, question],
        "row": torch.arange(num),
    }


def batches(data: Batch, steps: int, generator: torch.Generator) -> list[Batch]:
    drawn = [torch.randint(0, len(data["label"]), (BATCH,), generator=generator) for _ in range(steps)]
    return [{key: value[indices] for key, value in data.items()} for indices in drawn]


def learner_of(config: CtrConfig, num_tasks: int, seed: int) -> Ctr:
    learner = Ctr(config, (2,) * num_tasks, ModelConfig(source="."), seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        learner.build(encoder(layers=1), num_tasks - 1)
    return learner


@torch.no_grad()
def score(learner: Ctr, task: int, data: Batch, without: str | None = None) -> float:
    learner.activate(task, without)
    return (learner.model(data).argmax(-1) == data["label"]).float().mean().item()


def third_task(config: CtrConfig, seed: int) -> list[dict[str, float]]:
    """Accuracy of the third task, for each question asked again: whole, and with parts switched off."""
    generator = torch.Generator().manual_seed(seed)
    learner = learner_of(config, 2, seed)
    for task in (0, 1):
        train(learner, task, batches(rows(task, MANY, generator), STEPS, generator), lr=3e-3, weight_decay=0.01)
        assert score(learner, task, rows(task, 200, generator)) > 0.75  # otherwise there is nothing to share
    found = []
    for question in (0, 1):
        again = learner_of(config, 3, seed)
        again.model.load_state_dict(learner.model.state_dict(), strict=False)
        again.load_state_dict(learner.state_dict())
        few = rows(question, FEW, generator)
        train(again, 2, batches(few, FEW_STEPS, generator), lr=3e-3, weight_decay=0.01)
        unseen = rows(question, 800, generator)
        parts = (None, "earlier", "gates") if config.share else (None,)
        found.append({part or "whole": score(again, 2, unseen, part) for part in parts})
    return found


@pytest.mark.timeout(600)  # half a minute on an idle core
def test_sharing_raises_accuracy_by_what_the_capsules_of_earlier_tasks_know() -> None:
    """Seeds 0 to 3 give 0.86 with sharing (standard error 0.04) and 0.62 without; 0.58 with earlier capsules closed and
    0.69 with coins for gates. At the rate of the other weights (sharing_lr: null) sharing gives nothing: 0.61."""
    ctr = [score for seed in range(SEEDS) for score in third_task(CONFIG, seed)]
    hat = [score for seed in range(SEEDS) for score in third_task(CONFIG.updated({"share": False}), seed)]
    means = {part: mean(each[part] for each in ctr) for part in ctr[0]}
    alone = mean(each["whole"] for each in hat)
    assert means["whole"] > alone + 0.1, (means, alone)
    assert means["earlier"] < means["whole"] - (means["whole"] - alone) * 0.8, (means, alone)
    assert means["earlier"] < means["gates"] < means["whole"], means
