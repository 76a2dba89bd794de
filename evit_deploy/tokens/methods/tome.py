"""ToMe: "Token Merging: Your ViT But Faster" (ICLR 2023, arXiv 2210.09461), written from the paper.

Every block merges r tokens into others between attention and MLP. Each token at an even position (A) is matched to the
token at an odd position (B) with the most similar keys. Each of the r best pairs becomes one token, the mean of both
weighted by their numbers of patches. In later blocks, log(size) is added to the logits of a token's key, so that it
attracts as much attention as its patches did together (proportional attention).
"""

import logging
from fractions import Fraction
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from msgspec import Meta
from torch import Tensor

from evit_deploy.errors import InputError
from evit_deploy.tokens.choices import rounding_of
from evit_deploy.tokens.operators.token_reorg import precise, select
from evit_deploy.tokens.plan import BlockPlan, ModelShape, TokenPlan, TokenSpec, scheduled_rate
from evit_deploy.tokens.sized import SizedReducer
from evit_deploy.tokens.state import TokenState

_LOG = logging.getLogger(__name__)
TINY = 1e-12
"""Lower limit on the norm that a token's keys are divided by."""

Merges = Annotated[int, Meta(ge=0)]


class ToMe(SizedReducer):
    """Merges the r most similar pairs of tokens in every block."""

    takes_keep_rate = False
    needs_class_token = False
    score_name = "unlikeness to the nearest"
    needed = "Say how many tokens each block merges: --merge 13, method_options={'merge': 13}."

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """Options of the method.

        Args:
            merge: r, the number of tokens that each block merges; or a list with a number for each block, and 0 for the
                blocks after its end.
            inflect: For a single r, how the number changes with depth: linearly, starting from
                ``int(r · (1 − inflect))`` in the first block, with mean r. −1 is the paper's decreasing schedule, 0 the
                constant one.
            proportional_attention: Whether log(size) is added to the attention logits of the keys.
        """

        merge: Merges | tuple[Merges, ...]
        inflect: Annotated[float, Meta(ge=-1, le=1)] = 0.0
        proportional_attention: bool = True

    options: Options

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: Any, shape: ModelShape, progress: float) -> TokenPlan:
        """See :meth:`TokenReducer.plan_for`; while a schedule runs, every r grows from 0."""
        _refuse_fields(spec)
        asked = merges(options, shape.depth)
        listed, half = isinstance(options.merge, tuple), shape.patches // 2
        reached = max(asked[:1] if listed else [asked[0], options.merge], default=0)
        if reached > half:
            raise InputError(
                "too many tokens to merge in one block", where="merge", seen=reached,
                wanted=f"at most {half}, half of the {shape.patches} patches",
            )  # fmt: skip
        share = 1 - Fraction(repr(scheduled_rate(0.0, progress)))
        tokens, blocks = shape.prefix + shape.patches, []
        for block, wanted in enumerate(asked):
            candidates = tokens - shape.prefix
            if listed and wanted > candidates // 2 and progress >= 1:
                raise InputError(
                    f"too many tokens to merge in block {block}", where="merge", seen=wanted,
                    wanted=f"at most {candidates // 2}, half of the {candidates} that are left",
                )  # fmt: skip
            gone = min(int(share * wanted), candidates // 2)
            blocks.append(_row(block, tokens, candidates, gone))
            tokens -= gone
        return TokenPlan(shape.prefix, shape.patches, tuple(blocks), shape.cost)

    @classmethod
    def label(cls, spec: TokenSpec, options: Any) -> str:
        """``r13``, ``r13-inflect-0.5``, ``r16-16-8``."""
        text = "r" + "-".join(map(str, options.merge if isinstance(options.merge, tuple) else (options.merge,)))
        text += f"-inflect-{options.inflect:g}" if options.inflect else ""
        return text if options.proportional_attention else f"{text}-no-proportional"

    @classmethod
    def attach(cls, model: Any, options: Any, plan: TokenPlan) -> None:
        """Adds no layers; logs a warning if fewer tokens merge than requested."""
        pairs = zip(merges(options, len(plan.blocks)), plan.blocks, strict=True)
        fewer = [row for wanted, row in pairs if wanted > row.tokens_in - row.tokens_out]
        if fewer:
            rows = ", ".join(f"{row.tokens_in - row.tokens_out} in block {row.block}" for row in fewer)
            _LOG.warning(f"Fewer tokens merge than asked for where they are more than half of what is left: {rows}.")

    @classmethod
    def margin(cls, scores: Any, exact: Any, choice: np.ndarray, row: BlockPlan) -> np.ndarray:
        """Margin of each token of A: whether it merges, and into which token; infinite for the tokens of B.

        Args:
            scores: Similarities ``[n, evens, odds]`` in the precision under test.
            exact: The same in FP64.
            choice: See :meth:`TokenReducer.margin`.
            row: See :meth:`TokenReducer.margin`.
        """
        matched = _Matched(choice, exact, row)
        nearest = matched.to_boundary()
        np.put_along_axis(nearest, matched.moved, np.minimum(matched.of(nearest), matched.to_second()[0]), axis=1)
        found = np.full((len(choice), row.tokens_in - row.tokens_out + row.keep), np.inf)  # type: ignore[operator]
        found[:, matched.first :: 2] = nearest / rounding_of(scores, exact)
        return found

    @classmethod
    def nearest_choice(cls, choice: np.ndarray, exact: Any, row: BlockPlan) -> np.ndarray:
        """The closer of two changes: the last pair is replaced by the next, or a token joins its second best match."""
        return _Matched(choice, exact, row).nearest()

    @classmethod
    def shown_scores(cls, scores: Any, prefix: int) -> np.ndarray:
        """See :meth:`TokenReducer.shown_scores`: 1 minus the best similarity for each token of A, NaN for B."""
        found = np.full((len(scores), scores.shape[1] + scores.shape[2]), np.nan)
        found[:, prefix % 2 :: 2] = 1 - scores.max(axis=2)
        return found

    # ---- one block

    def scores(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState | None = None) -> Tensor:
        """Cosine similarity between tokens at even and odd positions, of their keys' mean over heads.

        Args:
            x: See :meth:`TokenReducer.scores`.
            q: See :meth:`TokenReducer.scores`.
            k: See :meth:`TokenReducer.scores`.
            state: Not used.

        Returns:
            FP32 ``[B, evens, odds]``; positions count the prefix, but its tokens are in neither set.
        """
        # The choice of pairs has no gradient, so its inputs are detached.
        metric = precise(k.detach()).mean(2)
        metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(TINY)
        even, odd = metric[:, self.prefix + self.prefix % 2 :: 2], metric[:, self.prefix + 1 - self.prefix % 2 :: 2]
        if torch.onnx.is_in_onnx_export():
            return even @ odd.transpose(1, 2)
        with torch.autocast(x.device.type, enabled=False):  # otherwise AMP compares in half precision
            return even @ odd.transpose(1, 2)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState) -> tuple[Tensor, Tensor, TokenState]:  # type: ignore[override]
        """See :meth:`TokenReducer.forward`."""
        similarity = self.scores(x, q, k, state)
        if self.given is not None:
            choice = self.given
        else:
            choice = choose(similarity, self.plan.tokens_in - self.plan.tokens_out, self.prefix % 2)
        return self.merged(x, choice, (similarity,), state)


