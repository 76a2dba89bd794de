"""The token plan: token counts of every block, computed in exact arithmetic before the model runs.

This module does not use PyTorch. Counts follow the paper's algorithm 1: of the N candidates (all tokens except the
prefix) a location keeps K = ceil(rate · N) and, with fusion, adds one token made of the rest. Python floats can make
counts too high (``ceil(.56 * 25)`` is 15), so a keep rate is interpreted as the decimal number that was written.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Literal, TypedDict

import msgspec

from evit_deploy.errors import InputError

SCHEDULE_DECIMALS = 6
"""Scheduled keep rates are rounded to this many decimals, so that every machine computes the same plan."""
MOST_BLOCKS = 10_000
"""Upper limit on the number of blocks, larger than in any model."""
FUSED = -1
"""Patch number of a fused token."""


class TokenOptions(TypedDict, total=False):
    """Fields of :class:`TokenSpec` as keyword arguments; missing ones come from the checkpoint, then the defaults."""

    keep_rate: float | tuple[float, ...]
    locations: tuple[int, ...]
    fuse: bool
    method: str
    method_options: dict[str, Any]


class TokenSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The requested token reduction; :func:`make_plan` computes token counts from it.

    Args:
        keep_rate: Fraction of the candidates to keep, in (0, 1]; one for all locations or one for each. ``None`` for
            methods that set token counts by their options.
        locations: 0-based indices of the blocks that reduce their tokens, strictly increasing; ``None`` means
            depth·i//4, i = 1, 2, 3.
        fuse: Whether each location adds one token with the weighted sum of the removed tokens (equation 3).
        method: Name of a registered method.
        options: The method's options.

    Raises:
        InputError: A value is out of range, or the numbers of rates and locations differ.
    """

    keep_rate: float | tuple[float, ...] | None = None
    locations: tuple[int, ...] | None = None
    fuse: bool = True
    method: str = "evit"
    options: dict[str, Any] = {}

    def __post_init__(self) -> None:
        for name in ("keep_rate", "locations"):  # callers may pass lists
            if isinstance(getattr(self, name), list):
                msgspec.structs.force_setattr(self, name, tuple(getattr(self, name)))
        for rate in self.rates:
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate <= 1:
                raise InputError(
                    "a keep rate is out of range", seen=repr(rate), wanted="a number in (0, 1]", fix=_rate_meant(rate)
                )
        if self.keep_rate == ():
            raise InputError("no keep rate given", seen="an empty list", wanted="one, or one for each location")
        if self.locations is not None:
            _check_locations(self.locations)
            if self.rates:
                _check_rate_count(self.rates, self.locations)

    @property
    def rates(self) -> tuple[float, ...]:
        """The keep rates as given, one or several; empty without a keep rate."""
        if self.keep_rate is None:
            return ()
        return self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,)

    @property
    def dense(self) -> bool:
        """Whether every location keeps all tokens."""
        return set(self.rates) == {1.0}

    def resolve(self, depth: int) -> tuple[tuple[int, float], ...]:
        """Pairs of (block, keep rate) for a model of ``depth`` blocks.

        Raises:
            InputError: A location is outside the model, the numbers of rates and locations differ, or there is no keep
                rate.
        """
        if self.keep_rate is None:
            raise InputError(
                f"the method {self.method!r} needs a keep rate", wanted="a number in (0, 1]", fix="Give keep_rate=0.7."
            )
        locations = self.locations if self.locations is not None else default_locations(depth)
        if locations and locations[-1] >= depth:
            raise InputError(
                "a location is outside the model", seen=locations[-1], wanted=f"blocks 0 to {depth - 1} (0-based)"
            )
        rates = self.keep_rate if isinstance(self.keep_rate, tuple) else (self.keep_rate,) * len(locations)
        if isinstance(self.keep_rate, tuple) and len(rates) == 1:
            rates *= len(locations)
        _check_rate_count(rates, locations)
        return tuple(zip(locations, rates, strict=True))


def _check_locations(locations: Sequence[int]) -> None:
    for location in locations:
        if isinstance(location, bool) or not isinstance(location, int) or not 0 <= location < MOST_BLOCKS:
            wanted = f"a whole number from 0 to {MOST_BLOCKS - 1}"
            raise InputError("a location is not a block index", seen=f"{location!r:.60}", wanted=wanted)
    if any(b <= a for a, b in itertools.pairwise(locations)):
        raise InputError(
            "locations are not strictly increasing",
            seen=",".join(map(str, locations)),
            wanted=",".join(map(str, sorted(set(locations)))),
        )


