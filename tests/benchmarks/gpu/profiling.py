"""Breakdown of a forward pass: DeiT-S's kernels by purpose, and the rest of the graph's time.

Eager calls under PyTorch's profiler show the purpose of a kernel: its launch is inside ranges around the modules, the
scores and the reorganization, or else its name is used. Durations are those of a replayed CUDA graph if it runs the
same kernels in the same order, because the other parts time the graph.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

from evit_deploy.tokens.methods import evit

from .device import Run, in_turns
from .inference import DENSE, SMALL, call, images_for, variants_of
from .job import Job, median
from .variants import Variant, kernel_calls

VARIANTS = (DENSE, Variant(0.7), Variant(0.7, "slice"), Variant(0.5))
BATCHES = (128, 1)
FORWARDS = 5
MARK = "evit|"
"""Ranges are called ``evit|kind|label``."""
GEMM, ATTENTION, NORM, OTHER = "GEMM", "attention", "layer norm", "other"
EMBEDDING, GELU, SCORES, REORG = "patch embedding", "GELU", "score row", "reorganization"
KINDS = (GEMM, ATTENTION, NORM, GELU, EMBEDDING, SCORES, REORG, OTHER)
BLOCK = "block"
"""A range that marks the position of a kernel, not its purpose."""
BY_NAME = (
    (ATTENTION, re.compile(r"flash|fmha|sdpa|attention|softmax", re.IGNORECASE)),
    (GEMM, re.compile(r"gemm|gemv|nvjet|cutlass|cublas|splitk|addmm|aten::(b?mm|linear|matmul)", re.IGNORECASE)),
    (NORM, re.compile(r"layer_?norm", re.IGNORECASE)),
    (GELU, re.compile(r"gelu", re.IGNORECASE)),
    (EMBEDDING, re.compile(r"conv|implicit", re.IGNORECASE)),
)
LINEAR = ("qkv", "proj", "fc1", "fc2", "head")
LONGEST, NAME = 10, 80


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on the device; in a dry run one operator on the CPU.

    Attributes:
        name: Name in the profile.
        start: Start in microseconds.
        duration: Duration in microseconds.
        kind: One of :data:`KINDS`.
        label: The linear layer's name, tokens and operations; "" elsewhere.
        place: The block's number and tokens; "" outside of the blocks.
    """

    name: str
    start: float
    duration: float
    kind: str = OTHER
    label: str = ""
    place: str = ""


def measure(job: Job) -> None:
    """One row per batch size and variant; the graphs are timed before the profiler is first started."""
    models = variants_of(SMALL, VARIANTS, "fp16", job)
    replays: dict[tuple[int, str], Run] = {}
    graphs: dict[tuple[int, str], float] = {}
    for batch in (1,) if job.toy else BATCHES:
        with job.rows.attempt(model=SMALL, dtype="fp16", batch=batch):
            images = images_for(models["dense"], batch, torch.float16, job.device.name)
            runs = {(batch, name): job.device.capture([call(model, images)]) for name, model in models.items()}
            times = in_turns(job.device, {str(key): run for key, run in runs.items()}, 3 if job.toy else 21)
            graphs |= {key: median(times[str(key)]) for key in runs}
            replays |= runs
    profiled(job, job.device.synchronize)  # the first start takes longest
    for batch, name in job.rows.in_time(replays, reserve=1.5):
        with job.rows.attempt(model=SMALL, dtype="fp16", batch=batch, variant=name):
            row = _row(job, models[name], batch, replays[batch, name], graphs[batch, name])
            job.rows.add(model=SMALL, dtype="fp16", batch=batch, variant=name, **row)


def _row(job: Job, model: Any, batch: int, replay: Run, graph: float) -> dict[str, Any]:
    images = images_for(model, batch, torch.float16, job.device.name)
    forward = call(model, images)
    with ranges(model):
        forward()
        kernels = profiled(job, forward)
    source = "eager calls"
    if job.device.name == "cuda":
        again = profiled(job, replay)
        if [kernel.name for kernel in again] == [kernel.name for kernel in kernels]:
            kernels = [replace(k, duration=a.duration) for k, a in zip(kernels, again, strict=True)]
            source = "graph"
        elif again:
            print(f"a graph has {len(again)} kernels, {FORWARDS} eager calls {len(kernels)}", flush=True)
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    busy = sum(kernel.duration for kernel in kernels) / FORWARDS / 1e3
    return {
        "ms in a graph": round(graph, 4), "ms of kernels": round(busy, 4), "ms between them": round(graph - busy, 4),
        "convolutions tried out": torch.backends.cudnn.benchmark, "durations of": source,
        **sums(kernels), "operators": kernel_calls(model, images),
    }  # fmt: skip


