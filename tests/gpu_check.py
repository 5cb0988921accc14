"""What a GPU does with the methods at the sizes they are made for: `python -m tests.gpu_check [--small] [SECTION ...]`.

Each section runs in a process of its own with a time limit, so one that fails or hangs costs its own figures alone:

    encoders  optimizer steps of CTR and LoRA at BERT-base's size: tokens a second, share of the device's peak, memory
              planned and allocated
    decoders  the same of LAMOL at a billion parameters, ZeRO-2 and ZeRO-3
    offload   the same with optimizer states in the host's memory
    steps     a CTR step at task 19 of 19 against a plain adapter's and LoRA's, whole backbone
    votes     a vote over attention against both models' forward passes
    writing   samples of a billion parameters, against `generate` of transformers
    ray-ctr   `cl-dist train` of CTR through Ray, to its summary
    ray-rational_lamol  the same of Rational LAMOL
    parity    one process with plain torch against ZeRO-2, ZeRO-3 and two processes that share the GPU

Prints one table and writes tests/results/gpu.json, from which `python -m tests.pages.tables write` makes the page
cluster_configs/GPU.md. --small runs the same with tiny models on a CPU and writes nothing: a rehearsal.
`.ci/gpu-bundle DIR` packs what a machine without a network needs besides torch and transformers.
"""

import argparse
import gc
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from cl_dist.config import Tree, merged, parse
from cl_dist.contract import tiny
from cl_dist.parallel.config import EngineConfig
from cl_dist.planning.planner import planned, work_of
from cl_dist.run import Run
from cl_dist.run_config import RunConfig
from cl_dist.stage import StageRef
from cl_dist.stages import train

RESULTS = Path(__file__).parent / "results" / "gpu.json"
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "A10": 125e12}
"""Dense bfloat16 operations a second, by a word of the device's name."""
BASE = {"model_type": "bert", "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12} | {
    "num_attention_heads": 12,
    "vocab_size": 30522,
}
BILLION = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16} | {
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "bos_token_id": None,
    "eos_token_id": None,
}
SPARE = 4
WORDS = (*tiny.SPOKEN, *(f"word{number}" for number in range(32000 - len(tiny.SPOKEN) - 4 - SPARE)))
"""Of the decoder: with the 4 special tokens and those of tasks they are its whole vocabulary. What an untrained model
draws is hardly ever special then, and its samples are as long as may be."""
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
}
ENCODER_ROWS: Tree = {"global_batch": 256, "max_length": 128}
DECODER_ROWS: Tree = {"global_batch": 64, "max_length": 512}
RATIONAL: Tree = {"name": "rational_lamol", "gamma": 0.25, "level": "head", "top_k": 8, "rationales": "gradient"}
LAMOL: Tree = {"name": "lamol", "gamma": 0.25}
TRAINED: dict[str, dict[str, tuple[Tree, Tree, Tree, Tree]]] = {
    "encoders": {
        "lora": (BASE, {"name": "lora", "r": 8}, ENCODER_ROWS, {"micro_batch": 128}),
        "ctr": (BASE, {"name": "ctr"}, ENCODER_ROWS, {"micro_batch": 128}),
    },
    "decoders": {
        "lamol": (BILLION, LAMOL, DECODER_ROWS, {"micro_batch": 8}),
        "lamol, ZeRO-3": (BILLION, LAMOL, DECODER_ROWS, {"micro_batch": 8, "zero_stage": 3}),
    },
    "offload": {"lamol, offload": (BILLION, LAMOL, DECODER_ROWS, {"micro_batch": 8, "offload": "optimizer"})},
}
"""Sizes, method, rows and cluster settings of what each section trains."""
RUNS: dict[str, tuple[Tree, Tree, Tree]] = {
    "ctr": (BASE, {"name": "ctr"}, ENCODER_ROWS),
    "rational_lamol": (BILLION, RATIONAL, DECODER_ROWS),
}
"""Sizes, method and rows of each run through Ray."""
STEPS, WARM = 6, 2
FIRST = StageRef(task=0, stage="train")
Line = dict[str, Any]


class EnoughError(Exception):
    """Ends a Train stage that has been measured."""


def line(what: str, value: float | None, text: str, goal: str = "", ok: bool | None = None, **facts: Any) -> Line:
    """Return a row of the table; `ok` says whether the goal was reached."""
    return {
        "what": what,
        "value": value,
        "text": text if value is None else text.format(value),
        "goal": goal,
        "ok": ok,
        **facts,
    }