def _rate_meant(rate: Any) -> str:
    """The fix for a keep rate that is out of range, which often is a percentage."""
    if isinstance(rate, int | float) and not isinstance(rate, bool) and 1 < rate <= 100:
        return f"It is a share: for {rate:g} % give {rate / 100:g}."
    return "It is the share of patches that stay, for example 0.7."


def _check_rate_count(rates: Sequence[float], locations: Sequence[int]) -> None:
    if len(rates) not in (1, len(locations)):
        raise InputError(
            "the numbers of keep rates and locations differ",
            seen=f"{len(rates)} rates for {len(locations)} locations ({','.join(map(str, locations))})",
            wanted="one rate, or one for each location",
        )


def default_locations(depth: int) -> tuple[int, ...]:
    """The paper's locations: after a quarter, half and three quarters of the blocks (3, 6, 9 of 12; 4, 8, 12 of 16)."""
    return tuple(sorted({depth * i // 4 for i in (1, 2, 3)}))


def keep_count(keep_rate: float, candidates: int) -> int:
    """K = ceil(rate · N), computed exactly for the rate as a decimal number.

    >>> keep_count(0.7, 196), keep_count(0.56, 25)
    (138, 14)
    """
    return math.ceil(Fraction(repr(float(keep_rate))) * candidates)


def scheduled_rate(target: float, progress: float) -> float:
    """The scheduled keep rate, which decreases from 1 to the target along a cosine (the paper's section 4.1).

    Args:
        target: Keep rate at the end.
        progress: Completed fraction of the schedule, 0 to 1 (clamped).
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress == 1.0:
        return target
    return round(target + (1 - target) * 0.5 * (1 + math.cos(math.pi * progress)), SCHEDULE_DECIMALS)


class BlockCost(msgspec.Struct, frozen=True, omit_defaults=True):
    """Multiply-adds and dense token counts of one block, for models with different blocks.

    Args:
        tokens_in: Tokens in the block's attention without reduction.
        tokens_out: Tokens in its MLP or in its output without reduction.
        token_attention: Linear layers of its attention, per token.
        token_mlp: Linear layers of its MLP, per token.
        pair: Q·Kᵀ and A·V, per pair of tokens.
        fixed: Parts that process every token, so that their cost does not depend on the reduction.
    """

    tokens_in: int
    tokens_out: int
    token_attention: int = 0
    token_mlp: int = 0
    pair: int = 0
    fixed: int = 0


class ModelCost(msgspec.Struct, frozen=True, omit_defaults=True):
    """Multiply-adds of a model's parts; every matmul is counted once, as in the official EViT README.

    Args:
        stem: Patch embedding, per image.
        token_attention: Linear layers of one block's attention, per token.
        token_mlp: Linear layers of one block's MLP, per token.
        width: Heads × head width: Q·Kᵀ and A·V cost N²·width each.
        head: Classifier, per image.
        token_head: Classifier on every token except the prefix, per token (LV-ViT has one).
        blocks: Costs of each block if they differ (LeViT); ``token_attention``, ``token_mlp`` and ``width`` are then 0.
        head_tokens: Number of leading tokens that the head uses; 0 if it uses the patches.
        key_value: The part of ``token_attention`` that computes keys and values, which every token always needs.
    """

    stem: int
    token_attention: int
    token_mlp: int
    width: int
    head: int
    token_head: int = 0
    blocks: tuple[BlockCost, ...] = ()
    head_tokens: int = 0
    key_value: int = 0


class ModelShape(msgspec.Struct, frozen=True):
    """The properties of a model that a plan depends on.

    Args:
        prefix: Tokens in front of the patches (class, distillation, registers).
        patches: Patch tokens.
        depth: Blocks.
        width: Channels of a token.
        cost: Multiply-adds of the parts.
    """

    prefix: int
    patches: int
    depth: int
    width: int
    cost: ModelCost


class BlockPlan(msgspec.Struct, frozen=True, omit_defaults=True):
    """Token counts of one block; ``tokens_in`` and ``tokens_out`` include the prefix.

    Args:
        block: 0-based index.
        tokens_in: Tokens in the block's attention.
        keep: K, or ``None`` if the block does not reduce its tokens.
        fused: Whether a token is added that represents those that are not kept.
        tokens_out: Tokens in the block's MLP, and in the next block unless tokens wait or return in between.
        aside: Tokens that wait while this block runs.
        choice: Kind of choice: ``kept`` lists the kept candidates, ``merge`` lists which are merged into which.
        choice_indices: Length of the choice, if it is not K.
        method_macs: Multiply-adds of the method's own layers.
        places: Patch numbers of the location's candidates, if these are in order on a smaller grid.
        ranks: Whether a later block's choice uses the class attention of this block.
    """

    block: int
    tokens_in: int
    keep: int | None
    fused: bool
    tokens_out: int
    aside: int = 0
    choice: Literal["kept", "merge"] = "kept"
    choice_indices: int | None = None
    method_macs: int = 0
    places: tuple[int, ...] = ()
    ranks: bool = False

    @property
    def choice_length(self) -> int:
        """Length of a location's choice for one image; see :mod:`evit_deploy.tokens.choices`."""
        return self.choice_indices if self.choice_indices is not None else self.keep or 0


_MOST_TOKENS = 1 << 20
"""Upper limit on token counts: the patches of size 8 in an image of 8,192 × 8,192 pixels."""


def _counts(row: BlockPlan) -> tuple[int, ...]:
    return row.tokens_in, row.keep or 0, row.tokens_out, row.aside, row.choice_length, *row.places


class TokenPlan(msgspec.Struct, frozen=True):
    """Token counts of a complete model; prints as a table.

    Args:
        prefix: Tokens in front of the patches (class, distillation, registers); never removed.
        patches: Patch tokens at the model's image size.
        blocks: One entry per block.
        cost: Costs of the model's parts, if known; the table then includes multiply-adds.

    Raises:
        InputError: The counts are inconsistent or out of range.
    """

    prefix: int
    patches: int
    blocks: tuple[BlockPlan, ...]
    cost: ModelCost | None = None

    def __post_init__(self) -> None:
        counts = [self.prefix, self.patches, *(count for row in self.blocks for count in _counts(row))]
        if not all(0 <= count <= _MOST_TOKENS for count in counts):
            raise InputError("a plan's token counts are out of range", wanted=f"0 to {_MOST_TOKENS}")
        if [row.block for row in self.blocks] != list(range(len(self.blocks))) or not self.blocks:
            raise InputError("a plan's blocks are not numbered from 0")
        if any((row.keep or 0) > row.tokens_in or max(row.places, default=0) >= self.patches for row in self.blocks):
            raise InputError("a block keeps tokens that it does not have")
        if self.cost is not None and len(self.cost.blocks) not in (0, len(self.blocks)):
            raise InputError("the plan has costs for a different number of blocks", seen=len(self.cost.blocks))

    @property
    def attentions(self) -> int:
        """Number of ``Attention`` operators in an exported file; engines run each as one kernel.

        There is one per block, or none if the blocks differ (LeViT): values are wider than keys there, so attention is
        exported as matrix products.
        """
        return 0 if self.cost is not None and self.cost.blocks else len(self.blocks)

    @property
    def locations(self) -> tuple[BlockPlan, ...]:
        """The blocks that change their token count."""
        return tuple(block for block in self.blocks if block.keep is not None)

    @property
    def merging(self) -> frozenset[int]:
        """The blocks with a choice of kind ``merge``."""
        return frozenset(row.block for row in self.locations if row.choice == "merge")

    def dense(self) -> "TokenPlan":
        """The same model without token reduction."""
        n = self.prefix + self.patches
        own = self.cost.blocks if self.cost else ()
        counts = [(block.tokens_in, block.tokens_out) for block in own] or [(n, n)] * len(self.blocks)
        blocks = tuple(BlockPlan(i, before, None, False, after) for i, (before, after) in enumerate(counts))
        return TokenPlan(self.prefix, self.patches, blocks, self.cost)

    def block_macs(self, block: int) -> int:
        """Multiply-adds of one block: attention at its incoming token count, MLP at its outgoing one.

        The scores and the fused row are not counted, as in the published figures; they add less than 0.1 %.

        Raises:
            InputError: The plan has no costs.
        """
        if self.cost is None:
            raise InputError("this plan has no costs", fix="Make it from a model: token_plan(model).")
        row = self.blocks[block]
        if self.cost.blocks:
            own = self.cost.blocks[block]
            attention = row.tokens_in * own.token_attention + row.tokens_in**2 * own.pair
            return own.fixed + attention + row.tokens_out * own.token_mlp + row.method_macs
        attention = row.tokens_in * self.cost.token_attention + 2 * row.tokens_in**2 * self.cost.width
        return attention + row.tokens_out * self.cost.token_mlp + row.method_macs

    def macs(self) -> int:
        """Multiply-adds of the complete model for one image."""
        total = sum(self.block_macs(row.block) for row in self.blocks)
        assert self.cost is not None  # otherwise block_macs has raised; depth is never 0
        end = self.blocks[-1]  # waiting tokens are back after it, and their representative is removed
        last = self.patches if end.aside else end.tokens_out - self.prefix
        return total + self.cost.stem + self.cost.head + last * self.cost.token_head

    @property
    def ends_early(self) -> bool:
        """Whether the last block only needs to be computed for the tokens that the head uses."""
        end = self.blocks[-1]
        idle = end.keep is None and not end.aside and not end.ranks
        return self.cost is not None and 0 < self.cost.head_tokens < end.tokens_in and idle

    def computed_macs(self) -> int:
        """Multiply-adds that exported files and runtimes compute; :meth:`macs` counts the complete last block.

        They differ if the head uses only some of the last block's tokens; see :mod:`evit_deploy.tokens.ending`.
        """
        total = self.macs()
        if self.cost is None or not self.ends_early:
            return total
        cost, end = self.cost, self.blocks[-1]
        asking = cost.token_attention - cost.key_value + 2 * end.tokens_in * cost.width + cost.token_mlp
        return total - (end.tokens_in - cost.head_tokens) * asking

    def mac_ratio(self) -> float:
        """Dense multiply-adds over this plan's, counting the complete last block, as papers do."""
        return self.dense().macs() / self.macs()

    def computed_mac_ratio(self) -> float:
        """Dense computed multiply-adds over this plan's: the speed-up if time were proportional to arithmetic."""
        return self.dense().computed_macs() / self.computed_macs()

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The table's cells: block, tokens in, kept, fused, tokens out, and MMACs if the costs are known."""
        for row in self.blocks:
            cells = (
                str(row.block),
                str(row.tokens_in),
                "" if row.keep is None else str(row.keep),
                "+1" if row.fused else "",
                str(row.tokens_out),
            )
            yield (*cells, f"{self.block_macs(row.block) / 1e6:.1f}") if self.cost else cells

    @property
    def header(self) -> tuple[str, ...]:
        """The table's titles."""
        return ("block", "tokens in", "kept", "fused", "tokens out") + (("MMACs",) if self.cost else ())

    @property
    def total(self) -> str:
        """Multiply-adds of the complete model and of its dense form, as text; empty if the costs are not known."""
        if self.cost is None:
            return ""
        unit, name = (1e9, "GMACs") if self.macs() >= 1e9 else (1e6, "MMACs")
        dense = self.dense()
        text = f"total {self.macs() / unit:.2f} {name}, dense {dense.macs() / unit:.2f} {name}"
        if self.computed_macs() == self.macs() and dense.computed_macs() == dense.macs():
            return text
        return f"{text}; computed {self.computed_macs() / unit:.2f}, dense {dense.computed_macs() / unit:.2f}"

    def __str__(self) -> str:
        lines = [self.header, *self.rows()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        return "\n".join([*text, self.total] if self.cost else text)

    def __repr__(self) -> str:
        counts = [str(self.prefix + self.patches), *(str(row.tokens_out) for row in self.locations)]
        where = f" at blocks {', '.join(str(row.block) for row in self.locations)}" if self.locations else ""
        return f"TokenPlan({' → '.join(counts)} tokens{where}{', ' * bool(self.cost)}{self.total})"

    def _repr_html_(self) -> str:
        from evit_deploy.report.html import html_line, html_table

        return html_table(self.header, list(self.rows())) + (html_line(self.total) if self.cost else "")


def make_plan(
    spec: TokenSpec,
    *,
    prefix: int,
    patches: int,
    depth: int,
    cost: ModelCost | None = None,
    progress: float = 1.0,
    merging: bool = False,
) -> TokenPlan:
    """Decides every token count.

    Args:
        spec: The requested token reduction.
        prefix: Tokens in front of the patches.
        patches: Patch tokens.
        depth: Number of blocks.
        cost: Multiply-adds of the model's parts.
        progress: Position on the keep-rate schedule, from 0 (everything is kept) to 1 (the spec's rates).
        merging: Whether candidates that are not kept are merged into kept ones. With ``fuse``, one more candidate is
            then kept in place of the fused token, so that the token count is the same.

    Raises:
        InputError: The spec does not fit the model.
    """
    rates = dict(spec.resolve(depth))
    # Halfway, a location gets more tokens; one that drops none at the end must not drop any earlier either.
    if progress < 1:
        end = make_plan(spec, prefix=prefix, patches=patches, depth=depth, merging=merging)
        rates = {row.block: rates[row.block] for row in end.locations}
    tokens = prefix + patches
    blocks = []
    for block in range(depth):
        candidates = tokens - prefix
        keep = keep_count(scheduled_rate(rates[block], progress), candidates) if block in rates else candidates
        fuse = spec.fuse and not merging
        keep += spec.fuse and merging
        reduces = keep < candidates  # K = N, which the ceiling can also reach, changes nothing and needs no node
        after = prefix + keep + fuse if reduces else tokens
        row = BlockPlan(block, tokens, keep if reduces else None, reduces and fuse, after)
        if merging and reduces:
            row = msgspec.structs.replace(row, choice="merge", choice_indices=2 * candidates - keep)
        blocks.append(row)
        tokens = after
    return TokenPlan(prefix, patches, tuple(blocks), cost)
