"""Skips what the head never sees: the last block of a model that classifies from its class token.

In that block, the other tokens only serve as keys and values of the attention. Queries, attention, projection and MLP
are computed only for the tokens that the head sees. The answer is the same except for the order of additions. Training,
and code that reads all tokens, use the unchanged model.
"""

from typing import Any

from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.reduce import token_plan


def for_inference(model: Any) -> Any:
    """A copy of a model that computes what its head sees and no more; its weights are the model's own.

    Args:
        model: A model of a registered backbone.

    Returns:
        The copy, in evaluation mode. Where the head sees all tokens, or the last block removes some, it is a plain one.
    """
    plan, backbone = token_plan(model), backbone_of(model)
    made = copy_sharing_weights(model).eval()
    if plan.cost is None or not plan.ends_early:
        return made
    blocks = backbone.blocks(made)
    reducer = getattr(blocks[-1], "reducer", None)
    if reducer is None or reducer.idle(reducer.plan):
        blocks[-1] = backbone.ending(blocks[-1], plan.cost.head_tokens)
    return made
