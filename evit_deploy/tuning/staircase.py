"""The staircase of a device: the time of one block as a function of its token count, measured on a runtime.

Devices compute in tiles, so the time falls in steps and not with every token. Short models with a few blocks, one for
each token count, are built in the same way as by ``convert`` and timed interleaved with a dense one. Their times
determine

- the time of one block at each token count,
- the time of stem and head,
- the time of reducing tokens, in addition to the block that does it.

The time of a block is divided between attention and MLP in proportion to their multiply-adds.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from evit_deploy.errors import GateFailed
from evit_deploy.files.drafts import draft
from evit_deploy.pipeline.lowering import Exports
from evit_deploy.progress import step
from evit_deploy.report.statistics import median_interval
from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.plan import BlockPlan, ModelCost, ModelShape, TokenPlan
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_
from evit_deploy.tuning.bench import Bench
from evit_deploy.tuning.schedules import Planner, Schedule

_LOG = logging.getLogger(__name__)

PLAIN = 3
"""Plain blocks of a short model, in addition to the one that reduces and the last one."""
_TOGETHER = 8
"""Number of token counts that are timed together with a dense model; limits the number of models open at a time."""
TILE = 8
"""Measured token counts are multiples of this: the tile sizes of devices are multiples or divisors of it."""
_LEAST_SHARE = 0.1
"""Smallest share of the patches that a schedule keeps."""
NOISE = 0.1
"""Largest half-width of a confidence interval relative to the time; above it, token counts cannot be ranked."""
_SAME = 0.01
"""Times of blocks that differ by less than this share count as equal, and the larger token count is preferred."""


class Staircase(msgspec.Struct, frozen=True):
    """Times of the parts of a model on a device, in seconds per call.

    Args:
        runtime: Name of the runtime.
        batch: Images per call.
        clock: Clock that measured the times.
        counts: Token counts, falling; the first is the dense model's.
        block: Time of one complete block at each token count.
        low: Lower end of the 95 % interval of each block time, from the ratio of the short model to the dense one.
        high: Upper end of this interval.
        outside: Time of stem and head.
        location: Time of a location in addition to its block, at the dense model's token count.
        slope: Factor from the sum of the parts to the time of a complete model; see :func:`corrected`.
        shift: Seconds added after multiplying by ``slope``.
    """

    runtime: str
    batch: int
    clock: str
    counts: tuple[int, ...]
    block: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    outside: float
    location: float
    slope: float = 1.0
    shift: float = 0.0

    @property
    def efficient(self) -> tuple[int, ...]:
        """Token counts just below a step, where every larger count takes longer; falling, without the dense one."""
        found: list[int] = []
        least = self.block[0]
        for count, seconds in zip(self.counts[1:], self.block[1:], strict=True):
            if seconds < least * (1 - _SAME):
                found.append(count)
                least = seconds
        return tuple(found)

    def at(self, tokens: int) -> float:
        """Seconds of a block at any token count, linearly interpolated between measured counts."""
        return float(np.interp(tokens, self.counts[::-1], self.block[::-1]))

    def seconds(self, plan: TokenPlan) -> float:
        """Predicted seconds per call of a complete model.

        Args:
            plan: Its token plan, with costs.
        """
        assert plan.cost is not None
        total = self.outside
        for row in plan.blocks[:-1]:
            total += self._block(row, plan.cost)
        end = plan.blocks[-1]
        if plan.ends_early:
            total += self.at(end.tokens_in) * ending_share(end.tokens_in, plan.cost)
        else:
            total += self._block(end, plan.cost)
        return self.slope * total + self.shift

    def _block(self, row: BlockPlan, cost: ModelCost) -> float:
        if row.keep is None:
            return self.at(row.tokens_in)
        before, behind = attention_share(row.tokens_in, cost), 1 - attention_share(row.tokens_out, cost)
        own = self.location * row.tokens_in / self.counts[0]
        return self.at(row.tokens_in) * before + self.at(row.tokens_out) * behind + own


def corrected(staircase: Staircase, expected: Sequence[float], measured: Sequence[float]) -> Staircase:
    """Corrects a staircase by the measured times of complete models, with a linear fit.

    Args:
        staircase: Staircase measured on short models.
        expected: Its predictions for the complete models in seconds, the dense model first.
        measured: Their measured times in seconds, timed interleaved.
    """
    slope, shift = (float(number) for number in np.polyfit(expected, measured, 1))
    # Three nearly equal times do not determine a line, only a ratio.
    if slope <= 0 or slope * staircase.outside + shift < 0:
        slope, shift = measured[0] / expected[0], 0.0
    return msgspec.structs.replace(staircase, slope=slope, shift=shift)


def attention_share(tokens: int, cost: ModelCost) -> float:
    """Share of the attention in the multiply-adds of a block."""
    attention = tokens * cost.token_attention + 2 * tokens**2 * cost.width
    return attention / (attention + tokens * cost.token_mlp)


def ending_share(tokens: int, cost: ModelCost) -> float:
    """Share of the last block's multiply-adds that remain if only the tokens used by the head are computed."""
    seen = cost.head_tokens
    whole = tokens * (cost.token_attention + cost.token_mlp) + 2 * tokens**2 * cost.width
    asking = cost.token_attention - cost.key_value + cost.token_mlp + 2 * tokens * cost.width
    return (tokens * cost.key_value + seen * asking) / whole


