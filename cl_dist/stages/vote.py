"""Worker side of Record and Vote: each row with a rationale votes for the units that a new task has changed most.

The old model reads all rows first and its maps are stored as bits, then the new model reads them, so two models are
never in memory. Each row is encoded alone, so results do not depend on the shards or workers.
"""

import json
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cl_dist.data.language import TextCodec, encode_row
from cl_dist.data.rationales import Span, token_mask
from cl_dist.data.rows import Row, TaskData
from cl_dist.data.votes import CRITICAL, RECORDED, read_rationales, read_recorded, voting_rows
from cl_dist.errors import CheckpointError, DataError
from cl_dist.models.attention_slices import units_of
from cl_dist.models.backbone import load_tokenizer
from cl_dist.models.causal import CausalModel
from cl_dist.models.cci import Bits, Comparer, Floats, Recorder, watch, watched
from cl_dist.models.saliency import agreement, salient
from cl_dist.stage import Record, Vote, VoteConfig, digest_of
from cl_dist.stages.build import build_learner, to_inference
from cl_dist.stages.shards import ShardedKind
from cl_dist.stages.stage_job import Job, row_length, task_data
from cl_dist.stages.voting_shards import Shard, shards

log = logging.getLogger(__name__)
BINS = 20

Seen = list[dict[str, Any]]
"""Per row: source, number, row (its id), and either skipped (the reason) or the stage's results."""


class _Reader(ABC):
    """Loads a model and reads rows one by one."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.stage, Record | Vote)
        self._job, self._vote = job, job.stage.vote
        learner = build_learner(job, for_inference=True)
        assert isinstance(learner.model, CausalModel)
        model: Any = learner.model.backbone
        self._model: Any = to_inference(job, model)
        self._codec = TextCodec(load_tokenizer(job.model))
        self._length = {task.id: row_length(job, number) for number, task in enumerate(job.tasks)}

    def _tokens(self, data: TaskData, row: Row) -> tuple[list[int], int]:
        """Return the tokens of a row in the attention scope, and the number of leading ones that are its text."""
        context, asked, answer = encode_row(self._codec, row, data.question, self._length[data.id])
        more = [*asked, self._codec.special.ans, *answer] if self._vote.attention_scope == "all" else []
        return [*context, *more], len(context)

    def run(self, shard: Shard) -> Seen:
        """Read a shard's rows."""
        data = task_data(self._job, shard.source)
        rows = voting_rows(data, self._vote.max_examples)
        found: Seen = []
        for number in range(shard.start, shard.stop):
            row = rows[number]
            tokens, num_text = self._tokens(data, row)
            line: dict[str, Any] = {"source": shard.source, "number": number, "row": row.id}
            line["tokens"] = digest_of(tokens)
            found.append(line | self.examine(line, data, row, tokens, num_text))
        return found

    @abstractmethod
    def examine(
        self, line: dict[str, Any], data: TaskData, row: Row, tokens: list[int], num_text: int
    ) -> dict[str, Any]:
        """Return the stage's results for a row, whose first `num_text` tokens are its text."""