def synchronize() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], Any], times: int = 5, warm: int = 2) -> float:
    """Return the median seconds of a call, the device's work included."""
    taken = []
    for _ in range(times + warm):
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[warm:])


def device() -> torch.device:
    """Return where the check runs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak() -> float | None:
    """Return the dense bfloat16 operations a second of the device, None where they are not known."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for word, rate in PEAKS.items() if word in name), None)


def tree_of(
    folder: Path, name: str, sizes: Tree, method: Tree, rows: Tree, cluster: Tree, small: bool, batches: int = STEPS
) -> Tree:
    """Return a run file over data that it writes: rows that are all as long as may be."""
    sizes = {**sizes, **SMALL} if small else sizes
    rows = {**rows, "global_batch": 8, "max_length": 64} if small else rows
    cluster = {**cluster, "micro_batch": min(4, cluster["micro_batch"])} if small else cluster
    writes = tiny.writes(method["name"])
    over: Tree = {"science": {"model": {"output": "lm"}}} if writes else {}
    place = folder / name.replace(", ", "-")
    tree = tiny.tree(place, over, tasks=("food", "film"), train=batches * rows["global_batch"])
    tasks = tree["science"]["tasks"]
    for task in tasks:
        path = Path(task["source"]["path"])
        found = [json.loads(each) for each in path.read_text(encoding="utf8").splitlines()]
        for row in found:
            row["text"] += " the" * rows["max_length"]  # cut off at max_length
        tiny.save_rows(path, found)
    science = {
        "model": {"config": sizes, "dtype": "bfloat16"},
        "train": {**rows, "epochs": 1, "lr": 1e-4, "keep": "last", "min_round_steps": 1},
        "generate": {"min_yield": 0.0, "max_attempts": 2, "shard_samples": 2 if small else 32},
    }
    defaults = {"engine": "deepspeed", "zero_stage": 2, "workers": 1, "checkpoint_minutes": 0}
    gpus = {"gpus_per_worker": 1 if torch.cuda.is_available() and not small else 0}
    over = {"run": {"name": place.name, "dir": str(folder / "runs")}, "science": science}
    tree = merged(tree, over)
    tree["cluster"] = {"dispatcher": "local", **defaults, **gpus, **cluster}
    tree["science"]["method"] = dict(method)
    tree["science"]["tasks"] = tasks
    if writes:
        words = tiny.save_tokenizer(folder / "words", WORDS)
        tree["science"]["model"] |= {"source": str(words), "spare_task_tokens": SPARE}
    return tree


def stepped(tree: Tree, out: Path) -> Line:
    """Train the first task for some steps; return the seconds of one, and its memory as planned and as allocated."""
    config = parse(RunConfig, tree)
    plan = planned(config, ())
    opened = Run(config)
    job = opened.job(opened.stage(FIRST))
    marks: list[float] = []
    most = 0

    def alive(step: int) -> None:
        nonlocal most
        synchronize()
        marks.append(time.perf_counter())
        if torch.cuda.is_available() and step == 1:
            torch.cuda.reset_peak_memory_stats()  # by now the optimizer has its moments
        if step == STEPS:
            most = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
            raise EnoughError

    out.mkdir(parents=True)
    with suppress(EnoughError):
        train.run(job, out, lambda event: None, heartbeat=alive)
    taken = statistics.median(after - before for before, after in zip(marks[WARM:], marks[WARM + 1 :], strict=False))
    work = work_of(config, plan)
    assert plan.memory is not None
    told = plan.memory.configured.estimate.peak
    return {
        "step_s": taken,
        "tokens_per_s": work.global_batch * work.tokens / taken,
        "operations_per_s": work.global_batch * work.operations / taken,
        "told": told,
        "allocated": most,
        "parameters": work.elements,
    }


def of_train(section: str, small: bool) -> Iterator[Line]:
    """Yield tokens a second, share of peak and memory of Train stages."""
    found: dict[str, Line] = {}
    with TemporaryDirectory() as folder:
        for name, (sizes, method, rows, cluster) in TRAINED[section].items():
            tree = tree_of(Path(folder), name, sizes, method, rows, cluster, small)
            facts = found[name] = stepped(tree, Path(folder) / "out" / name)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            sized = f"{name}, {facts['parameters'] / 1e6:,.0f} M parameters"
            yield line(f"tokens a second of training: {sized}", facts["tokens_per_s"], "{:,.0f}", facts=facts)
            if (rate := peak()) is not None:
                share = facts["operations_per_s"] / rate
                yield line(f"share of the device's bfloat16 peak: {name}", share, "{:.1%}")
            if facts["allocated"]:
                ratio = facts["told"] / facts["allocated"]
                text = f"{facts['told'] / 2**30:.2f} / {facts['allocated'] / 2**30:.2f} GiB ({{:.3f}})"
                what = f"memory planned / allocated: {name}"
                yield line(what, ratio, text, "within 15 %", 0.85 <= ratio <= 1.15)
    if "ctr" in found:
        ratio = found["ctr"]["tokens_per_s"] / found["lora"]["tokens_per_s"]
        what = "CTR's tokens a second against LoRA's, same backbone, task 1"
        yield line(what, ratio, "{:.2f}x", "at least 0.45", ratio >= 0.45)


