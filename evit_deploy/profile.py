"""How fast a model is, beside the two twins that give the number a meaning, in the same run and interleaved.

The *dense twin* (no token reduction) gives the speed-up; the *slice twin* (same token counts, nothing scored or
gathered) gives what the reorganisation itself costs. In every round each contestant runs once, in an order drawn anew,
so that a machine whose speed drifts slows all of them alike and nobody always follows the same one; ratios are medians
over rounds. With one thread they are made of that thread's CPU time, which neighbours on the machine do not touch; with
more, of wall time.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from evit_deploy import bundle as bundles
from evit_deploy.checkpoint import Tokens, build_model, read_checkpoint
from evit_deploy.engine import BatchProfile
from evit_deploy.errors import InputError
from evit_deploy.export import INPUT, load_onnx, read_card, versions
from evit_deploy.golden import DTYPES
from evit_deploy.precision import QUANTIZED
from evit_deploy.registry import RUNTIMES
from evit_deploy.report import Check, ProfileRow, Report, device
from evit_deploy.runtimes import Runner
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from evit_deploy.variants import reorganizations, slice_twin
from evit_deploy.verify import artifact_of, opened, parent_model, usable

BATCH_SIZES = (1, 8, 32)
DURATION = 10.0
MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 5, 1000
SETTLE = 0.02
"""Seconds between calls with several threads: PyTorch's threads spin on for milliseconds after their turn. Measured on
two cores at batch 1, the model after eager took 10 % longer than its slice twin in rotation, 1 % with this pause."""


class Contestant(msgspec.Struct, frozen=True):
    """One thing to time.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model``, ``dense`` or ``slice``.
        artifact: What the runtime runs.
    """

    runtime: str
    variant: str
    artifact: Any


def profile(
    target: Path | str,
    *,
    runtimes: Sequence[str] = (),
    batch_sizes: Sequence[int] = BATCH_SIZES,
    threads: int | None = None,
    duration: float = DURATION,
    against: Path | None = None,
    tokens: Tokens | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Profiles a bundle, an ONNX file or a checkpoint.

    Args:
        target: Bundle, ``model.onnx``, or checkpoint (file or timm name).
        runtimes: Names in the registry of runtimes; all that can run the target when empty.
        batch_sizes: Images a call.
        threads: CPU threads; ``None`` for each runtime's own choice.
        duration: Seconds to measure each batch size for; at least five rounds are always run.
        against: Bundle: its checkpoint, where it is no longer in its place. ONNX file: its dense twin.
        tokens: Checkpoint: how to reduce it.
        progress: Told what is being done.

    Raises:
        InputError: The target is nothing that can be profiled, or a runtime cannot run it.
    """
    progress("reading the models")
    contestants, plan, notes = contestants_of(Path(target), str(target), against, tokens, runtimes)
    if not contestants:
        raise InputError("none of these runtimes runs this", where=target, seen=", ".join(runtimes))
    report = measure_all(contestants, plan, batch_sizes, threads=threads, duration=duration, progress=progress)
    return Report(notes=tuple(notes), versions=versions(), device=device()) + report


def contestants_of(
    path: Path, target: str, against: Path | None, tokens: Tokens | None, runtimes: Sequence[str]
) -> tuple[list[Contestant], TokenPlan, list[str]]:
    """Who runs: the target and its twins, on each runtime.

    Returns:
        The contestants, the token plan, and notes on who is missing and why.
    """
    wanted = [RUNTIMES.get(name) for name in runtimes]  # an unknown one is told, not passed over
    if path.is_dir():
        bundle = bundles.read_bundle(path)
        model, why_not = parent_model(bundle, against)
        torch_wanted = not runtimes or any(not runtime.files for runtime in wanted)
        notes = [f"PyTorch was not timed: {why_not}."] if model is None and torch_wanted else []
        return bundle_contestants(bundle, runtimes, model), bundle.manifest.plan, notes
    if path.suffix == ".onnx":
        card = read_card(load_onnx(path))
        if card is None:
            raise InputError("evit-deploy did not write this file, so its token plan is unknown", where=path)
        if against is not None:
            load_onnx(against)  # refuses what is no model
        notes = [] if against else ["Speed-up not available: --against DENSE.onnx gives the dense twin."]
        names = [name for name in RUNTIMES.names() if bundles.MODEL in RUNTIMES.get(name).files]
        rows = [row for name in _chosen(names, runtimes, path) for row in onnx_contestants(path, against, name)]
        return rows, card.plan, notes
    checkpoint = read_checkpoint(target)
    spec, notes = (tokens or Tokens()).resolve(checkpoint)
    model = reduce_tokens_(build_model(checkpoint), spec)
    names = [name for name in RUNTIMES.names() if not RUNTIMES.get(name).files]
    rows = [row for name in _chosen(names, runtimes, model) for row in torch_contestants(model, name)]
    return rows, token_plan(model), checkpoint.notes + notes


def _chosen(names: Sequence[str], runtimes: Sequence[str], artifact: Any) -> list[str]:
    """Of some runtimes those that were asked for; without a wish, those that can run an artifact here."""
    if runtimes:
        return [name for name in names if name in runtimes]
    return [name for name in names if usable(RUNTIMES.get(name), artifact)]