def merges(options: ToMe.Options, depth: int) -> list[int]:
    """Returns the number of tokens that each block should merge.

    Numbers are computed exactly as decimals: in floats, ``int(10 * (1 - 0.9))`` is 0.

    Args:
        options: The method's options.
        depth: Number of blocks.

    Raises:
        InputError: A list has more entries than the model has blocks, or is combined with ``inflect``.
    """
    merge = options.merge
    if isinstance(merge, tuple):
        if len(merge) > depth:
            raise InputError("more numbers than blocks", where="merge", seen=f"{len(merge)} numbers",
                             wanted=f"at most {depth}")  # fmt: skip
        if options.inflect:
            raise InputError(
                "inflect changes a single r with depth, but a list gives r for each block", where="inflect",
                seen=options.inflect, fix="Leave one of the two out.",
            )  # fmt: skip
        return [*merge, *[0] * (depth - len(merge))]
    first = int(merge * (1 - Fraction(repr(options.inflect))))
    step = Fraction(2 * (merge - first), max(depth - 1, 1))
    return [int(first + step * block) for block in range(depth)] if depth > 1 else [merge]


def _refuse_fields(spec: TokenSpec) -> None:
    if spec.keep_rate is not None:
        raise InputError(
            "the method 'tome' takes no keep rate: it merges a number of tokens in every block", where="keep_rate",
            seen=spec.keep_rate, fix="Give the number instead: --merge 13, method_options={'merge': 13}.",
        )  # fmt: skip
    if spec.locations is not None:
        raise InputError(
            "the method 'tome' takes no locations: it merges in every block", where="locations",
            seen=",".join(map(str, spec.locations)), fix="Use a list with r for each block: --merge 0,0,0,16,16.",
        )  # fmt: skip


