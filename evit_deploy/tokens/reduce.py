"""``reduce_tokens_(model, TokenSpec(keep_rate=0.7))`` turns a ViT into an EViT in place."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from evit_deploy.errors import UnsupportedModelError
from evit_deploy.registry import METHODS
from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.plan import TokenPlan, TokenSpec
from evit_deploy.tokens.reducer import TokenReducer, options_of
from evit_deploy.tokens.state import TokenBlocks

_FOR_POOLING = (
    "Take evit's options normalize=true and sized=true, or squeeze=true, or the method merge, tome or evo-vit."
)


def _plan(model: nn.Module, spec: TokenSpec, progress: float) -> TokenPlan:
    backbone = backbone_of(model)
    method = backbone.method(spec.method)
    return method.plan_for(spec, options_of(method, spec), backbone.shape(model), progress)


def reduce_tokens_(model: nn.Module, spec: TokenSpec) -> nn.Module:
    """Adds token reduction to a model in place; the keys of the dense model's ``state_dict`` do not change.

    Call it before or after loading weights. Call it again to change the spec or after ``set_input_size``. Keep rate 1
    restores the dense model, bit for bit.

    Args:
        model: A model of a registered backbone (any timm ``VisionTransformer``, or an LV-ViT).
        spec: The token reduction to apply.

    Returns:
        The same model; ``token_plan(model)`` returns its token counts.

    Raises:
        UnsupportedModelError: The model cannot be reduced exactly, or not by this method; the message lists the
            reasons.
        InputError: The spec does not fit the model.
    """
    backbone = backbone_of(model)
    method = backbone.method(spec.method)
    options = options_of(method, spec)
    plan = _plan(model, spec, progress=1.0)
    reasons = _unsupported(model, method, spec, options) if plan.locations else []
    if reasons:
        loses = backbone.pools(model) and not method.serves_pooling(options)
        raise UnsupportedModelError(type(model).__name__, reasons, _FOR_POOLING if loses else None)
    backbone.method(token_spec(model).method).detach(model)
    container = backbone.blocks(model)
    if isinstance(container, TokenBlocks):
        backbone.set_blocks(model, container.replaced[0])
        container.replaced[0].train(container.training)
    blocks = backbone.blocks(model)
    stateful = bool(plan.locations) and method.carries_state(options, backbone.pools(model))
    if plan.locations:
        method.attach(model, options, plan)
    reduced = []
    for row in plan.blocks:
        present = blocks[row.block]
        block = backbone.original(present)
        block.training = present.training  # train() and eval() reached its children, but not the replaced block
        blocks[row.block] = block
        if stateful or row.keep is not None:
            reducer = method(row, plan.prefix, backbone.scale(block), options)
            reducer.stateful = stateful
            reducer.bind(model)
            block = backbone.reduced(block, reducer.train(present.training))
        reduced.append(block)
    if stateful:
        backbone.set_blocks(model, TokenBlocks(reduced, blocks))
    else:
        for index, block in enumerate(reduced):
            blocks[index] = block
    model.token_spec = spec  # type: ignore[assignment]  # plain attributes: not parameters, but copied with the model
    model.token_plan = plan  # type: ignore[assignment]
    return model


def _unsupported(model: nn.Module, method: type[TokenReducer], spec: TokenSpec, options: Any) -> list[str]:
    """Reasons why a method cannot reduce a model that its backbone can."""
    backbone, reasons = backbone_of(model), []
    if method.needs_class_token and not backbone.prefix_tokens(model):
        reasons.append("it has no class token, whose attention is the score")
    if backbone.pools(model) and not method.serves_pooling(options):
        lost = f"and the method {spec.method!r} neither keeps them all nor carries their sizes"
        reasons.append(f"its head pools the patch tokens, {lost}")
    return reasons + method.unsupported(model)


def dense_twin(model: nn.Module) -> nn.Module:
    """Returns a copy of a model without token reduction; the copy shares the original's weights."""
    return reduce_tokens_(copy_sharing_weights(model), TokenSpec(keep_rate=1.0))


def token_plan(model: nn.Module) -> TokenPlan:
    """Returns a model's current token plan; for a model that was never reduced, its dense plan.

    Raises:
        UnsupportedModelError: No registered backbone knows the model.
    """
    plan = getattr(model, "token_plan", None)
    return plan if isinstance(plan, TokenPlan) else _plan(model, TokenSpec(keep_rate=1.0), progress=1.0)


def token_spec(model: nn.Module) -> TokenSpec:
    """Returns the spec that a model was reduced with; keep rate 1 if it was never reduced."""
    spec = getattr(model, "token_spec", None)
    return spec if isinstance(spec, TokenSpec) else TokenSpec(keep_rate=1.0)


def token_label(spec: TokenSpec) -> str:
    """Short label of a method and its reduction, usable in file names: ``evit-k0.7``."""
    method = METHODS.get(spec.method)
    return f"{spec.method}-{method.label(spec, options_of(method, spec))}"


def set_keep_rate_(model: nn.Module, progress: float, options: Mapping[str, Any] | None = None) -> TokenPlan:
    """Moves a reduced model along the keep-rate schedule: rate 1 at progress 0, the spec's rates at progress 1.

    Args:
        model: A model that ``reduce_tokens_`` has been called on.
        progress: 0 to 1.
        options: Method options that override the spec's until the next call; only options that affect nothing but the
            plan.

    Returns:
        The new plan.
    """
    spec = token_spec(model)
    if options:
        spec = msgspec.structs.replace(spec, options=spec.options | dict(options))
    plan = _plan(model, spec, progress)
    for module in model.modules():
        if isinstance(module, TokenReducer):
            module.plan = plan.blocks[module.plan.block]
    model.token_plan = plan  # type: ignore[assignment]
    return plan


class Capture(msgspec.Struct):
    """Choices and scores of one forward pass, one entry per location.

    Args:
        kept: The choices, int32 ``[B, K]``; see :mod:`evit_deploy.tokens.choices`.
        scores: ``[B, N]``; empty for a method without scores.
    """

    kept: list[Tensor] = []
    scores: list[Any] = []


@contextmanager
def capture(model: nn.Module) -> Iterator[Capture]:
    """Context manager that records the choices and scores of the forward passes inside it."""
    seen = Capture([], [])

    def hook(reducer: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        assert isinstance(reducer, TokenReducer)
        if type(reducer).scores is not TokenReducer.scores:
            seen.scores.append(_detached(reducer.scores(*inputs)))
        seen.kept.append(output[1].detach())

    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, TokenReducer)]
    try:
        with torch.inference_mode():
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _detached(scores: Any) -> Any:
    return tuple(map(_detached, scores)) if isinstance(scores, tuple) else scores.detach()
