"""Skips computation in the last block for tokens that the head does not use.

If a model classifies from its class token, the other tokens of the last block only provide keys and values for the
attention. Queries, attention, projection and MLP are then computed only for the tokens that the head uses. The output
is the same except for the order of additions. Training and code that reads all tokens use the unchanged model.
"""

from typing import Any

from evit_deploy.tokens.backbone import backbone_of, copy_sharing_weights
from evit_deploy.tokens.reduce import token_plan


def for_inference(model: Any) -> Any:
    """Returns a copy of a model that computes only what its head uses; the copy shares the model's weights.

    Args:
        model: A model of a registered backbone.

    Returns:
        The copy, in evaluation mode. If the head uses all tokens or the last block removes some, every block is
        unchanged.
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
