"""Worker side of Generate: pseudo-samples of earlier tasks, in shards of fixed sample numbers.

The samples of a shard depend only on the model file and the science settings: they are generated in a fixed number of
slots, a free slot takes the next number in order, and every random draw is keyed on (seed, task, number, attempt,
step). All first attempts come before any second one, and within an attempt lower numbers have priority when labels are
balanced, so the order in which samples end, and so their length, has no influence.
"""

import json
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from cl_dist.data.bayes import NaiveBayes, words
from cl_dist.data.language import SpecialTokens, TextCodec
from cl_dist.data.rows import TaskData
from cl_dist.data.samples import STATISTICS, Sample, as_sample, write_samples
from cl_dist.errors import TrainingError
from cl_dist.learners.text import TextLearner
from cl_dist.models.backbone import load_tokenizer
from cl_dist.models.decode import Generation, generate, rows_within, sample_token
from cl_dist.parallel.seeds import seed_of
from cl_dist.stage import Generate
from cl_dist.stages.build import build_learner, to_inference
from cl_dist.stages.shards import ShardedKind
from cl_dist.stages.stage_job import Job, replayed_rows, row_length, task_data

NUM_SHOWN = 20
"""Number of first attempts of each task that are stored for the report."""
Fault = Literal["no_answer_mark", "stray_token", "no_end", "empty", "other_question", "unknown_label", "surplus_label"]
"""no_answer_mark: no token between question and answer, or two; stray_token: has another special token; no_end: longer
than train.max_length of its task; empty: nothing before or after the mark; other_question, unknown_label and
surplus_label (well-formed, but exceeds its label's quota): see require_known_question, require_known_label and
balance_labels of science.generate."""


@dataclass(frozen=True, slots=True, order=True)
class Shard:
    """Samples start..stop-1 of an earlier task."""

    source: int
    start: int
    stop: int


Written = dict[str, Any]
"""samples (as plain data), faults (count by kind over all attempts), attempts, first_well_formed (count among first
attempts), firsts (number and text of some first attempts), tokens (generated)."""


def shards(job: Job) -> list[Shard]:
    """Return the stage's shards, which depend on science settings only, never on the workers."""
    assert isinstance(job.stage, Generate)
    count, size = replayed_rows(job), job.generate.shard_samples
    return [
        Shard(source, start, min(start + size, count))
        for source in job.stage.sources
        for start in range(0, count, size)
    ]