def _row(block: int, tokens: int, candidates: int, gone: int) -> BlockPlan:
    if not gone:
        return BlockPlan(block, tokens, None, False, tokens)
    length = candidates + gone
    return BlockPlan(block, tokens, candidates - gone, False, tokens - gone, choice="merge", choice_indices=length)


def choose(similarity: Tensor, merge: int, first: int) -> Tensor:
    """Chooses the tokens of A that merge, and the tokens of B that they join; on ties, the lowest positions.

    Args:
        similarity: ``[B, evens, odds]``.
        merge: r.
        first: Index of the first candidate at an even position, 0 or 1.

    Returns:
        int32 ``[B, evens + odds + r]``: the kept candidates (A in order, then B), the moving ones (the most similar
        first), and for each moving one the position of its target among the kept ones.
    """
    evens, odds = similarity.shape[1:]
    best = similarity.amax(2)
    # On ties, ONNX's TopK returns the lowest index, but PyTorch's order is not defined.
    order = best.topk(evens).indices if torch.onnx.is_in_onnx_export() else select(best, evens)
    moved, others = order[:, :merge], order[:, merge:]
    # Only for the moving tokens: in OpenVINO, argmax over all tokens takes longer than their matrix product.
    joined = similarity.gather(1, moved[..., None].expand(-1, -1, odds)).argmax(2)
    staying = None
    if merge < evens:
        # Sorting instead of counting: OpenVINO 2026.4 counts incorrectly from the second image on.
        staying = others.topk(evens - merge, largest=False).values
    if order.is_cuda:  # constants copied from the host would synchronize and prevent CUDA graphs
        return numbered_by_parts(staying, moved, joined, odds, first)
    # One affine step for all parts, because on a CPU the overhead of each small operation exceeds its work. The indices
    # of B are constants: their slots hold arbitrary values, which are multiplied by 0.
    parts = [order[:, :odds], moved, joined]
    if odds > evens:
        parts.insert(1, moved[:, :1])
    if staying is not None:
        parts.insert(0, staying)
    scale = [2] * (evens - merge) + [0] * odds + [2] * merge + [1] * merge
    odd = [2 * number + 1 - first for number in range(odds)]
    shift = [first] * (evens - merge) + odd + [first] * merge + [evens - merge] * merge
    return (torch.cat(parts, 1) * order.new_tensor(scale) + order.new_tensor(shift)).to(torch.int32)