def of_steps(small: bool) -> Iterator[Line]:
    """Yield the time of a CTR step at the last of 19 tasks against a plain adapter's and LoRA's."""
    from transformers import BertConfig, BertModel

    from cl_dist.models.backbone import lower
    from cl_dist.models.config import LoraShape, PluginShape
    from cl_dist.models.lowrank import add_update
    from cl_dist.models.noise import gumbel
    from cl_dist.models.plugin import CtrClassifier
    from cl_dist.models.task_modules import AdapterClassifier

    tasks, (rows, length) = (3, (4, 32)) if small else (19, (64, 128))
    sizes: Tree = {**BASE, **SMALL} if small else BASE
    width = 32 if small else 2000
    there = device()

    def backbone() -> Any:
        torch.manual_seed(0)
        untyped: Any = BertModel(BertConfig(**{key: value for key, value in sizes.items() if key != "model_type"}))
        return untyped

    batch = {
        "input_ids": torch.randint(1000, 20000, (rows, length), device=there),
        "attention_mask": torch.ones(rows, length, dtype=torch.long, device=there),
        "row": torch.arange(rows, device=there),
    }

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> float:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

        def once() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        return seconds(once)

    def of_adapter() -> float:
        plain = AdapterClassifier(backbone(), width)
        plain.add_task(2)
        plain.start_task(0)
        lower(plain).to(there).train()
        return step(plain, lambda: plain(batch).float().square().sum())

    def of_lora() -> float:
        updated = backbone()
        add_update(updated, LoraShape(), "task0")
        lower(updated).to(there).train()
        return step(updated, lambda: updated(batch["input_ids"], batch["attention_mask"])[0].float().square().mean())

    adapter_s, lora_s = of_adapter(), of_lora()
    ctr = CtrClassifier(backbone(), PluginShape(tsm_size=width))
    for task in range(tasks):
        ctr.add_task(2)
        if task < tasks - 1:
            ctr.activate(task)
            ctr.finish_task()
    ctr.start_task(tasks - 1)
    lower(ctr).to(there).train()
    ctr.context.slope = 30.0

    def ctr_loss() -> Tensor:
        ctr.context.noise_PBU2 = gumbel(0, 0, batch["row"], len(ctr.plugins), tasks - 1)
        return ctr(batch).float().square().sum() + ctr.sparsity()

    ctr_s = step(ctr, ctr_loss)
    where = f"task {tasks} of {tasks}, H={sizes['hidden_size']}, width {width}, {rows} rows of {length} tokens"
    for other, taken in (("a plain adapter's", adapter_s), ("LoRA's", lora_s)):
        text = f"{{:.2f}}x its time ({1e3 * ctr_s:.1f} ms against {1e3 * taken:.1f} ms)"
        yield line(f"a CTR step at {where}, against {other}", ctr_s / taken, text)