class GenerateWorker:
    """Loads the model of the previous task and generates one shard at a time."""

    def __init__(self, job: Job) -> None:
        self._job = job
        learner = build_learner(job, for_inference=True)
        assert isinstance(learner, TextLearner)  # only methods on decoders plan this stage
        model: Any = learner.model.backbone  # the library's methods are untyped
        self._model: Any = to_inference(job, model)
        self._codec = TextCodec(load_tokenizer(job.model))
        self._shared = not learner.encoding_options(training=False).per_task

    def run(self, shard: Shard) -> Written:
        """Generate a shard's samples."""
        settings, special = self._job.generate, self._codec.special
        length = row_length(self._job, shard.source)
        slots = rows_within(self._model, settings.parallel_samples, length, settings.kv_cache_gb)
        gen = special.gen if self._shared else special.task(shard.source)

        def line(number: int, attempt: int) -> _SampleGeneration:
            key = seed_of(self._job.seed, "sample", shard.source, number, attempt)
            return _SampleGeneration(gen, key, number, attempt, special, length)

        def pick(logits_BV: Tensor, key_B: Tensor, at_B: Tensor) -> Tensor:
            return sample_token(logits_BV, key_B, at_B, settings.top_k, settings.top_p, settings.temperature)

        known = {tuple(self._codec.encode(name)) for name in self._known_labels(shard.source)}
        found: dict[int, Sample] = {}
        spare: dict[int, Sample] = {}
        quota = self._quota(shard)
        faults: Counter[str] = Counter()
        firsts: dict[int, str] = {}
        attempts = tokens = first_well_formed = 0
        wanted = list(range(shard.start, shard.stop))
        for attempt in range(settings.max_attempts):
            waiting = deque(line(number, attempt) for number in wanted)
            lines = {ended.number: ended for ended in generate(self._model, waiting, slots, length, pick)}
            wanted = []
            for number, ended in sorted(lines.items()):
                attempts, tokens = attempts + 1, tokens + len(ended.tokens) + 1
                sample, fault = self._parse(ended, shard.source, known)
                if attempt == 0 and number < NUM_SHOWN:
                    firsts[number] = self._readable(ended.tokens) + (f"  [{fault}]" if fault else "")
                if sample is not None and quota.get(sample.label, 1) < 1:
                    spare.setdefault(number, sample)
                    sample, fault = None, "surplus_label"
                first_well_formed += attempt == 0 and fault in (None, "surplus_label")
                if sample is None:
                    faults[str(fault)] += 1
                    wanted.append(number)
                    continue
                found[number] = sample
                if sample.label in quota:
                    quota[sample.label] -= 1
            if not wanted:
                break
        found |= {number: spare[number] for number in wanted if number in spare}
        return {
            "samples": [asdict(found[number]) for number in sorted(found)],
            "faults": dict(faults),
            "attempts": attempts,
            "first_well_formed": first_well_formed,
            "firsts": sorted(firsts.items()),
            "tokens": tokens,
        }

    def _quota(self, shard: Shard) -> dict[str, int]:
        """Return the maximum number of samples per label of a shard; empty if labels are not balanced."""
        rows = task_data(self._job, shard.source)
        if self._shared or not self._job.generate.balance_labels or not rows.labels:
            return {}
        counts = Counter(row.label for row in rows.train)
        wanted = shard.stop - shard.start
        return {self._normalized(name): ceil(wanted * counts[name] / len(rows.train)) for name in rows.labels}

    def _normalized(self, label: str) -> str:
        """Return a label after encoding and decoding."""
        return self._codec.decode(self._codec.encode(label))

    def _parse(
        self, line: "_SampleGeneration", source: int, known: set[tuple[int, ...]]
    ) -> tuple[Sample | None, Fault | None]:
        """Return the generated sample, or its fault."""
        tokens, special = line.tokens, self._codec.special
        if line.fault is not None:
            return None, line.fault
        if tokens.count(special.ans) != 1:
            return None, "no_answer_mark"
        mark = tokens.index(special.ans)
        prefix, answer = tuple(tokens[:mark]), tuple(tokens[mark + 1 :])
        text, label = self._codec.decode(prefix), self._codec.decode(answer)
        if not text or not label:
            return None, "empty"
        if not self._ends_in_question(source, prefix):
            return None, "other_question"
        if self._job.generate.require_known_label and known and answer not in known:
            return None, "unknown_label"
        return Sample(source, line.number, line.attempt, prefix, answer, text, label), None

    def _ends_in_question(self, source: int, prefix: tuple[int, ...]) -> bool:
        """Return whether a text ends in its task's question, or is not required to."""
        question = tuple(self._codec.encode(task_data(self._job, source).question))
        is_checked = self._job.generate.require_known_question and not self._shared and question
        return not is_checked or prefix[-len(question) :] == question

    def _known_labels(self, source: int) -> tuple[str, ...]:
        stage = self._job.stage
        assert isinstance(stage, Generate)
        sources = stage.sources if self._shared else (source,)  # a shared token does not identify the task
        labels = [task_data(self._job, task).labels for task in sources]
        return tuple(name for names in labels for name in names) if all(labels) else ()

    def _readable(self, tokens: list[int]) -> str:
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token == self._codec.special.ans:
                parts.append([])
            else:
                parts[-1].append(token)
        return " => ".join(self._codec.decode(part) for part in parts)


