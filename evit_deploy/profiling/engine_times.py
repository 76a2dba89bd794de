"""What the host's clock cannot see of an engine: where the time of a call goes, and which block takes how much of it.

Engines take turns here too: a round is some calls of each, in an order drawn anew, and ratios are medians over rounds.
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
"""Share of the time given for a batch size that goes on after the least number of calls."""
WARM_UP, REMIND = 0.2, 0.01
"""Seconds that an engine runs before its first round (as long as trtexec's), and before each later one."""


class Timed(msgspec.Struct, frozen=True):
    """An engine that takes part.

    Args:
        candidate: Which.
        runner: Its runner, opened.
    """

    candidate: Candidate
    runner: EngineRunner

    @property
    def label(self) -> str:
        """For the start of a sentence."""
        return f"{self.candidate.runtime} {self.candidate.variant}"


def time_parts(engines: Sequence[Timed], batch: int, duration: float) -> list[list[Timings]]:
    """Times the parts of calls, the engines in turn.

    Args:
        engines: Who takes turns.
        batch: Images per call.
        duration: Seconds that the interleaved measurement was given.

    Returns:
        For each engine its rounds.
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
    """One row for each engine, and what else than the engine was measured.

    Args:
        engines: Who was timed.
        parts: For each of them its rounds, as many for all.
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
    """Says for each engine whether its small batches wait for launches rather than for arithmetic."""
    notes = []
    for runtime in dict.fromkeys(row.runtime for row in rows):
        compute = {row.batch: row.compute.median for row in rows if (row.runtime, row.variant) == (runtime, "model")}
        notes += [f"{runtime}: {sentence}" for sentence in launch_bound(compute)]
    return notes


def optimum(profiles: Sequence[BatchProfile]) -> int:
    """The largest batch size that an engine was tuned for."""
    return max((profile.optimum for profile in profiles), default=1)


def block_report(engine: Timed, plan: TokenPlan | None) -> Report:
    """Time by block at the batch size that an engine was tuned for.

    Args:
        engine: The engine.
        plan: Token counts of this very engine, if known.
    """
    batch = optimum(engine.runner.profiles)
    times = engine.runner.layer_times(batch)
    layers = named_layers(engine.runner.layers(), _written_layers(engine.candidate.artifact))
    return block_rows(engine, layers, times, batch, plan)


def block_rows(
    engine: Timed, layers: Sequence[Layer], times: Sequence[tuple[str, float]], batch: int, plan: TokenPlan | None
) -> Report:
    """Sums layer times by transformer block, beside the token counts.

    A kernel that fuses the end of one block with the start of the next cannot be divided, so it gets a row of its own.

    Args:
        engine: The engine.
        layers: What it is made of.
        times: Layer names and milliseconds, as the profiler reports them.
        batch: Images per call.
        plan: Token counts of this very engine, if known.
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
    """The inspector's layers; where one does not say which block it belongs to, the plan's own text may."""
    found = {layer.name: layer for layer in written}
    found |= {layer.name: layer for layer in listed if layer.blocks is not None or layer.name not in found}
    return tuple(found.values())


def _written_layers(artifact: object) -> tuple[Layer, ...]:
    try:
        return plan_layers(Path(str(artifact)))
    except (OSError, InputError):  # gone since it was loaded; the inspector's listing is what remains
        return ()