class RecordWorker(_Reader):
    """The old model: records for each unit the map that matches a row's rationale best."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        assert isinstance(job.stage, Record)
        found = [read_rationales(job.folder(stage)) for stage in job.stage.rationales]
        self._found = dict(zip(job.stage.sources, found, strict=True)) if found else {}

    def examine(
        self, line: dict[str, Any], data: TaskData, row: Row, tokens: list[int], num_text: int
    ) -> dict[str, Any]:
        """Return the maps as packed bits with their IoU, and the words of the first row of a task.

        For a row that cannot vote, return the reason.
        """
        text_T, skipped = self._rationale(line["source"], data, row, num_text)
        if skipped:
            return {"skipped": skipped}
        found: dict[str, Any] = {}
        if self._vote.rationales != "human":
            human_T = self._rationale_mask(row, row.rationale, num_text)
            found = {"agreement": agreement(text_T, human_T)} if human_T.any() else {}
        mask_T = np.pad(text_T, (0, len(tokens) - num_text))
        recorder = Recorder(mask_T, units_of(self._model, self._vote.level), self._vote.beta)
        with watched(self._model):  # not around gradients, which would save every map of every layer
            watch(self._model, tokens, recorder)
        maps_LUT, iou_LU = recorder.maps()
        if line["number"] == 0:
            found["words"] = [self._codec.decode([token]) for token in tokens]
            found["rationale"] = np.flatnonzero(mask_T).tolist()
        bits = np.packbits(maps_LUT).tobytes().hex()
        return found | {"shape": list(maps_LUT.shape), "maps": bits, "iou": iou_LU.tolist()}

    def _rationale(self, source: int, data: TaskData, row: Row, num_text: int) -> tuple[Bits, str | None]:
        """Return the rationale mask of the first `num_text` tokens of a text, and why it cannot vote, if so."""
        if num_text < 2:
            return np.zeros(num_text, dtype=bool), "too_short"
        if self._vote.rationales == "gradient":
            context, asked, answer = encode_row(self._codec, row, data.question, self._length[data.id])
            prefix, ans = [*context, *asked], self._codec.special.ans
            return salient(self._model, num_text, prefix, ans, answer, self._vote.rationale_share), None
        spans = row.rationale if self._vote.rationales == "human" else self._found[source].get(row.id, ())
        mask_T = self._rationale_mask(row, spans, num_text)
        return mask_T, None if mask_T.any() else "cut_off" if spans else "no_rationale"

    def _rationale_mask(self, row: Row, spans: Sequence[Span], num_text: int) -> Bits:
        """Return the mask of the first `num_text` tokens of a text that overlap some spans."""
        _, offsets = self._codec.encode_with_offsets(row.text)
        return np.array(token_mask(offsets[:num_text], spans), dtype=bool)


class VoteWorker(_Reader):
    """The new model: computes how closely each unit can still reproduce the recorded maps."""

    def __init__(self, job: Job) -> None:
        assert isinstance(job.stage, Vote)
        self._folder = job.folder(job.stage.recorded)
        self._recorded = {(line["source"], line["number"]): line for line in read_recorded(self._folder)}
        super().__init__(job)

    def examine(
        self, line: dict[str, Any], data: TaskData, row: Row, tokens: list[int], num_text: int
    ) -> dict[str, Any]:
        """Return c of every unit.

        Raises:
            CheckpointError: If the row was recorded with other tokens, or not recorded.
        """
        known = self._recorded.get((line["source"], line["number"]))
        if known is None or known["tokens"] != line["tokens"]:
            raise CheckpointError(
                f"row {line['row']}: was recorded with other tokens; remove the folder {self._folder} and resume"
            )
        if "skipped" in known:
            return {"skipped": known["skipped"]}
        comparer = Comparer(_maps(known), self._vote.beta)
        with watched(self._model):
            watch(self._model, tokens, comparer)
        return {"nearness": comparer.nearness().tolist()}


def _maps(line: dict[str, Any]) -> Bits:
    """Return the recorded maps of a row: (L, U, T)."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(line["maps"]), np.uint8), count=int(np.prod(line["shape"])))
    return bits.reshape(line["shape"]).astype(bool)


def _sorted(results: Iterable[tuple[Shard, Seen]]) -> Seen:
    return [line for _, seen in sorted(results, key=lambda result: result[0]) for line in seen]


def merge_record(job: Job, results: Iterable[tuple[Shard, Seen]], out: Path) -> None:
    """Write the lines of all shards in order.

    Raises:
        DataError: If no row can vote.
    """
    lines = _sorted(results)
    if all("skipped" in line for line in lines):
        counts = dict(Counter(line["skipped"] for line in lines))
        raise DataError(
            f"none of {len(lines)} rows can vote: {counts}. Set tasks.<id>.rationale to the column with rationales, "
            "and raise train.max_length if they are truncated"
        )
    (out / RECORDED).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf8")


