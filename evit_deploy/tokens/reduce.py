"""The one verb: ``reduce_tokens_(model, TokenSpec(keep_rate=0.7))`` turns a ViT into an EViT in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from evit_deploy.errors import InputError
from evit_deploy.registry import METHODS
from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.op import token_reorg
from evit_deploy.tokens.plan import BlockPlan, TokenPlan, TokenSpec, make_plan


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """For methods without options of their own."""


class TokenReducer(nn.Module):
    """One location of one method: takes the tokens after the attention residual, gives back fewer.

    The contract of a method: it says what a token is worth (:meth:`scores`), or overrides :meth:`forward`, and is
    registered in ``registry.METHODS``. One whose models are exported has scores in any case: they tell which choices
    lie within rounding. Methods hold no parameters, so that a reduced model's ``state_dict`` is the dense model's.

    Args:
        plan: What this block has to do; replaced while a keep-rate schedule runs.
        prefix: Tokens in front that always stay.
        scale: Factor on the attention logits, d^-½.
        options: An instance of the class's ``Options``.
    """

    Options: ClassVar[type[msgspec.Struct]] = NoOptions
    exports: ClassVar[bool] = True
    """Whether :meth:`forward` goes through ``token_reorg``, which is what becomes a node of an exported file."""

    def __init__(self, plan: BlockPlan, prefix: int, scale: float, options: msgspec.Struct) -> None:
        super().__init__()
        self.plan, self.prefix, self.scale, self.options = plan, prefix, scale, options

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """How much each candidate matters; the highest stay, and the others are fused by it.

        Args:
            x: Tokens after the attention residual ``[B, N, C]``.
            q: Queries of this block's attention ``[B, N, H, d]``.
            k: Its keys ``[B, N, H, d]``.

        Returns:
            FP32 ``[B, N - prefix]``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say what a token is worth")

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Reduces the tokens.

        Args:
            x: See :meth:`scores`.
            q: See :meth:`scores`.
            k: See :meth:`scores`.

        Returns:
            Tokens ``[B, tokens_out, C]`` and the kept candidates, int32 ``[B, K]``.
        """
        assert self.plan.keep is not None
        return token_reorg(x, self.scores(x, q, k), self.plan.keep, self.plan.fused, self.prefix)

    def extra_repr(self) -> str:
        """Shown when the model is printed."""
        row = self.plan
        return f"block={row.block}, tokens {row.tokens_in} -> {row.tokens_out}, keep={row.keep}, fused={row.fused}"


def _plan(model: nn.Module, spec: TokenSpec, progress: float) -> TokenPlan:
    backbone = backbone_of(model)
    return make_plan(
        spec,
        prefix=backbone.prefix_tokens(model),
        patches=backbone.patches(model),
        depth=len(backbone.blocks(model)),
        cost=backbone.cost(model),
        progress=progress,
    )


def reduce_tokens_(model: nn.Module, spec: TokenSpec) -> nn.Module:
    """Makes a model reduce its tokens, in place; ``state_dict`` keys do not change.

    Call it before or after loading weights, and again to change the spec or after ``set_input_size``. Keep rate 1 gives
    the dense model back, bit for bit.

    Args:
        model: A model of a registered backbone (any timm ``VisionTransformer`` that classifies from its class token,
            or an LV-ViT).
        spec: What to do.

    Returns:
        The same model; ``token_plan(model)`` has its token counts.

    Raises:
        UnsupportedModelError: The model cannot be reduced exactly; the message has the reasons.
        InputError: The spec does not fit the model.
    """
    backbone = backbone_of(model)
    method = METHODS.get(spec.method)
    options = _options(method, spec)
    plan = _plan(model, spec, progress=1.0)
    blocks = backbone.blocks(model)
    for row in plan.blocks:
        present = blocks[row.block]
        block = backbone.original(present)
        block.training = present.training  # train() and eval() reached its children, but not the block put aside
        if row.keep is not None:
            reducer = method(row, plan.prefix, block.attn.scale, options)
            block = backbone.reduced(block, reducer.train(present.training))
        blocks[row.block] = block
    model.token_spec = spec  # type: ignore[assignment]  # plain attributes: no parameters, copied with the model
    model.token_plan = plan  # type: ignore[assignment]
    return model


def _options(method: type[TokenReducer], spec: TokenSpec) -> msgspec.Struct:
    try:
        return msgspec.convert(spec.options, method.Options)
    except msgspec.ValidationError as error:
        wanted = ", ".join(method.Options.__struct_fields__) or "no options"
        raise InputError(
            f"the method {spec.method!r} does not take these options: {error}", seen=spec.options, wanted=wanted
        ) from None


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy of a model without token reduction; its weights are the original's own."""
    return reduce_tokens_(copy_sharing_weights(model), TokenSpec(keep_rate=1.0))


def token_plan(model: nn.Module) -> TokenPlan:
    """The plan a model runs by; of a model that was never reduced, its dense plan.

    Raises:
        UnsupportedModelError: No registered backbone knows the model.
    """
    plan = getattr(model, "token_plan", None)
    return plan if isinstance(plan, TokenPlan) else _plan(model, TokenSpec(keep_rate=1.0), progress=1.0)


def token_spec(model: nn.Module) -> TokenSpec:
    """The spec a model was reduced with; keep rate 1 if it never was."""
    spec = getattr(model, "token_spec", None)
    return spec if isinstance(spec, TokenSpec) else TokenSpec(keep_rate=1.0)


def set_keep_rate_(model: nn.Module, progress: float) -> TokenPlan:
    """Moves a reduced model along the keep-rate schedule: rate 1 at progress 0, the spec's own rates at 1.

    Args:
        model: A model that ``reduce_tokens_`` has been called on.
        progress: 0 to 1.

    Returns:
        The plan that is now in force.
    """
    plan = _plan(model, token_spec(model), progress)
    for module in model.modules():
        if isinstance(module, TokenReducer):
            module.plan = plan.blocks[module.plan.block]
    model.token_plan = plan  # type: ignore[assignment]
    return plan


class Capture(msgspec.Struct):
    """What the reducers saw and chose in one forward pass, one entry a location.

    Args:
        kept: Candidates, int32 ``[B, K]``.
        scores: ``[B, N]``; none of a method that has no scores.
    """

    kept: list[Tensor] = []
    scores: list[Tensor] = []


@contextmanager
def capture(model: nn.Module) -> Iterator[Capture]:
    """Records kept candidates and scores of the forward passes inside."""
    seen = Capture([], [])

    def hook(reducer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        assert isinstance(reducer, TokenReducer)
        if type(reducer).scores is not TokenReducer.scores:
            seen.scores.append(reducer.scores(*inputs).detach())
        seen.kept.append(output[1].detach())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, TokenReducer)]
    try:
        with torch.inference_mode():
            yield seen
    finally:
        for handle in handles:
            handle.remove()