def counts_for(prefix: int, patches: int, most: int) -> tuple[int, ...]:
    """Returns the token counts to measure: the dense model's, then multiples of a tile, falling.

    Args:
        prefix: Number of prefix tokens.
        patches: Number of patch tokens.
        most: Approximate maximum number of counts.
    """
    dense, least = prefix + patches, prefix + 1 + max(2, round(_LEAST_SHARE * patches))
    tile = TILE if patches >= 8 * TILE else 1 + patches // (2 * TILE)  # small images have too few patches for TILE
    stride = tile * max(1, -(-(dense - least) // (tile * most)))
    multiples = range(dense - 1 - (dense - 1) % stride, least - 1, -stride)
    return (dense, *multiples)


def shortened(model: torch.nn.Module, planner: Planner, count: int | None, plain: int) -> torch.nn.Module:
    """Builds a short model: one block that reduces to a token count, some plain blocks, and the last block.

    Args:
        model: The dense model; its weights are shared.
        planner: Method and options.
        count: Number of tokens after the first block; ``None`` for a dense model.
        plain: Number of blocks between the first and the last.
    """
    backbone = backbone_of(model)
    short = copy_sharing_weights(model)
    blocks = list(backbone.blocks(short))
    backbone.set_blocks(short, torch.nn.Sequential(*blocks[: plain + 1], blocks[-1]))
    if count is None:
        return dense_twin(short)
    spec = planner.spec_of(Schedule((0,), (count,)))
    return reduce_tokens_(short, msgspec.structs.replace(spec, locations=(0,)))


def measure_staircase(
    model: torch.nn.Module, planner: Planner, bench: Bench, counts: Sequence[int], duration: float
) -> Staircase:
    """Measures the time of blocks at several token counts.

    Args:
        model: The dense model.
        planner: Method and options.
        bench: Builds and times the models.
        counts: Token counts; see :func:`counts_for`.
        duration: Total time in seconds.

    Raises:
        GateFailed: The times vary too much to rank token counts.
        StageError: A model could not be built.
    """
    plain = min(PLAIN, planner.shape.depth - 2)
    groups = [counts[i : i + _TOGETHER] for i in range(1, len(counts), _TOGETHER)]
    share = duration / (len(groups) + 1)
    middle = counts[len(counts) // 2]
    ratios: dict[int, np.ndarray] = {}
    with draft() as scratch:
        workshop = _Workshop(model, planner, bench, scratch.folder)
        step(_LOG, "measuring the staircase", 0, len(groups) + 1)
        anchors = [workshop.made(count, blocks) for blocks in (plain, 0) for count in (None, middle)]
        first = bench.times(anchors, share)
        for number, group in enumerate(groups):
            step(_LOG, "measuring the staircase", number + 1, len(groups) + 1)
            times = bench.times([anchors[0], *(workshop.made(count, plain) for count in group)], share)
            for count, taken in zip(group, times[1:], strict=True):
                ratios[count] = taken.rounds / times[0].rounds
            workshop.clear()
    check_noise(ratios, duration)
    anchored = Anchors(plain, middle, *(float(np.median(times.rounds)) for times in first))
    return solved(planner.shape, anchored, ratios, (bench.runtime, bench.batch, first[0].clock))


class _Workshop:
    """Builds short models, each in its own folder."""

    def __init__(self, model: torch.nn.Module, planner: Planner, bench: Bench, folder: Path) -> None:
        self._model, self._planner, self._bench, self._folder = model, planner, bench, folder
        self._exports: dict[int, Exports] = {}  # by depth: models of different depths have different dense twins

    def made(self, count: int | None, plain: int) -> Any:
        """Builds a short model, and returns the form that the runtime runs; see :func:`shortened`."""
        folder = self._folder / f"{count or 'dense'}-{plain}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        short = shortened(self._model, self._planner, count, plain)
        return self._bench.artifact(short, folder, self._exports.setdefault(plain, Exports()))

    def clear(self) -> None:
        """Removes the files of the measured models, except the dense one."""
        for folder in self._folder.iterdir():
            if folder.is_dir() and not folder.name.startswith("dense"):
                shutil.rmtree(folder)


def check_noise(ratios: Mapping[int, np.ndarray], duration: float) -> None:
    """Checks that the times are precise enough to rank token counts.

    Args:
        ratios: Ratio of the short model's time to the dense one's in each round, by token count.
        duration: Seconds that were measured, for the error message.

    Raises:
        GateFailed: The times vary too much.
    """
    widths = []
    for values in ratios.values():
        low, high = median_interval(values)
        widths.append((high - low) / 2 / float(np.median(values)))
    usual = float(np.median(widths))
    if usual > NOISE:
        raise GateFailed(
            "this device is too noisy to rank schedules by", where="short models beside a dense one",
            seen=f"± {100 * usual:.1f} % of their time after {duration:g} s", wanted=f"± {100 * NOISE:.0f} %",
            fix=f"Measure longer with --duration {4 * duration:g}, leave the machine alone meanwhile, or give "
            "--threads 1.",
        )  # fmt: skip


class Anchors(msgspec.Struct, frozen=True):
    """Seconds per call of four short models, which determine the times of the parts.

    Args:
        plain: Number of plain blocks of the two longer models.
        middle: Token count of the two reduced models.
        dense: Time of the dense model with plain blocks.
        reduced: Time of the reduced model with plain blocks.
        lean_dense: Time of the dense model without plain blocks.
        lean_reduced: Time of the reduced model without plain blocks.
    """

    plain: int
    middle: int
    dense: float
    reduced: float
    lean_dense: float
    lean_reduced: float


def solved(
    shape: ModelShape, anchors: Anchors, ratios: Mapping[int, np.ndarray], about: tuple[str, int, str]
) -> Staircase:
    """Computes the times of the parts from the times of short models.

    Args:
        shape: Shape of the complete model.
        anchors: Times of the models that determine stem, head and location.
        ratios: Ratio of the short model's time to the dense one's in each round, by token count.
        about: Runtime, images per call, and clock.
    """
    cost, tokens, plain = shape.cost, shape.prefix + shape.patches, anchors.plain
    ending = {count: ending_share(count, cost) if cost.head_tokens else 1.0 for count in (tokens, *ratios)}
    dense = (anchors.dense - anchors.lean_dense) / plain
    outside = anchors.lean_dense - dense * (1 + ending[tokens])
    middle = (anchors.reduced - anchors.lean_reduced) / plain
    before = outside + dense * attention_share(tokens, cost)
    behind = 1 - attention_share(anchors.middle, cost) + ending[anchors.middle]
    location = max(0.0, anchors.lean_reduced - before - middle * behind)
    counts = sorted(ratios, reverse=True)

    def block(count: int, ratio: float) -> float:
        parts = plain + 1 - attention_share(count, cost) + ending[count]
        return (ratio * anchors.dense - before - location) / parts

    found = {count: (float(np.median(ratios[count])), *median_interval(ratios[count])) for count in counts}
    values, lows, highs = ([block(count, found[count][i]) for count in counts] for i in range(3))
    own = dense, *values
    # Fewer tokens never take longer, so any rise is noise; real steps are kept.
    return Staircase(
        *about, (tokens, *counts), never_rising(own), (dense, *lows), (dense, *highs), max(0.0, outside), location
    )


def never_rising(values: Sequence[float]) -> tuple[float, ...]:
    """Least-squares fit of a non-increasing sequence: rising neighbors are replaced by their mean.

    (Pool adjacent violators; Ayer and others, 1955.)

    >>> never_rising([5, 1, 3, 1])
    (5.0, 2.0, 2.0, 1.0)
    """
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, size = float(value), 1
        while pools and pools[-1][0] < mean:
            before, count = pools.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        pools.append((mean, size))
    return tuple(mean for mean, size in pools for _ in range(size))