def bundle_contestants(
    bundle: bundles.Bundle, runtimes: Sequence[str] = (), model: torch.nn.Module | None = None
) -> list[Contestant]:
    """A bundle's model and its twins on every runtime that was asked for, or that can run them here.

    Args:
        bundle: The bundle.
        runtimes: Names in the registry of runtimes.
        model: The PyTorch model that the bundle was made from.
    """
    rows: list[Contestant] = []
    for name in sorted(RUNTIMES.names(), key=lambda name: not RUNTIMES.get(name).files):  # PyTorch last
        runtime: type[Runner] = RUNTIMES.get(name)
        artifact = artifact_of(bundle, runtime) if runtime.files else model
        if artifact is None or not (name in runtimes if runtimes else usable(runtime, artifact)):
            continue
        if isinstance(artifact, torch.nn.Module):
            rows += torch_contestants(artifact, name, bundle.manifest.precision)
            continue
        rows.append(Contestant(name, "model", artifact))
        if bundles.MODEL in runtime.files:
            rows += _slice(bundle.file(bundles.MODEL), name)
        dense = artifact_of(bundle, runtime, dense=True)
        rows += [Contestant(name, "dense", dense)] if dense is not None else []
    return rows


def onnx_contestants(model: Path, dense: Path | None, runtime: str = "onnxruntime") -> list[Contestant]:
    """The portable file and its twins on one runtime."""
    rows = [Contestant(runtime, "model", model), *_slice(model, runtime)]
    return rows + ([Contestant(runtime, "dense", dense)] if dense is not None else [])


def _slice(model: Path, runtime: str) -> list[Contestant]:
    proto = load_onnx(model)
    return [Contestant(runtime, "slice", slice_twin(proto))] if reorganizations(proto) else []


def torch_contestants(model: torch.nn.Module, runtime: str, precision: str = "fp32") -> list[Contestant]:
    """The PyTorch model and the same weights without reduction, on the GPU if there is one.

    Args:
        model: The reduced model, FP32.
        runtime: Name of a runtime that runs PyTorch models.
        precision: ``fp16`` and ``bf16`` are what PyTorch computes in too; beside a quantised file it is FP16 on a GPU
            and FP32 on a CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision in QUANTIZED:
        precision = "fp16" if device == "cuda" else "fp32"
    twins = {"model": model, "dense": dense_twin(model)}
    if precision != "fp32" or device == "cuda":
        twins = {name: copy.deepcopy(twin).to(device, DTYPES[precision]) for name, twin in twins.items()}
    return [Contestant(runtime, name, twin) for name, twin in twins.items()]


def sizes_within(profiles: Sequence[BatchProfile], sizes: Sequence[int]) -> tuple[int, ...]:
    """The batch sizes that profiles cover; if none is, the ones they were tuned for."""
    covered = tuple(n for n in sizes if not profiles or any(p.minimum <= n <= p.maximum for p in profiles))
    return covered or tuple(sorted({p.optimum for p in profiles}))


def measure_all(
    contestants: Sequence[Contestant],
    plan: TokenPlan,
    batch_sizes: Sequence[int],
    *,
    threads: int | None,
    duration: float,
    minimum_rounds: int = MINIMUM_ROUNDS,
    progress: Callable[[str], None] = lambda text: None,
) -> Report:
    """Runs all contestants interleaved at every batch size.

    Args:
        contestants: Who runs.
        plan: Token plan of the reduced ones.
        batch_sizes: Images a call.
        threads: CPU threads.
        duration: Seconds for each batch size.
        minimum_rounds: Rounds to run even if that takes longer.
        progress: Told what is being done.
    """
    clock = "cpu" if threads == 1 else "wall"
    rows: list[ProfileRow] = []
    with ExitStack() as stack:
        runners = [stack.enter_context(opened(c.runtime, c.artifact, threads)) for c in contestants]
        for batch in batch_sizes:
            progress(f"profiling batch {batch}")
            wall, cpu = measure(runners, batch, duration, minimum_rounds, settle=0.0 if threads == 1 else SETTLE)
            rows += _rows(contestants, plan, batch, wall, cpu if clock == "cpu" else wall)
    return Report(rows=tuple(rows), notes=tuple(verdict(rows)), clock=clock)


def measure(
    runners: Sequence[Runner], batch: int, duration: float, minimum_rounds: int, settle: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Times runners in turn.

    Args:
        runners: Opened runners that take the same input.
        batch: Images a call.
        duration: Seconds.
        minimum_rounds: Rounds to run even if that takes longer.
        settle: Seconds to wait before each call.

    Returns:
        Seconds of wall time and of this thread's CPU time, ``[rounds, runners]`` each.
    """
    shape = runners[0].inputs[0].shape[1:]
    images = np.random.default_rng(0).standard_normal((batch, *[int(n or 1) for n in shape]), dtype=np.float32)
    batch_feeds: Mapping[str, np.ndarray] = {INPUT: images}
    for runner in runners:
        runner.infer(batch_feeds)  # the first call allocates and plans
        runner.synchronize()
    wall: list[list[float]] = []
    cpu: list[list[float]] = []
    order = np.random.default_rng(0)
    end = time.perf_counter() + duration
    while len(wall) < minimum_rounds or (time.perf_counter() < end and len(wall) < MAXIMUM_ROUNDS):
        wall.append([0.0] * len(runners))
        cpu.append([0.0] * len(runners))
        for index in order.permutation(len(runners)):
            time.sleep(settle)
            started, thread_started = time.perf_counter(), time.thread_time()
            runners[index].infer(batch_feeds)
            runners[index].synchronize()
            wall[-1][index], cpu[-1][index] = time.perf_counter() - started, time.thread_time() - thread_started
    return np.array(wall), np.array(cpu)


