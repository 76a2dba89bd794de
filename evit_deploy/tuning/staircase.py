"""The device's staircase: what one block costs at which number of tokens, measured on the runtime that is asked for.

A device computes in tiles, so the cost does not fall with every token but in steps. Models of a few blocks are made as
``convert`` makes them, one for each number of tokens, and take turns beside a dense one. From their times follow

- what one block costs at each number of tokens,
- what stem and head cost,
- what reducing tokens costs beside the block that does it.

Inside a block, what its attention and its MLP cost is divided as their multiply-adds are.
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
"""Plain blocks of a short model, besides one that reduces and the last one."""
_TOGETHER = 8
"""Numbers of tokens that take turns beside one dense model, so that few models are open at a time."""
TILE = 8
"""Numbers of tokens are multiples of it: all tiles that devices compute in are, or divide it."""
_LEAST_SHARE = 0.1
"""Least share of the patches that a schedule keeps."""
NOISE = 0.1
"""Most that half an interval may be of the time itself, for counts to be ranked by it."""
_SAME = 0.01
"""Two numbers of tokens whose blocks differ less than this cost the same, and the larger one keeps more."""


class Staircase(msgspec.Struct, frozen=True):
    """What parts of a model cost on a device, in seconds a call.

    Args:
        runtime: What was measured on.
        batch: Images per call.
        clock: What the seconds are of.
        counts: Numbers of tokens, falling; the first is the dense model's.
        block: Of each, one whole block.
        low: Of each, the lower end of a 95 % interval of it, from the short model's time over the dense one's.
        high: The upper end.
        outside: Stem and head.
        location: What a location costs beside its block, at the dense model's tokens.
        slope: What whole models took over what their parts say, from :func:`corrected`.
        shift: Seconds to add to that.
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
        """Numbers of tokens just below a step: every larger one costs more. Falling, without the dense one."""
        found: list[int] = []
        least = self.block[0]
        for count, seconds in zip(self.counts[1:], self.block[1:], strict=True):
            if seconds < least * (1 - _SAME):
                found.append(count)
                least = seconds
        return tuple(found)

    def at(self, tokens: int) -> float:
        """Seconds of a block at any number of tokens: on the line between the two that were measured."""
        return float(np.interp(tokens, self.counts[::-1], self.block[::-1]))

    def seconds(self, plan: TokenPlan) -> float:
        """What a whole model is expected to take.

        Args:
            plan: Its token counts, with costs.
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
    """A staircase that expects of some whole models what they took.

    Args:
        staircase: From short models.
        expected: What it expects of the whole ones, seconds; the first is the dense one's.
        measured: What they took in turns.
    """
    slope, shift = (float(number) for number in np.polyfit(expected, measured, 1))
    if slope <= 0 or slope * staircase.outside + shift < 0:  # three times that hardly differ say no more than a ratio
        slope, shift = measured[0] / expected[0], 0.0
    return msgspec.structs.replace(staircase, slope=slope, shift=shift)


def attention_share(tokens: int, cost: ModelCost) -> float:
    """Share of a block's multiply-adds that are its attention's."""
    attention = tokens * cost.token_attention + 2 * tokens**2 * cost.width
    return attention / (attention + tokens * cost.token_mlp)


def ending_share(tokens: int, cost: ModelCost) -> float:
    """Share of a last block's multiply-adds that are computed where the head sees its first tokens alone."""
    seen = cost.head_tokens
    whole = tokens * (cost.token_attention + cost.token_mlp) + 2 * tokens**2 * cost.width
    asking = cost.token_attention - cost.key_value + cost.token_mlp + 2 * tokens * cost.width
    return (tokens * cost.key_value + seen * asking) / whole


def counts_for(prefix: int, patches: int, most: int) -> tuple[int, ...]:
    """Numbers of tokens to measure: the dense model's, then multiples of a tile, falling.

    Args:
        prefix: Tokens in front.
        patches: Patch tokens.
        most: At most about this many.
    """
    dense, least = prefix + patches, prefix + 1 + max(2, round(_LEAST_SHARE * patches))
    tile = TILE if patches >= 8 * TILE else 1 + patches // (2 * TILE)  # the images of tests have few patches
    stride = tile * max(1, -(-(dense - least) // (tile * most)))
    multiples = range(dense - 1 - (dense - 1) % stride, least - 1, -stride)
    return (dense, *multiples)


def shortened(model: torch.nn.Module, planner: Planner, count: int | None, plain: int) -> torch.nn.Module:
    """A model of few blocks: one that reduces to a number of tokens, some that see as many, and a last one.

    Args:
        model: The dense model; the weights are its own.
        planner: Method and options.
        count: Tokens behind the first block; ``None`` for a dense model.
        plain: Blocks between the first and the last.
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
    """Measures what blocks cost at some numbers of tokens.

    Args:
        model: The dense model.
        planner: Method and options.
        bench: Where to measure.
        counts: See :func:`counts_for`.
        duration: Seconds, all in all.

    Raises:
        GateFailed: The times vary so much that they rank nothing.
        StageError: A model could not be made.
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
    """Makes short models, each in a folder."""

    def __init__(self, model: torch.nn.Module, planner: Planner, bench: Bench, folder: Path) -> None:
        self._model, self._planner, self._bench, self._folder = model, planner, bench, folder
        self._exports: dict[int, Exports] = {}  # models of another depth have another dense twin

    def made(self, count: int | None, plain: int) -> Any:
        """What the runtime runs of a short model; see :func:`shortened`."""
        folder = self._folder / f"{count or 'dense'}-{plain}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        short = shortened(self._model, self._planner, count, plain)
        return self._bench.artifact(short, folder, self._exports.setdefault(plain, Exports()))

    def clear(self) -> None:
        """Removes the files of models that have been measured, but for the dense one."""
        for folder in self._folder.iterdir():
            if folder.is_dir() and not folder.name.startswith("dense"):
                shutil.rmtree(folder)


def check_noise(ratios: Mapping[int, np.ndarray], duration: float) -> None:
    """Refuses to rank by times that vary too much.

    Args:
        ratios: By number of tokens a short model's time over the dense one's, one a round.
        duration: Seconds that were measured, for the message.

    Raises:
        GateFailed: They do.
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
    """Seconds of four short models, from which those of the parts follow.

    Args:
        plain: Plain blocks of the longer ones.
        middle: Tokens of those that reduce.
        dense: The longer dense one.
        reduced: The longer one that reduces.
        lean_dense: The dense one without plain blocks.
        lean_reduced: The one that reduces, without plain blocks.
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
    """From the times of short models to those of their parts.

    Args:
        shape: The whole model's.
        anchors: What stem, head and a location are found from.
        ratios: By number of tokens a short model's time over the dense one's, one a round.
        about: Runtime, images a call, and clock.
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
    # Fewer tokens never cost more: what says so is noise. Steps stay steps.
    return Staircase(
        *about, (tokens, *counts), never_rising(own), (dense, *lows), (dense, *highs), max(0.0, outside), location
    )


def never_rising(values: Sequence[float]) -> tuple[float, ...]:
    """The sequence without a rise that is nearest by squares: neighbors that rise take their mean.

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
