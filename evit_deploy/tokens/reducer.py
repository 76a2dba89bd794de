"""The interface of a reduction method: a class with one instance in every block that it affects."""

from typing import Any, ClassVar

import msgspec
import numpy as np
from torch import Tensor, nn

from evit_deploy.errors import InputError
from evit_deploy.registry import METHODS
from evit_deploy.tokens.choices import share_margin, swap_last
from evit_deploy.tokens.operators.token_reorg import reorganize, token_reorg
from evit_deploy.tokens.plan import BlockPlan, ModelShape, TokenPlan, TokenSpec, make_plan
from evit_deploy.tokens.state import TokenState


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a method that has none."""


class TokenReducer(nn.Module):
    """Reduces the tokens of one block: takes the tokens after the attention residual and returns fewer.

    The simplest method only implements :meth:`scores`, which scores each token. A method that selects or combines
    tokens differently overrides :meth:`forward`. A method that carries state from block to block overrides
    :meth:`carries_state`; *every* block of the model then has a reducer, and a
    :class:`~evit_deploy.tokens.state.TokenState` passes through the hooks :meth:`start`, :meth:`before`,
    :meth:`key_bias`, :meth:`between`, :meth:`after` and :meth:`finish`.

    Register a method in ``registry.METHODS``. A method with exported models must implement :meth:`scores`: verification
    uses the scores to find choices that rounding can change. A reducer has no parameters, so that a reduced model's
    ``state_dict`` has the dense model's keys; a method with its own layers adds them to the model (:meth:`attach`). In
    exported files of any precision, the computation of scores and of a child module named ``exact`` is kept in FP32.

    Args:
        plan: The block's token counts; replaced while a keep-rate schedule runs.
        prefix: Tokens in front of the patches that are always kept.
        scale: Factor on the attention logits, d^-½.
        options: An instance of the class's ``Options``.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    exports: ClassVar[bool] = True
    """Whether every location calls ``token_reorg`` or ``token_merge``, which become nodes of an exported file."""
    comparison_only: ClassVar[bool] = False
    """Whether the method is only a baseline for comparison, not meant for deployment."""
    takes_keep_rate: ClassVar[bool] = True
    """Whether keep rates set the number of kept tokens; otherwise, the method's options do."""
    default_keep_rate: ClassVar[float | None] = None
    """Keep rate of a spec without one; if ``None``, a keep rate is required."""
    needs_class_token: ClassVar[bool] = True
    """Whether the method ranks patches by the class token's attention."""
    needed: ClassVar[str] = ""
    """The fix to show when a required option is missing."""
    own_parameters: ClassVar[tuple[str, ...]] = ()
    """Name prefixes of the parameters that :meth:`attach` adds."""
    needs_own_weights: ClassVar[bool] = False
    """Whether these layers make the choice, so that a model without trained ones is not fit for deployment."""
    learns_from_dense: ClassVar[bool] = False
    """Whether the method is trained to agree with the dense model that it starts from."""
    fuses: ClassVar[bool] = True
    """Whether a location can add a token that represents the removed ones."""
    score_name: ClassVar[str] = "score"
    """Name of :meth:`shown_scores` in a picture's legend."""

    def __init__(self, plan: BlockPlan, prefix: int, scale: float, options: msgspec.Struct) -> None:
        super().__init__()
        self.plan, self.prefix, self.scale, self.options = plan, prefix, scale, options
        self.stateful = False
        """Whether a state passes through this reducer; see :meth:`carries_state`."""
        self.given: Tensor | None = None
        """A choice, as returned by :meth:`forward`, that replaces the reducer's own; for verification."""

    # ---- the method

    @classmethod
    def unsupported(cls, model: Any) -> list[str]:
        """Reasons why the method cannot reduce a model that its backbone can, or an empty list."""
        return []

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: msgspec.Struct, shape: ModelShape, progress: float) -> TokenPlan:
        """Decides every token count.

        Args:
            spec: The requested token reduction.
            options: The spec's options.
            shape: The model's shape.
            progress: Position on the keep-rate schedule, from 0 (everything is kept) to 1 (the spec's rates).

        Raises:
            InputError: The spec does not fit the model.
        """
        return make_plan(
            spec, prefix=shape.prefix, patches=shape.patches, depth=shape.depth, cost=shape.cost, progress=progress
        )

    @classmethod
    def carries_state(cls, options: msgspec.Struct, pools: bool) -> bool:
        """Whether every block has a reducer and a state passes through them.

        Args:
            options: The method's options.
            pools: Whether the model's head pools its patch tokens.
        """
        return False

    @classmethod
    def serves_pooling(cls, options: msgspec.Struct) -> bool:
        """Whether every patch still counts in a head that pools patch tokens, by its position or its token's size."""
        return False

    @classmethod
    def label(cls, spec: TokenSpec, options: msgspec.Struct) -> str:
        """Short label of the amount of reduction, usable in file names: ``k0.7``."""
        return "k" + "-".join(f"{rate:g}" for rate in spec.rates)

    @classmethod
    def attach(cls, model: Any, options: msgspec.Struct, plan: TokenPlan) -> None:
        """Adds the method's own layers to a model whose blocks are about to be reduced."""

    @classmethod
    def detach(cls, model: Any) -> None:
        """Removes the method's own layers."""

    @classmethod
    def margin(cls, scores: Any, exact: Any, choice: np.ndarray, row: BlockPlan) -> np.ndarray:
        """Distance of each candidate from a different decision, relative to the rounding error.

        Below 1, both decisions are correct. The default is for scores that are probabilities, the highest of which are
        kept.

        Args:
            scores: Result of :meth:`scores` in the precision under test.
            exact: The same in FP64.
            choice: The FP32 model's choice.
            row: The block's plan.

        Returns:
            ``[B, candidates]``.
        """
        assert row.keep is not None
        return share_margin(scores, exact, row.keep)

    @classmethod
    def nearest_choice(cls, choice: np.ndarray, exact: Any, row: BlockPlan) -> np.ndarray:
        """The next best choice: by default, the last kept candidate is swapped with the first that is not kept.

        Args:
            choice: The choice, as returned by :meth:`forward`.
            exact: Result of :meth:`scores` in FP64.
            row: The block's plan.
        """
        assert row.keep is not None
        return swap_last(choice, exact, row.keep)

    @classmethod
    def shown_scores(cls, scores: Any, prefix: int) -> np.ndarray:
        """Scores for pictures: one number per candidate, high for candidates that are kept unchanged.

        By default, the scores themselves; if there are several arrays, the first.

        Args:
            scores: Result of :meth:`scores` in NumPy.
            prefix: Tokens in front of the patches.

        Returns:
            ``[B, candidates]``; NaN for candidates that are not subject to a choice.
        """
        return scores[0] if isinstance(scores, tuple) else scores

    # ---- one block

    def bind(self, model: Any) -> None:
        """Stores references to the model's layers, in a place where ``nn.Module`` does not look for children."""

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Any:
        """Scores each candidate: the highest-scored are kept, and the scores weight the others in the fused token.

        A method with state takes the state as a fourth argument.

        Args:
            x: Tokens after the attention residual ``[B, N, C]``.
            q: Queries of this block's attention ``[B, N, H, d]``.
            k: Keys of this block's attention ``[B, N, H, d]``.

        Returns:
            FP32 ``[B, N - prefix]``; a method that overrides :meth:`margin` may return other values.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement scores")

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Reduces the tokens; a method with state takes it as a fourth argument and returns it as a third value.

        Args:
            x: See :meth:`scores`.
            q: See :meth:`scores`.
            k: See :meth:`scores`.

        Returns:
            Tokens ``[B, tokens_out, C]`` and the choice, int32 ``[B, plan.choice_length]``: the kept candidates, or
            which candidates are merged into which.
        """
        assert self.plan.keep is not None
        return self.reorganized(x, self.scores(x, q, k), self.plan.keep, self.plan.fused)

    def reorganized(self, x: Tensor, scores: Tensor, keep: int, fuse: bool) -> tuple[Tensor, Tensor]:
        """:func:`~evit_deploy.tokens.operators.token_reorg.token_reorg`, with the choice in ``given`` if it is set."""
        if self.given is not None:
            return reorganize(x, scores, self.given.long(), fuse, self.prefix), self.given
        return token_reorg(x, scores, keep, fuse, self.prefix)

    def start(self, x: Tensor) -> TokenState:
        """The state before the first block.

        Args:
            x: ``[B, prefix + patches, C]``.
        """
        return TokenState()

    def before(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Called before the block's attention; returns the tokens for the attention."""
        return x, state

    def key_bias(self, state: TokenState) -> Tensor | None:
        """Bias on the attention logits of each key, ``[B, 1, 1, N]``, including the prefix."""
        return None

    def keep_mask(self, state: TokenState) -> Tensor | None:
        """Mask of the block's attention, ``[B, N]``: 1 for tokens that are attended to, else 0; ``None`` for all.

        Only used in training. A token always attends to itself.
        """
        return None

    def between(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Called between attention and MLP; by default, it calls :meth:`forward` if the block is a location."""
        if self.plan.keep is not None:
            x, _, state = self(x, q, k, state)
        return x, state

    @classmethod
    def idle(cls, row: BlockPlan) -> bool:
        """Whether :meth:`between` and :meth:`after` do not change a block's tokens or their state.

        If so, the last block is computed only for the tokens that the head uses (:mod:`evit_deploy.tokens.ending`), and
        :meth:`finish` only receives these.
        """
        return row.keep is None and cls.between is TokenReducer.between and cls.after is TokenReducer.after

    def after(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Called after the block."""
        return x, state

    def finish(self, x: Tensor, state: TokenState) -> Tensor:
        """Returns the input of the model's last norm."""
        return x

    def extra_repr(self) -> str:
        """The block's token counts, for printing the model."""
        row = self.plan
        return f"block={row.block}, tokens {row.tokens_in} -> {row.tokens_out}, keep={row.keep}, fused={row.fused}"


def own_weights(model: Any, method: type[TokenReducer]) -> dict[str, Tensor]:
    """Weights of a method's own layers that were loaded with a model, by name; empty if there are none.

    They are stored in ``model.method_weights`` while the model does not use the method.

    Args:
        model: Any model.
        method: The method.
    """
    kept: dict[str, Tensor] = getattr(model, "method_weights", {})
    return {name: value for name, value in kept.items() if name.startswith(method.own_parameters)}


def options_of(method: type[TokenReducer], spec: TokenSpec) -> Any:
    """Converts a spec's options to the method's ``Options``.

    Raises:
        InputError: The method does not accept them.
    """
    try:
        return msgspec.convert(spec.options, method.Options)
    except msgspec.ValidationError as error:
        wanted = ", ".join(method.Options.__struct_fields__) or "no options"
        if str(error).startswith("Object missing required field"):
            name = str(error).split("`")[1]
            raise InputError(
                f"the method {spec.method!r} needs the option {name!r}", seen=spec.options, wanted=wanted,
                fix=method.needed or f"Give it: --method-option {name}=VALUE.",
            ) from None  # fmt: skip
        raise InputError(
            f"the method {spec.method!r} does not take these options: {error}", seen=spec.options, wanted=wanted,
            fix=_whose(str(error)),
        ) from None  # fmt: skip


def _whose(error: str) -> str | None:
    """A fix that names the methods with an option that the chosen method does not have."""
    name = error.partition("unknown field `")[2].partition("`")[0]
    methods = [one for one in METHODS.offered() if name in METHODS.get(one).Options.__struct_fields__]
    return f"It is an option of the method {' and '.join(map(repr, methods))}." if methods else None
