"""What times say: latencies, the speed-up over the dense twin with its interval, and a verdict in words."""

import statistics
from collections.abc import Sequence

import msgspec
import numpy as np

from evit_deploy.profiling.candidates import Candidate
from evit_deploy.report.report import ProfileRow
from evit_deploy.report.statistics import median_interval
from evit_deploy.tokens.plan import TokenPlan


def rows_of(
    candidates: Sequence[Candidate], plan: TokenPlan | None, batch: int, wall: np.ndarray, clock: np.ndarray
) -> list[ProfileRow]:
    """One row for each candidate.

    Args:
        candidates: Who was timed.
        plan: Token plan of the reduced ones, if known.
        batch: Images a call.
        wall: Seconds, ``[rounds, candidates]``.
        clock: What ratios are made of, likewise.
    """
    rows = []
    for index, candidate in enumerate(candidates):
        row = row_of(candidate.runtime, candidate.variant, batch, wall[:, index], on_gpu=candidate.on_gpu)
        ratios = _ratios(candidates, plan, clock, index) if candidate.variant != "dense" else {}
        rows.append(msgspec.structs.replace(row, **ratios))
    return rows


def row_of(runtime: str, variant: str, batch: int, seconds: np.ndarray, *, on_gpu: bool) -> ProfileRow:
    """What one candidate's own wall times say; no ratios yet.

    Args:
        runtime: What the row calls its runtime.
        variant: What the row calls it.
        batch: Images a call.
        seconds: Wall time of each round.
        on_gpu: Where it ran.
    """
    p50, p95, p99 = (1e3 * float(v) for v in np.percentile(seconds, (50, 95, 99)))
    return ProfileRow(
        runtime=runtime,
        variant=variant,
        batch=batch,
        rounds=len(seconds),
        images_per_second=1e3 * batch / p50,
        p50=p50,
        p95=p95,
        p99=p99,
        variation=float(seconds.std() / seconds.mean()),
        device="gpu" if on_gpu else "cpu",
    )


def ratios_to_dense(dense: np.ndarray | None, own: np.ndarray, mac_ratio: float | None) -> dict[str, float]:
    """How much faster one candidate is than its dense twin, and how much of the saved arithmetic that is.

    Args:
        dense: Seconds of the twin in each round; ``None`` without one.
        own: Its own, in the same rounds.
        mac_ratio: Dense multiply-adds over its own, if known.

    Returns:
        Fields of a :class:`ProfileRow`; those that cannot be told are left out.
    """
    ratios = {} if mac_ratio is None else {"mac_ratio": float(mac_ratio)}
    if dense is not None:
        paired = dense / own
        low, high = median_interval(paired)
        ratios |= {"speedup": statistics.median(paired.tolist()), "speedup_low": low, "speedup_high": high}
        if mac_ratio is not None:
            ratios["mac_efficiency"] = ratios["speedup"] / mac_ratio
    return ratios


def _ratios(candidates: Sequence[Candidate], plan: TokenPlan | None, clock: np.ndarray, index: int) -> dict[str, float]:
    twins = {c.variant: i for i, c in enumerate(candidates) if c.runtime == candidates[index].runtime}
    dense = clock[:, twins["dense"]] if "dense" in twins else None
    ratios = ratios_to_dense(dense, clock[:, index], plan.mac_ratio() if plan is not None else None)
    if "slice" in twins and candidates[index].variant not in ("dense", "slice"):
        ratios["overhead"] = float(statistics.median(clock[:, index] / clock[:, twins["slice"]])) - 1
    return ratios


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
            busy = "lock the GPU's clocks" if unclear[0].device == "gpu" else "with --threads 1 on a busy machine"
            notes.append(
                f"On {runtime} at {_batches(unclear)} the gain is within noise: measure longer with --duration, or "
                f"{busy}."
            )
    return notes


def _batches(rows: Sequence[ProfileRow]) -> str:
    return ", ".join(f"batch {row.batch} ({row.speedup:.2f}x)" for row in rows)
