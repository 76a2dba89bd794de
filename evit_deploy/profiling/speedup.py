"""Evaluation of measured times: latencies, the speed-up over the dense twin with its interval, and notes in words."""

import statistics
from collections.abc import Sequence

import msgspec
import numpy as np

from evit_deploy.profiling.candidates import Candidate
from evit_deploy.profiling.clocks.turns import Times
from evit_deploy.report.report import ProfileRow
from evit_deploy.report.statistics import median_interval
from evit_deploy.tokens.plan import TokenPlan


def rows_of(
    candidates: Sequence[Candidate], plan: TokenPlan | None, batch: int, times: Sequence[Times]
) -> list[ProfileRow]:
    """Returns a row for each candidate.

    Args:
        candidates: The timed candidates.
        plan: Token plan of the reduced models, if known.
        batch: Images per call.
        times: Times of each candidate, from the same rounds.
    """
    rows = []
    for index, candidate in enumerate(candidates):
        row = row_of(candidate.runtime, candidate.variant, batch, times[index], on_gpu=candidate.on_gpu)
        ratios = _ratios(candidates, plan, times, index) if candidate.variant != "dense" else {}
        rows.append(msgspec.structs.replace(row, **ratios))
    return rows


def row_of(runtime: str, variant: str, batch: int, times: Times, *, on_gpu: bool) -> ProfileRow:
    """Returns the row of one candidate, without ratios to others.

    Args:
        runtime: Name of the runtime in the row.
        variant: Name of the variant in the row.
        batch: Images per call.
        times: Times of the candidate.
        on_gpu: Whether it ran on a GPU.
    """
    calls = times.seconds.reshape(-1)
    p50, p95, p99 = (1e3 * float(v) for v in np.percentile(calls, (50, 95, 99)))
    whole = 1e3 * float(np.median(times.end_to_end)) if times.end_to_end is not None else None
    return ProfileRow(
        runtime=runtime,
        variant=variant,
        batch=batch,
        rounds=len(times.seconds),
        images_per_second=1e3 * batch / p50,
        p50=p50,
        p95=p95,
        p99=p99,
        variation=float(calls.std() / calls.mean()),
        device="gpu" if on_gpu else "cpu",
        clock=times.clock,
        end_to_end_images_per_second=1e3 * batch / whole if whole else None,
        end_to_end_p50=whole,
    )


def ratios_to_dense(dense: Times | None, own: Times, plan: TokenPlan | None) -> dict[str, float]:
    """Computes the speed-up over the dense twin, and its share of the saved arithmetic.

    Args:
        dense: Times of the dense twin, if any.
        own: Times of the candidate, from the same rounds and clock.
        plan: Its token plan, if known.

    Returns:
        Fields of a :class:`ProfileRow`; unknown ones are omitted.
    """
    ratios = {}
    if plan is not None:
        ratios = {"mac_ratio": float(plan.mac_ratio()), "computed_mac_ratio": float(plan.computed_mac_ratio())}
    if dense is not None:
        paired = dense.rounds / own.rounds
        low, high = median_interval(paired)
        ratios |= {"speedup": statistics.median(paired.tolist()), "speedup_low": low, "speedup_high": high}
        if plan is not None:
            ratios["mac_efficiency"] = ratios["speedup"] / ratios["computed_mac_ratio"]
        if dense.end_to_end is not None and own.end_to_end is not None:
            ratios["end_to_end_speedup"] = statistics.median((dense.end_to_end / own.end_to_end).tolist())
    return ratios


def _ratios(
    candidates: Sequence[Candidate], plan: TokenPlan | None, times: Sequence[Times], index: int
) -> dict[str, float]:
    twins = {
        c.variant: time for c, time in zip(candidates, times, strict=True) if c.runtime == candidates[index].runtime
    }
    ratios = ratios_to_dense(twins.get("dense"), times[index], plan)
    if "slice" in twins and candidates[index].variant not in ("dense", "slice"):
        ratios["overhead"] = overhead_of(times[index], twins["slice"])
    return ratios


def overhead_of(own: Times, sliced: Times) -> float:
    """Cost of reorganizing tokens: a model's time divided by its slice twin's in the same rounds, minus 1."""
    return float(statistics.median((own.rounds / sliced.rounds).tolist())) - 1


def hidden_gains(rows: Sequence[ProfileRow]) -> list[str]:
    """Returns notes where a model on a GPU gains more in compute than end to end, because of copies and the host."""
    notes = []
    for row in rows:
        whole = row.end_to_end_speedup
        if (row.clock, row.variant) != ("compute", "model") or row.speedup is None or whole is None:
            continue
        if row.speedup > 1.05 * whole:
            notes.append(
                f"{row.runtime}, batch {row.batch}: {whole:.2f}x end to end, with copies and the host's work, "
                f"{row.speedup:.2f}x in compute."
            )
    return notes


def verdict(rows: Sequence[ProfileRow]) -> list[str]:
    """Returns notes for each runtime on batch sizes where the model is not faster, or not significantly."""
    notes = []
    for runtime in dict.fromkeys(row.runtime for row in rows):
        own = [row for row in rows if row.runtime == runtime and row.variant == "model"]
        losing = [row for row in own if row.speedup is not None and row.speedup <= 1]
        unclear = [row for row in own if row.speedup is not None and row.speedup > 1 >= (row.speedup_low or 0)]
        if losing:
            notes.append(f"Token reduction does not pay on {runtime} at {_batches(losing)}.")
        if unclear:
            busy = "lock the GPU's clocks" if unclear[0].device == "gpu" else "with --threads 1 on a busy machine"
            notes.append(
                f"On {runtime} at {_batches(unclear)} the gain is within noise: measure longer with --duration, or "
                f"{busy}."
            )
    return notes


def _batches(rows: Sequence[ProfileRow]) -> str:
    return ", ".join(f"batch {row.batch} ({row.speedup:.2f}x)" for row in rows)