def sums(kernels: list[Kernel]) -> dict[str, Any]:
    """Microseconds and calls of one forward pass: by kind, by linear layer, by block, and of the longest kernels."""
    kinds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    layers, blocks, names = (defaultdict(list) for _ in range(3))
    for kernel in kernels:
        kinds[kernel.kind].append(kernel.duration)
        names[kernel.name, kernel.kind].append(kernel.duration)
        if kernel.label:
            layers[kernel.label].append(kernel.duration)
        if kernel.kind == ATTENTION and kernel.place:
            blocks[kernel.place].append(kernel.duration)
    calls = {label: _calls_of(label, kernels) for label in layers}
    linear = {}
    for label, durations in layers.items():
        name, tokens, operations = label.split()
        each = sum(durations) / calls[label]
        linear[f"{name} at {tokens}"] = {
            "calls": round(calls[label] / FORWARDS), "microseconds": round(each, 2),
            "teraflops": round(int(operations) / each / 1e6, 1),
        }  # fmt: skip
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:LONGEST]
    return {
        "microseconds": {kind: round(sum(each) / FORWARDS, 2) for kind, each in kinds.items()},
        "calls": {kind: round(len(each) / FORWARDS, 1) for kind, each in kinds.items()},
        "linear": linear,
        "attention": [
            {"block": int(place.split()[0]), "tokens": int(place.split()[1]),
             "microseconds": round(sum(each) / FORWARDS, 2)}
            for place, each in blocks.items()
        ],
        "longest": [
            {"name": name[:NAME], "kind": kind, "microseconds": round(sum(each) / FORWARDS, 2),
             "calls": round(len(each) / FORWARDS, 1)}
            for (name, kind), each in longest
        ],
    }  # fmt: skip


def _calls_of(label: str, kernels: list[Kernel]) -> int:
    """Number of calls of a layer, by its blocks, because one call may launch several kernels."""
    return FORWARDS * len({kernel.place for kernel in kernels if kernel.label == label})


# ---- ranges


@contextmanager
def ranges(model: Any) -> Iterator[None]:
    """Opens a range around every module and function to distinguish; eager mode only."""
    with ExitStack() as stack:
        _wrap(stack, evit, "class_scores", SCORES)
        _wrap(stack, functional, "scaled_dot_product_attention", ATTENTION)
        _hook(stack, model.patch_embed, lambda _: f"{EMBEDDING}|")
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and last in LINEAR:
                _hook(stack, module, _linear(last, module))
            elif isinstance(module, nn.LayerNorm):
                _hook(stack, module, lambda _: f"{NORM}|")
            elif last == "act":
                _hook(stack, module, lambda _: f"{GELU}|")
            elif last == "reducer":
                _hook(stack, module, lambda _: f"{REORG}|")
        for index, block in enumerate(model.blocks):
            _hook(stack, block, lambda x, index=index: f"{BLOCK}|{index} {x.shape[1]}")
        yield


def _wrap(stack: ExitStack, module: Any, name: str, kind: str) -> None:
    function = getattr(module, name)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        with record_function(f"{MARK}{kind}|"):
            return function(*arguments, **named)

    stack.callback(setattr, module, name, function)
    setattr(module, name, wrapped)


def _linear(name: str, module: nn.Linear) -> Callable[[torch.Tensor], str]:
    return lambda x: f"{GEMM}|{name} {x.shape[-2]} {2 * x.numel() * module.out_features}"


def _hook(stack: ExitStack, module: nn.Module, named: Callable[[torch.Tensor], str]) -> None:
    opened: list[Any] = []

    def before(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        opened.append(record_function(MARK + named(arguments[0])))
        opened[-1].__enter__()

    def after(*_: Any) -> None:
        opened.pop().__exit__(None, None, None)

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)


# ---- what the profiler saw


def profiled(job: Job, run: Run) -> list[Kernel]:
    """The kernels of some calls, in the order in which they ran."""
    cuda = job.device.name == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as seen:
        for _ in range(FORWARDS):
            run()
        job.device.synchronize()
    path = job.scratch / "trace.json"
    seen.export_chrome_trace(str(path))
    return kernels_of(path, on_cpu=not cuda)


def kernels_of(path: Path, *, on_cpu: bool) -> list[Kernel]:
    """Reads a trace: the device's work, with the ranges that were open at its launch."""
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("ph") == "X"]
    marks = [
        (event["ts"], event["ts"] + event["dur"], *event["name"].removeprefix(MARK).split("|", 1))
        for event in events if event.get("cat") == "user_annotation" and event["name"].startswith(MARK)
    ]  # fmt: skip
    marks.sort(key=lambda mark: mark[1] - mark[0])  # innermost first
    if on_cpu:
        return [_placed(kernel, kernel.start, marks) for kernel in _own_times(events)]
    launches = {
        event["args"]["correlation"]: event["ts"]
        for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event["args"]
    }  # fmt: skip
    kernels = [
        _placed(Kernel(event["name"], event["ts"], event["dur"]), launches.get(event["args"].get("correlation")), marks)
        for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]  # fmt: skip
    return sorted(kernels, key=lambda kernel: kernel.start)


def _placed(kernel: Kernel, launched: float | None, marks: list[tuple[float, float, str, str]]) -> Kernel:
    kind, label, place = "", "", ""
    for start, end, what, told in marks:
        if launched is not None and start <= launched <= end:
            if what == BLOCK:
                place = place or told
            elif not kind:
                kind, label = what, told
    kind = kind or next((kind for kind, pattern in BY_NAME if pattern.search(kernel.name)), OTHER)
    return replace(kernel, kind=kind, label=label, place=place)


def _own_times(events: list[dict[str, Any]]) -> list[Kernel]:
    """CPU operators with their own time; those that only call others are left out."""
    found: list[dict[str, Any]] = []
    within: list[dict[str, Any]] = []
    for event in sorted((e for e in events if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"])):
        own = {"name": event["name"], "start": event["ts"], "end": event["ts"] + event["dur"], "own": event["dur"]}
        while within and within[-1]["end"] <= own["start"]:
            within.pop()
        if within:
            within[-1]["own"] -= event["dur"]
            within[-1]["calls"] = True
        within.append(own)
        found.append(own)
    return [Kernel(own["name"], own["start"], max(own["own"], 0.0)) for own in found if "calls" not in own]