def _rows(
    contestants: Sequence[Contestant], plan: TokenPlan, batch: int, wall: np.ndarray, clock: np.ndarray
) -> list[ProfileRow]:
    rows = []
    for index, contestant in enumerate(contestants):
        seconds = wall[:, index]
        p50, p95, p99 = (1e3 * float(v) for v in np.percentile(seconds, (50, 95, 99)))
        row = ProfileRow(
            runtime=contestant.runtime,
            variant=contestant.variant,
            batch=batch,
            rounds=len(wall),
            images_per_second=1e3 * batch / p50,
            p50=p50,
            p95=p95,
            p99=p99,
            variation=float(seconds.std() / seconds.mean()),
        )
        ratios = _ratios(contestants, plan, clock, index) if contestant.variant != "dense" else {}
        rows.append(msgspec.structs.replace(row, **ratios))
    return rows


def _ratios(contestants: Sequence[Contestant], plan: TokenPlan, clock: np.ndarray, index: int) -> dict[str, float]:
    twins = {c.variant: i for i, c in enumerate(contestants) if c.runtime == contestants[index].runtime}
    ratios = {"mac_ratio": plan.mac_ratio()}
    if "dense" in twins:
        paired = clock[:, twins["dense"]] / clock[:, index]
        low, high = median_interval(paired)
        speedup = statistics.median(paired)
        ratios |= {"speedup": speedup, "speedup_low": low, "speedup_high": high}
        ratios["mac_efficiency"] = speedup / ratios["mac_ratio"]
    if "slice" in twins and contestants[index].variant == "model":
        ratios["overhead"] = statistics.median(clock[:, index] / clock[:, twins["slice"]]) - 1
    return {name: float(value) for name, value in ratios.items()}


def median_interval(values: np.ndarray) -> tuple[float, float]:
    """A 95 % interval of the median that assumes nothing of the distribution (order statistics, binomial).

    Of five values or fewer it is all of them, which covers less: 94 % of five, 75 % of three.

    >>> median_interval(np.arange(1.0, 12.0))
    (2.0, 10.0)
    """
    ordered = np.sort(values)
    n = len(ordered)
    rank = max(int(np.floor((n - 1.96 * np.sqrt(n)) / 2)), 1)
    return float(ordered[rank - 1]), float(ordered[n - rank])


def verdict(rows: Sequence[ProfileRow]) -> list[str]:
    """Says in words where token reduction does not pay, or cannot be told to, for each runtime."""
    notes = []
    for runtime in dict.fromkeys(row.runtime for row in rows):
        own = [row for row in rows if row.runtime == runtime and row.variant == "model"]
        losing = [row for row in own if row.speedup is not None and row.speedup <= 1]
        unclear = [row for row in own if row.speedup is not None and row.speedup > 1 >= (row.speedup_low or 0)]
        if losing:
            notes.append(f"Token reduction does not pay on {runtime} at {_batches(losing)}.")
        if unclear:
            notes.append(
                f"On {runtime} at {_batches(unclear)} the gain is within noise: measure longer with --duration, or "
                "with --threads 1 on a busy machine."
            )
    return notes


def _batches(rows: Sequence[ProfileRow]) -> str:
    return ", ".join(f"batch {row.batch} ({row.speedup:.2f}x)" for row in rows)


def speed_gate(report: Report, min_speedup: float | None) -> Report:
    """One check for every measured model: at least ``min_speedup`` times as fast as its dense twin.

    Raises:
        InputError: A gate was asked for where no dense twin was measured.
    """
    if min_speedup is None:
        return Report()
    rows = [row for row in report.rows if row.variant == "model" and row.runtime != "eager"]
    rows = rows or [row for row in report.rows if row.variant == "model"]
    if any(row.speedup is None for row in rows):
        raise InputError(
            "there is no dense twin to be faster than", where="--min-speedup", fix="Give it with --against."
        )
    reason = "Not as fast as --min-speedup asks: lower the keep rate, or profile at larger batches."
    checks = (
        Check(
            f"{row.runtime}, batch {row.batch}: speed-up", row.speedup, min_speedup, row.speedup >= min_speedup, reason
        )
        for row in rows
        if row.speedup is not None
    )
    return Report(checks=tuple(checks))
