"""Times inside an engine: the parts of a call, and the time of each block.

Measurements are interleaved: a round is a few calls of each engine, in a new random order, and ratios are medians over
rounds.
"""

import itertools
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from evit_deploy.engines.layers import Layer
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.errors import InputError
from evit_deploy.profiling.candidates import Candidate
from evit_deploy.profiling.clocks.latency import joined, launch_bound, summaries, warnings_of
from evit_deploy.recipe.options import BatchProfile
from evit_deploy.report.report import BlockRow, LatencyRow, Report
from evit_deploy.runtimes.runner import EngineRunner, Timings
from evit_deploy.tokens.plan import TokenPlan

ROUNDS, CALLS = 10, 10
SHARE = 0.1
"""Share of a batch size's duration for calls after the minimum number of calls."""
WARM_UP, REMIND = 0.2, 0.01
"""Seconds of warm-up before an engine's first round (as in trtexec), and before each later one."""


class Timed(msgspec.Struct, frozen=True):
    """An engine to time.

    Args:
        candidate: The candidate.
        runner: Its opened runner.
    """

    candidate: Candidate
    runner: EngineRunner

    @property
    def label(self) -> str:
        """Runtime and variant, for the start of a sentence."""
        return f"{self.candidate.runtime} {self.candidate.variant}"


def time_parts(engines: Sequence[Timed], batch: int, duration: float) -> list[list[Timings]]:
    """Times the parts of calls, the engines in turn.

    Args:
        engines: The engines.
        batch: Images per call.
        duration: Duration of the interleaved measurement, of which :data:`SHARE` is used.

    Returns:
        For each engine, its rounds.
    """
    order = np.random.default_rng(0)
    parts: list[list[Timings]] = [[] for _ in engines]
    each = SHARE * duration / (ROUNDS * max(len(engines), 1))
    for turn in range(ROUNDS):
        for index in order.permutation(len(engines)):
            warm_up = REMIND if turn else WARM_UP
            runner = engines[index].runner
            parts[index].append(runner.timings(batch, calls=CALLS, duration=each, warm_up=warm_up))
    return parts


def latency_report(engines: Sequence[Timed], parts: Sequence[Sequence[Timings]], batch: int) -> Report:
    """Returns a row for each engine, with notes on what affected the measurement.

    Args:
        engines: The engines.
        parts: For each engine its rounds; the same number for all.
        batch: Images per call.
    """
    compute = np.array([[np.median(part.compute) for part in rounds] for rounds in parts])
    rows, notes = [], []
    for index, (engine, rounds) in enumerate(zip(engines, parts, strict=True)):
        whole = joined(rounds)
        found = summaries(whole)
        who = engine.candidate
        twins = {
            other.candidate.variant: compute[place]
            for place, other in enumerate(engines)
            if other.candidate.runtime == who.runtime
        }
        speedup = overhead = None
        if who.variant != "dense" and "dense" in twins:
            speedup = float(statistics.median(twins["dense"] / compute[index]))
        if who.variant not in ("dense", "slice") and "slice" in twins:
            overhead = float(statistics.median(compute[index] / twins["slice"])) - 1
        rate = 1e3 * batch / found["compute"].median if found["compute"].median else 0.0
        row = LatencyRow(who.runtime, who.variant, batch, rate, **found, speedup=speedup, overhead=overhead)
        rows.append(row)
        notes += warnings_of(whole, f"{engine.label}, batch {batch}")
    return Report(latencies=tuple(rows), notes=tuple(notes))


def launch_notes(rows: Sequence[LatencyRow]) -> list[str]:
    """Returns notes on engines with small batches that are limited by kernel launches rather than arithmetic."""
    notes = []
    for runtime in dict.fromkeys(row.runtime for row in rows):
        compute = {row.batch: row.compute.median for row in rows if (row.runtime, row.variant) == (runtime, "model")}
        notes += [f"{runtime}: {sentence}" for sentence in launch_bound(compute)]
    return notes


def optimum(profiles: Sequence[BatchProfile]) -> int:
    """Returns the largest batch size that an engine was tuned for."""
    return max((profile.optimum for profile in profiles), default=1)


def block_report(engine: Timed, plan: TokenPlan | None) -> Report:
    """Measures time by block at the batch size that an engine was tuned for.

    Args:
        engine: The engine.
        plan: Token plan of this engine, if known.
    """
    batch = optimum(engine.runner.profiles)
    times = engine.runner.layer_times(batch)
    layers = named_layers(engine.runner.layers(), _written_layers(engine.candidate.artifact))
    return block_rows(engine, layers, times, batch, plan)


def block_rows(
    engine: Timed, layers: Sequence[Layer], times: Sequence[tuple[str, float]], batch: int, plan: TokenPlan | None
) -> Report:
    """Sums layer times by transformer block, with the token counts.

    A kernel that fuses the end of one block with the start of the next cannot be divided, so it gets a separate row.

    Args:
        engine: The engine.
        layers: Its layers.
        times: (layer name, milliseconds) pairs from the profiler.
        batch: Images per call.
        plan: Token plan of this engine, if known.
    """
    who, counts = engine.candidate, plan.blocks if plan is not None else ()
    spans = {layer.name: layer.blocks for layer in layers}
    groups: dict[tuple[int, int] | None, list[float]] = {}
    for name, milliseconds in times:
        span = spans[name] if name in spans else Layer(name).blocks
        groups.setdefault(span, []).append(milliseconds)
    if groups.keys() <= {None}:
        why = "reports no layer times" if not times else "has layers that do not say which block they belong to"
        return Report(notes=(f"Time by block not available: {engine.label} {why}.",))
    total = sum(itertools.chain.from_iterable(groups.values()))
    rows = []
    for span in sorted(groups, key=lambda span: span or (math.inf, 0)):
        spent = sum(groups[span])
        first, last = span or (None, None)
        known = last is not None and last < len(counts)
        rows.append(
            BlockRow(
                runtime=who.runtime,
                variant=who.variant,
                batch=batch,
                blocks="rest" if span is None else f"{first}" if first == last else f"{first}-{last}",
                tokens_in=counts[first].tokens_in if known and first is not None else None,
                tokens_out=counts[last].tokens_out if known and last is not None else None,
                layers=len(groups[span]),
                milliseconds=spent,
                share=spent / total if total else 0.0,
            )
        )
    return Report(blocks=tuple(rows))


def named_layers(listed: Sequence[Layer], written: Sequence[Layer]) -> tuple[Layer, ...]:
    """Returns the inspector's layers, with block numbers filled in from the plan's text where missing."""
    found = {layer.name: layer for layer in written}
    found |= {layer.name: layer for layer in listed if layer.blocks is not None or layer.name not in found}
    return tuple(found.values())


def _written_layers(artifact: object) -> tuple[Layer, ...]:
    try:
        return plan_layers(Path(str(artifact)))
    except (OSError, InputError):  # the file is gone; use only the inspector's listing
        return ()