def tally(nearness: list[Floats], vote: VoteConfig) -> dict[str, Any]:
    """Count the votes of every row, from its c (L, U).

    Each row votes for the units with the smallest c: one block, or top_k groups or heads; of ties, the first. The units
    with most votes are chosen; of ties, the first. A row whose last vote was a tie carries no information: the margin
    is the lead, among the other rows, of the last chosen unit over the first one not chosen, as a share of all rows.
    """
    layers, units = nearness[0].shape
    count = min(1 if vote.level == "block" else vote.top_k, layers * units)
    votes, sure = (np.zeros(layers * units, dtype=np.int64) for _ in range(2))
    ties = 0
    histogram = np.zeros((layers, units, BINS), dtype=np.int64)
    minima = []
    for c_LU in nearness:
        c_X = c_LU.ravel()
        order = np.argsort(c_X, kind="stable")
        votes[order[:count]] += 1
        if count < len(c_X) and c_X[order[count - 1]] == c_X[order[count]]:
            ties += 1
        else:
            sure[order[:count]] += 1
        minima.append({"unit": [int(i) for i in divmod(int(order[0]), units)], "c": float(c_X[order[0]])})
        bins = np.minimum((c_LU * BINS).astype(int), BINS - 1)
        np.add.at(histogram, (*np.indices(c_LU.shape), bins), 1)
    ranked = sorted(range(len(votes)), key=lambda unit: (-votes[unit], unit))
    chosen = sorted(ranked[:count])
    behind = max((sure[unit] for unit in ranked[count:]), default=0)
    return {
        "chosen": [[int(i) for i in divmod(unit, units)] for unit in chosen],
        "votes": votes.reshape(layers, units).tolist(),
        "margin": float(min(sure[unit] for unit in chosen) - behind) / len(nearness),
        "ties": ties,
        "mean_c": np.mean(nearness, axis=0).tolist(),
        "histogram": histogram.tolist(),
        "minima": minima,
    }


def _example(recorded: Seen, layer: int, unit: int) -> dict[str, Any] | None:
    """Return the words of a row, with the token indices of its rationale and of the map of a unit of the old model."""
    line = next((line for line in recorded if "words" in line), None)
    if line is None:
        return None
    attended = np.flatnonzero(_maps(line)[layer, unit]).tolist()
    return {"row": line["row"], "words": line["words"], "rationale": line["rationale"], "looked_at": attended}


def merge_vote(job: Job, results: Iterable[tuple[Shard, Seen]], out: Path) -> None:
    """Count the votes and write critical.json to out."""
    assert isinstance(job.stage, Vote)
    lines, vote = _sorted(results), job.stage.vote
    used = [line for line in lines if "skipped" not in line]
    found = tally([np.array(line["nearness"]) for line in used], vote)
    for line, minimum in zip(used, found["minima"], strict=True):
        minimum |= {"task": job.tasks[line["source"]].id, "row": line["row"]}
    recorded = [line for line in read_recorded(job.folder(job.stage.recorded)) if "skipped" not in line]
    shares = [line["agreement"] for line in recorded if "agreement" in line]
    decisive = found["margin"] >= vote.min_margin
    if not decisive:
        log.warning("vote not decisive task=%s margin=%.3f", job.tasks[job.stage.task].id, found["margin"])
    result = {
        "level": vote.level,
        "rationales": vote.rationales,
        "used": len(used),
        "skipped": dict(Counter(line["skipped"] for line in lines if "skipped" in line)),
        "voting_tasks": [job.tasks[source].id for source in job.stage.sources],
        "is_decisive": decisive,
        "rationale_iou": np.mean([line["iou"] for line in recorded], axis=0).tolist(),
        "agreement": {name: float(np.mean([s[name] for s in shares])) for name in ("f1", "iou")} if shares else None,
        "example": _example(recorded, *found["chosen"][0]),
    }
    (out / CRITICAL).write_text(json.dumps(result | found, indent=1), encoding="utf8")


RECORD = ShardedKind(shards, RecordWorker, merge_record)
VOTE = ShardedKind(shards, VoteWorker, merge_vote)
