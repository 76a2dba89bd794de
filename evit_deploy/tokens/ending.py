"""What a head never sees need not be computed: the last block of a model that classifies from its class token.

Its other tokens are keys and values of that block's attention, and nothing else. So queries, attention, projection and
MLP are computed for the tokens that the head sees. The answer is the same but for the order of additions; training and
what looks at all tokens use the model as it is.
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
