"""The contract of a reduction method: one class, of which every block that it touches has an instance."""

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
    """For methods without options of their own."""


class TokenReducer(nn.Module):
    """One block of one method: takes the tokens after the attention residual, gives back fewer.

    The simplest method says what a token is worth (:meth:`scores`). One that decides or combines otherwise overrides
    :meth:`forward`. One that carries something from block to block says so (:meth:`carries_state`); then *every* block
    of the model has a reducer, and a :class:`~evit_deploy.tokens.state.TokenState` passes through the hooks
    :meth:`start`, :meth:`before`, :meth:`key_bias`, :meth:`between`, :meth:`after` and :meth:`finish`.

    A method is registered in ``registry.METHODS``. One whose models are exported has scores in any case: they tell
    which choices lie within rounding. A reducer holds no parameters, so that a reduced model's ``state_dict`` has the
    dense model's keys; a method with its own layers adds them to the model (:meth:`attach`). What a child module
    called ``exact`` computes stays in FP32 in an exported file of any precision, as what leads to scores does.

    Args:
        plan: What this block has to do; replaced while a keep-rate schedule runs.
        prefix: Tokens in front that always stay.
        scale: Factor on the attention logits, d^-½.
        options: An instance of the class's ``Options``.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    exports: ClassVar[bool] = True
    """Whether each location is a ``token_reorg`` or a ``token_merge``, which become nodes of an exported file."""
    comparison_only: ClassVar[bool] = False
    """Whether it exists to compare others with, and is nothing that a user would deploy."""
    takes_keep_rate: ClassVar[bool] = True
    """Whether keep rates say how much is kept; if not, its options do."""
    default_keep_rate: ClassVar[float | None] = None
    """The rate of a spec that gives none; without one it has to be given."""
    needs_class_token: ClassVar[bool] = True
    """Whether it ranks by what the class token attends to."""
    needed: ClassVar[str] = ""
    """What to say to one who left out an option that has to be given."""
    own_parameters: ClassVar[tuple[str, ...]] = ()
    """How the names of the layers begin that :meth:`attach` adds."""
    needs_own_weights: ClassVar[bool] = False
    """Whether these layers decide, so that a model without trained ones is nothing that a user would deploy."""
    learns_from_dense: ClassVar[bool] = False
    """Whether it is trained to agree with the dense model that it starts from."""
    fuses: ClassVar[bool] = True
    """Whether a location can add a token that stands for those that it removes."""
    score_name: ClassVar[str] = "score"
    """What :meth:`shown_scores` are, in a picture's legend."""

    def __init__(self, plan: BlockPlan, prefix: int, scale: float, options: msgspec.Struct) -> None:
        super().__init__()
        self.plan, self.prefix, self.scale, self.options = plan, prefix, scale, options
        self.stateful = False
        """Whether a state passes through; see :meth:`carries_state`."""
        self.given: Tensor | None = None
        """A choice to take instead of the reducer's own, as :meth:`forward` gives it; for verification."""

    # ---- the method as a whole

    @classmethod
    def unsupported(cls, model: Any) -> list[str]:
        """Why the method cannot reduce a model that its backbone can; empty when it can."""
        return []

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: msgspec.Struct, shape: ModelShape, progress: float) -> TokenPlan:
        """Decides every token count.

        Args:
            spec: What was asked for.
            options: The spec's options.
            shape: The model's.
            progress: Place on the keep-rate schedule, 0 (everything kept) to 1 (what the spec says).

        Raises:
            InputError: The spec does not fit the model.
        """
        return make_plan(
            spec, prefix=shape.prefix, patches=shape.patches, depth=shape.depth, cost=shape.cost, progress=progress
        )

    @classmethod
    def carries_state(cls, options: msgspec.Struct, pools: bool) -> bool:
        """Whether every block has a reducer through which a state passes.

        Args:
            options: The method's options.
            pools: Whether the model's head pools its patch tokens.
        """
        return False

    @classmethod
    def serves_pooling(cls, options: msgspec.Struct) -> bool:
        """Whether a head that pools patch tokens sees every patch, by its place or by the size of its token."""
        return False

    @classmethod
    def label(cls, spec: TokenSpec, options: msgspec.Struct) -> str:
        """How much is reduced, in a few characters that a file's name can hold: ``k0.7``."""
        return "k" + "-".join(f"{rate:g}" for rate in spec.rates)

    @classmethod
    def attach(cls, model: Any, options: msgspec.Struct, plan: TokenPlan) -> None:
        """Adds the method's own layers to a model whose blocks are about to be reduced."""

    @classmethod
    def detach(cls, model: Any) -> None:
        """Takes the method's own layers away again."""

    @classmethod
    def margin(cls, scores: Any, exact: Any, choice: np.ndarray, row: BlockPlan) -> np.ndarray:
        """How far each candidate is from being treated otherwise, over what rounding moves the decision by.

        Below 1 either is right. The default is for scores that are shares, of which the highest stay.

        Args:
            scores: What :meth:`scores` gives, in the precision that is examined.
            exact: The same in FP64.
            choice: What the FP32 model chose.
            row: The block's plan.

        Returns:
            ``[B, candidates]``.
        """
        assert row.keep is not None
        return share_margin(scores, exact, row.keep)

    @classmethod
    def nearest_choice(cls, choice: np.ndarray, exact: Any, row: BlockPlan) -> np.ndarray:
        """The choice that comes closest to one: by default the last that is kept makes room for the first that is not.

        Args:
            choice: As :meth:`forward` gives it.
            exact: What :meth:`scores` gives in FP64.
            row: The block's plan.
        """
        assert row.keep is not None
        return swap_last(choice, exact, row.keep)

    @classmethod
    def shown_scores(cls, scores: Any, prefix: int) -> np.ndarray:
        """What a picture shows of the scores: one number for each candidate, high for those that stay as they are.

        By default the scores; of several arrays the first.

        Args:
            scores: What :meth:`scores` gives, in NumPy.
            prefix: Tokens in front.

        Returns:
            ``[B, candidates]``; NaN for a candidate that no choice is about.
        """
        return scores[0] if isinstance(scores, tuple) else scores

    # ---- one block

    def bind(self, model: Any) -> None:
        """Remembers what it needs of the model's own layers, where ``nn.Module`` does not look for children."""

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Any:
        """How much each candidate matters; the highest stay, and the others are fused by it.

        A method with state takes it as a fourth argument.

        Args:
            x: Tokens after the attention residual ``[B, N, C]``.
            q: Queries of this block's attention ``[B, N, H, d]``.
            k: Its keys ``[B, N, H, d]``.

        Returns:
            FP32 ``[B, N - prefix]``; a method with its own :meth:`margin` may decide by something else.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement scores")

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
        """Reduces the tokens; a method with state takes it as a fourth argument and gives it back as a third value.

        Args:
            x: See :meth:`scores`.
            q: See :meth:`scores`.
            k: See :meth:`scores`.

        Returns:
            Tokens ``[B, tokens_out, C]`` and the choice, int32 ``[B, plan.choice_length]``: the kept candidates, or
            what is merged into what.
        """
        assert self.plan.keep is not None
        return self.reorganized(x, self.scores(x, q, k), self.plan.keep, self.plan.fused)

    def reorganized(self, x: Tensor, scores: Tensor, keep: int, fuse: bool) -> tuple[Tensor, Tensor]:
        """:func:`~evit_deploy.tokens.operators.token_reorg.token_reorg`, with the choice that is given, if one is."""
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
        """What happens before the block's attention; gives the tokens that it sees."""
        return x, state

    def key_bias(self, state: TokenState) -> Tensor | None:
        """What is added to the attention logits of each key, ``[B, 1, 1, N]``, prefix included."""
        return None

    def keep_mask(self, state: TokenState) -> Tensor | None:
        """1 for each token that the block's attention may look at, ``[B, N]``, else 0; ``None`` where it sees them all.

        For training alone. A token always sees itself.
        """
        return None

    def between(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """What happens between attention and MLP; by default :meth:`forward`, where the plan has a location."""
        if self.plan.keep is not None:
            x, _, state = self(x, q, k, state)
        return x, state

    @classmethod
    def idle(cls, row: BlockPlan) -> bool:
        """Whether :meth:`between` and :meth:`after` leave a block's tokens and their state alone.

        If they do so in the last block, it is computed only for the tokens that the head sees
        (:mod:`evit_deploy.tokens.ending`), and :meth:`finish` gets no others.
        """
        return row.keep is None and cls.between is TokenReducer.between and cls.after is TokenReducer.after

    def after(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """What happens after the block."""
        return x, state

    def finish(self, x: Tensor, state: TokenState) -> Tensor:
        """What the model's last norm sees."""
        return x

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        row = self.plan
        return f"block={row.block}, tokens {row.tokens_in} -> {row.tokens_out}, keep={row.keep}, fused={row.fused}"


def own_weights(model: Any, method: type[TokenReducer]) -> dict[str, Tensor]:
    """The weights of a method's own layers that came with a model's, by name; empty where none did.

    They lie in ``model.method_weights`` while the model does not use the method.

    Args:
        model: Any model.
        method: Whose.
    """
    kept: dict[str, Tensor] = getattr(model, "method_weights", {})
    return {name: value for name, value in kept.items() if name.startswith(method.own_parameters)}


def options_of(method: type[TokenReducer], spec: TokenSpec) -> Any:
    """The options of a spec in the method's own form.

    Raises:
        InputError: The method does not take them.
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
    """The methods that have an option that another does not know."""
    name = error.partition("unknown field `")[2].partition("`")[0]
    methods = [one for one in METHODS.offered() if name in METHODS.get(one).Options.__struct_fields__]
    return f"It is an option of the method {' and '.join(map(repr, methods))}." if methods else None