def decoder(small: bool, positions: int) -> Any:
    """Return a Llama of a billion parameters, drawn on the device, in bfloat16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: Tree = {**BILLION, **(SMALL if small else {}), "max_position_embeddings": positions}
    kind = sizes.pop("model_type")
    torch.manual_seed(0)
    with device():
        untyped: Any = AutoModelForCausalLM
        return untyped.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16).eval()


def of_votes(small: bool) -> Iterator[Line]:
    """Yield the time of a vote against both models' forward passes."""
    import numpy as np

    from cl_dist.models.cci import Comparer, Recorder, watch, watched

    lengths = (32,) if small else (512, 2048, 8192)
    old, new = decoder(small, max(lengths)), decoder(small, max(lengths))
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    for length in lengths:
        tokens = torch.randint(100, 30000, (length,)).tolist()
        rationale = np.zeros(length, dtype=bool)
        rationale[length // 3 : length // 2] = True

        @torch.no_grad()
        def forwards(tokens: list[int]) -> None:
            for model in (old, new):
                model.set_attn_implementation("sdpa")
                model.base_model(torch.tensor([tokens], device=device()), use_cache=False)

        def vote(tokens: list[int], rationale: Any) -> Any:
            recorder = Recorder(rationale, 32 if not small else 4, 80)
            with watched(old):
                watch(old, tokens, recorder)
            comparer = Comparer(recorder.maps()[0], 80)
            with watched(new):
                watch(new, tokens, comparer)
            return comparer.nearness()

        pair = [seconds(partial(forwards, tokens), 3, 1), seconds(partial(vote, tokens, rationale), 3, 1)]
        text = f"{{:.1f}}x their time ({1e3 * pair[1]:.0f} ms against {1e3 * pair[0]:.0f} ms)"
        yield line(f"a vote over attention at {length} tokens, against both forward passes", pair[1] / pair[0], text)


def of_writing(small: bool) -> Iterator[Line]:
    """Yield tokens a second of samples, ours and those of `generate`."""
    from cl_dist.models.decode import Generation, generate, sample_token

    rows, length = (4, 16) if small else (64, 256)
    model = decoder(small, 512)

    class Planned(Generation):
        def accept(self, token: int) -> bool:
            super().accept(token)
            return len(self.tokens) >= length

    def pick(logits_BV: Tensor, key_B: Tensor, at_B: Tensor) -> Tensor:
        return sample_token(logits_BV, key_B, at_B, top_k=20, top_p=1.0, temperature=1.0)

    def ours() -> None:
        waiting = deque(Planned(first=1, key=number) for number in range(rows))
        assert sum(len(each.tokens) for each in generate(model, waiting, rows, length + 1, pick)) == rows * length

    @torch.no_grad()
    def theirs() -> None:
        ids = torch.ones(rows, 1, dtype=torch.int64, device=device())
        settings: Tree = {"do_sample": True, "top_k": 20, "max_new_tokens": length, "min_new_tokens": length}
        found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        assert found.shape[1] == length + 1

    ours_s, theirs_s = seconds(ours, 3, 1), seconds(theirs, 3, 1)
    number = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    what = f"tokens a second of writing {rows} samples of {length} tokens, {number:,.0f} M parameters"
    yield line(what, rows * length / ours_s, "{:,.0f}")
    yield line(f"writing {rows} samples of {length} tokens, against `generate`", theirs_s / ours_s, "{:.2f}x as fast")


def _trained(rank: int, world: int, job: Any, out: str) -> None:
    train.run(job, Path(out), lambda event: None)


def of_parity(small: bool) -> Iterator[Line]:
    """Yield how far ZeRO, and two processes that share this device, are from one process with plain torch."""
    from cl_dist.contract.ranks import Ranks
    from tests import parity

    with TemporaryDirectory() as folder:
        for method in ("ctr", "lamol"):
            made = parity.run(Path(folder), method)
            job = made.job(made.stage(parity.SECOND))
            expected = parity.train_here(job, Path(folder) / f"{method}-torch")
            for stage, workers in ((2, 1), (3, 1), (0, 2), (1, 2)):
                out = Path(folder) / f"{method}-{stage}-{workers}"
                out.mkdir()
                engine = EngineConfig(zero_stage=stage, micro_batch=16)
                how = f"ZeRO-{stage}, {workers} process{'es' if workers > 1 else ''} on this device"
                ranks = Ranks(workers)
                try:
                    ranks.run(_trained, replace(job, engine=engine), str(out), timeout_s=100.0)
                    found = parity.Trained.read(out).difference(expected)
                    text = f"{{:.0e}}, {found['mask_bits']:g} mask bits, metrics {found['metrics']:.0e}"
                    close = found["weights"] < 1e-4 and not found["mask_bits"]
                    yield line(f"parity of {method}: weights, {how}", found["weights"], text, "rounding", close)
                except Exception as error:  # what a backend lacks is a finding, and no reason to stop
                    words = str(error).splitlines() or [type(error).__name__]
                    yield line(f"parity of {method}: {how}", None, f"failed: {words[0][:200]}", "rounding", False)
                finally:
                    ranks.close()


def of_ray(name: str, small: bool) -> Iterator[Line]:
    """Yield what a whole run through Ray tells of itself."""
    from tests.integration.ray_runs import Command

    gpus = 0 if small else torch.cuda.device_count()
    sizes, method, rows = RUNS[name]
    with TemporaryDirectory() as folder:
        cluster = {"dispatcher": "ray", "workers": gpus or 2, "micro_batch": 16 if name == "ctr" else 8}
        tree = tree_of(Path(folder), name, sizes, method, rows, cluster, small, batches=2)
        if name == "ctr":
            tree["science"]["tasks"] = tree["science"]["tasks"][:1]
            tree["cluster"]["profile"] = {"steps": [1, 2]}
        path = Path(folder) / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf8")
        began = time.perf_counter()
        command = Command(Path(folder), "train", str(path))
        if command.end(400.0):
            raise RuntimeError(command.output[-6000:])
        took = time.perf_counter() - began
        summary = json.loads((Path(folder) / "runs" / name / "metrics/summary.json").read_text(encoding="utf8"))
        stages = ", ".join(f"{stage['key']} {stage['seconds']:.1f}" for stage in summary["stages"])
        yield line(f"seconds of `cl-dist train`, {name}, through Ray", took, f"{{:.0f}} ({stages})", "ends", True)
        for trace in sorted((Path(folder) / "runs" / name / "profile").glob("*.json.gz")):
            events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
            kernels = sum(event.get("cat") == "kernel" for event in events)
            yield line(f"GPU kernels in {trace.name.split('.')[0]}'s profile of one step", kernels, "{:,.0f}")


SECTIONS: dict[str, tuple[Callable[[bool], Iterator[Line]], float]] = {
    "encoders": (partial(of_train, "encoders"), 60.0),
    "decoders": (partial(of_train, "decoders"), 120.0),
    "offload": (partial(of_train, "offload"), 200.0),
    "steps": (of_steps, 60.0),
    "votes": (of_votes, 60.0),
    "writing": (of_writing, 70.0),
    "ray-ctr": (partial(of_ray, "ctr"), 90.0),
    "ray-rational_lamol": (partial(of_ray, "rational_lamol"), 150.0),
    "parity": (of_parity, 110.0),
}
"""What measures, and the seconds it may take."""


def facts() -> Line:
    """Return what the figures depend on besides the code."""
    import accelerate
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
    return {"device": name, "gpus": torch.cuda.device_count(), "cores": os.cpu_count(), "versions": versions}


def measured(name: str, small: bool) -> list[Line]:
    """Run a section in a process of its own and return its lines; what it printed of a failure is one of them."""
    command = [sys.executable, "-m", "tests.gpu_check", "--inside", name, *(["--small"] if small else [])]
    began = time.perf_counter()
    limit = SECTIONS[name][1] * (10 if small else 1)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        out, fault = done.stdout, "" if not done.returncode else f"exit code {done.returncode}\n{done.stderr[-4000:]}"
    except subprocess.TimeoutExpired as late:
        said = [stream.decode() if isinstance(stream, bytes) else stream or "" for stream in (late.stdout, late.stderr)]
        out, fault = said[0], f"not within {limit:.0f} s\n{said[1][-4000:]}"
    found = [json.loads(each.removeprefix("@")) for each in out.splitlines() if each.startswith("@")]
    if fault:
        sys.stderr.write(f"{name}: {fault}\n")
        last = fault.strip().splitlines()[-1][:300]
        found.append(line(f"section {name}", None, f"failed: {last}", "ends", False))
    sys.stderr.write(f"section {name}: {time.perf_counter() - began:.0f} s\n")
    return [each | {"section": name} for each in found]


def main() -> None:
    """Check, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[[], *SECTIONS], default=[])
    parser.add_argument("--small", action="store_true", help="tiny models on a CPU: a rehearsal that writes nothing")
    parser.add_argument("--inside", choices=list(SECTIONS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.inside:
        for each in SECTIONS[args.inside][0](args.small):
            sys.stdout.write("@" + json.dumps(each) + "\n")
            sys.stdout.flush()
        return
    if not args.small and not torch.cuda.is_available():
        sys.exit("no CUDA device: `python -m tests.gpu_check --small` tries the commands on a CPU")
    chosen, failed = args.sections or list(SECTIONS), False
    for name in chosen:
        lines = measured(name, args.small)
        failed = failed or any(each["text"].startswith("failed") for each in lines)
        for each in lines:
            mark = {True: "ok", False: "MISSED", None: ""}[each["ok"]]
            sys.stdout.write(f"{each['what']} | {each['text']} | {each['goal']} | {mark}\n")
        sys.stdout.flush()
        if not args.small:
            known = json.loads(args.out.read_text(encoding="utf8"))["lines"] if args.out.exists() else []
            kept = [each for each in known if each["section"] != name]
            args.out.write_text(json.dumps(facts() | {"lines": kept + lines}, indent=1) + "\n", encoding="utf8")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