class _SampleGeneration(Generation):
    """A sample being generated."""

    def __init__(self, gen: int, key: int, number: int, attempt: int, special: SpecialTokens, length: int) -> None:
        super().__init__(gen, key)
        self.number, self.attempt = number, attempt
        self.fault: Fault | None = None
        self._special, self._length = special, length

    def accept(self, token: int) -> bool:
        """Append a token and return whether the sample ends here, complete or with a fault."""
        special = self._special
        if token == special.eos:
            return True
        if token >= special.base and (token != special.ans or special.ans in self.tokens):
            self.fault = "no_answer_mark" if token == special.ans else "stray_token"
            return True
        if len(self.tokens) == self._length - 1:  # the maximum length of train rows
            self.fault = "no_end"
            return True
        return super().accept(token)


def _label_agreement(data: TaskData, samples: list[Sample]) -> dict[str, float | None]:
    """Return the accuracy of a word classifier, trained on real rows, on the samples and on real test rows."""
    if not data.labels:
        return {"label_agreement": None, "label_agreement_real": None}
    classifier = NaiveBayes((f"{row.text} {row.text_pair or ''}", row.label) for row in data.train)
    question = words(data.question)
    written = [(" ".join(_without_question(words(sample.text), question)), sample.label) for sample in samples]
    return {
        "label_agreement": classifier.agreement(written),
        "label_agreement_real": classifier.agreement([(f"{r.text} {r.text_pair or ''}", r.label) for r in data.test]),
    }


def _without_question(text: list[str], question: list[str]) -> list[str]:
    """Return the words of a sample before its question, which may contain the labels."""
    return text[: len(text) - len(question)] if question and text[-len(question) :] == question else text


def merge(job: Job, results: Iterable[tuple[Shard, Written]], out: Path) -> None:
    """Sort the samples, drop duplicates, and write samples.jsonl and replay.json to out.

    Raises:
        TrainingError: If fewer than min_yield of the requested samples remain.
    """
    assert isinstance(job.stage, Generate)
    parts = sorted(results, key=lambda result: result[0])
    requested = replayed_rows(job)
    kept: list[Sample] = []
    statistics: dict[str, Any] = {}
    for source in job.stage.sources:
        own = [written for shard, written in parts if shard.source == source]
        samples = sorted((as_sample(s) for written in own for s in written["samples"]), key=lambda s: s.number)
        distinct = {(s.prefix, s.answer): s for s in reversed(samples)}  # keeps the first duplicate
        left = sorted(distinct.values(), key=lambda s: s.number)
        kept += left
        attempts = sum(written["attempts"] for written in own)
        faults = {name: sum(written["faults"].get(name, 0) for written in own) for name in get_args(Fault)}
        firsts = {number: text for written in own for number, text in written["firsts"]}
        statistics[job.tasks[source].id] = {
            "requested": requested,
            "generated": attempts,
            "malformed": sum(faults.values()) - faults["surplus_label"],
            "surplus": faults["surplus_label"],
            "faults": faults,
            "duplicate": len(samples) - len(left),
            "kept": len(left),
            "first_attempt_yield": sum(written["first_well_formed"] for written in own) / max(requested, 1),
            "labels": dict(sorted(Counter(s.label for s in left).items())),
            "tokens": sum(written["tokens"] for written in own),
            "firsts": [firsts[number] for number in sorted(firsts)],
            **_label_agreement(task_data(job, source), left),
        }
    for name, numbers in statistics.items():
        if numbers["kept"] < job.generate.min_yield * requested:
            worst = max(numbers["faults"], key=numbers["faults"].__getitem__)
            raise TrainingError(
                f"task {name}: {numbers['kept']} of {requested} pseudo-samples are well-formed and distinct, less than "
                f"science.generate.min_yield={job.generate.min_yield:g} requires; most common fault: {worst} "
                f"({numbers['faults'][worst]} of {numbers['generated']} attempts), {numbers['duplicate']} duplicates. "
                "Train longer, raise science.generate.max_attempts, or lower min_yield."
            )
    write_samples(out, kept)
    (out / STATISTICS).write_text(json.dumps({"tasks": statistics}, indent=1, ensure_ascii=False), encoding="utf8")


KIND = ShardedKind(shards, GenerateWorker, merge)