def numbered_by_parts(staying: Tensor | None, moved: Tensor, joined: Tensor, odds: int, first: int) -> Tensor:
    """Computes :func:`choose`'s result from positions within A and B, without constants from the host.

    Args:
        staying: int64 ``[B, evens − r]``, in order; ``None`` if all of A move.
        moved: int64 ``[B, r]``.
        joined: int64 ``[B, r]``.
        odds: Number of tokens in B.
        first: See :func:`choose`.
    """
    numbers = (2 * torch.arange(odds, device=moved.device) + 1 - first).expand(len(moved), -1)
    front = [] if staying is None else [2 * staying + first]
    evens_left = 0 if staying is None else staying.shape[1]
    return torch.cat([*front, numbers, 2 * moved + first, joined + evens_left], 1).to(torch.int32)


class _Matched:
    """A choice together with the similarities it is based on, in NumPy; tokens are numbered within A and within B.

    Args:
        choice: See :func:`choose`.
        exact: Similarities ``[n, evens, odds]`` in FP64.
        row: The block's plan.
    """

    def __init__(self, choice: np.ndarray, exact: np.ndarray, row: BlockPlan) -> None:
        assert row.keep is not None
        self.choice, self.exact = choice, exact
        self.evens, self.odds = exact.shape[1:]
        self.merge = row.tokens_in - row.tokens_out
        self.first = 1 - int(choice[0, row.keep - self.odds])  # the tokens of B are the last of the kept ones
        candidates = self.evens + self.odds
        self.moved = (choice[:, row.keep : candidates].astype(np.int64) - self.first) // 2
        self.joined = choice[:, candidates:].astype(np.int64) - (self.evens - self.merge)
        self.best = exact.max(axis=2)

    def of(self, each: np.ndarray) -> np.ndarray:
        """Selects from ``[n, evens, ...]`` the entries of the moving tokens ``[n, r, ...]``."""
        return each[np.arange(len(each))[:, None], self.moved]

    def to_boundary(self) -> np.ndarray:
        """Distance of each best similarity in A from the boundary of the r highest, ``[n, evens]``."""
        if self.merge == self.evens:
            return np.full(self.best.shape, np.inf)
        ranked = -np.sort(-self.best, axis=1)
        return np.abs(self.best - ranked[:, self.merge - 1 : self.merge + 1].mean(axis=1, keepdims=True))

    def to_second(self) -> tuple[np.ndarray, np.ndarray]:
        """For each moving token, the similarity gap to its second best match, and that match's index, ``[n, r]``."""
        similar = self.of(self.exact).copy()
        taken = self.joined[..., None]
        own = np.take_along_axis(similar, taken, axis=2)[..., 0]
        np.put_along_axis(similar, taken, -np.inf, axis=2)
        return np.maximum(own - similar.max(axis=2), 0), similar.argmax(axis=2)

    def nearest(self) -> np.ndarray:
        """See :meth:`ToMe.nearest_choice`."""
        gaps, second = self.to_second()
        found = self.choice.copy()
        for image in range(len(found)):
            moved, joined = self.moved[image].copy(), self.joined[image].copy()
            best = self.best[image]
            last = int(best[moved].argmin())
            staying = np.setdiff1d(np.arange(self.evens), moved)
            following = int(staying[best[staying].argmax()]) if len(staying) else -1
            closest = int(gaps[image].argmin())
            if following >= 0 and abs(best[moved[last]] - best[following]) <= gaps[image, closest]:
                moved[last], joined[last] = following, int(self.exact[image, following].argmax())
            elif self.odds > 1:
                joined[closest] = second[image, closest]
            found[image] = self._choice(moved, joined)
        return found

    def _choice(self, moved: np.ndarray, joined: np.ndarray) -> np.ndarray:
        staying = np.setdiff1d(np.arange(self.evens), moved)
        odd = 2 * np.arange(self.odds) + (1 - self.first)
        return np.concatenate([2 * staying + self.first, odd, 2 * moved + self.first, joined + len(staying)])
