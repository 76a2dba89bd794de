"""The op ``y, size = TokenMerge(x, sizes, choice)`` in PyTorch and as an ONNX function.

Each kept token becomes the mean of itself and the tokens that move to it, weighted by the number of patches in each.
The method provides the choice, which consists of three lists (:mod:`evit_deploy.tokens.choices`). A small matrix
product sums the tokens: unlike a scatter with addition, it adds in a fixed order, and every runtime supports it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evit_deploy.errors import InputError
from evit_deploy.tokens.operators.token_reorg import DOMAIN, DOMAIN_VERSION, precise, rows_of

if TYPE_CHECKING:
    import onnx

NAME = "TokenMerge"


def merge(x: Tensor, sizes: Tensor, choice: Tensor, keep: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merges tokens according to a choice.

    Args:
        x: ``[B, prefix + N, C]``.
        sizes: FP32 ``[B, N]``, above 0.
        choice: int ``[B, N + M]`` with M = N − K: K candidates that stay, M that move, M positions among the K.
        keep: K.
        prefix: Tokens in front, copied unchanged.

    Returns:
        ``[B, prefix + K, C]`` in x's dtype and the new sizes, FP32 ``[B, K]``.
    """
    candidates = x.shape[1] - prefix
    choice = choice.long()
    ordered = sizes.gather(1, choice[:, :candidates])
    staying, moving = ordered[:, :keep], ordered[:, keep:]
    targets = choice[:, candidates:]
    shares = (targets.unsqueeze(1) == torch.arange(keep, device=x.device)[:, None]) * moving.unsqueeze(1)  # [B, K, M]
    total = staying + shares.sum(-1)
    rows = rows_of(x, choice[:, :candidates], prefix)
    kept, moved = rows[:, :keep], rows[:, keep:]
    # The mean is computed as the kept token plus weighted differences to it, because a sum of tokens times sizes can
    # overflow FP16. Kept tokens that nothing moves to are unchanged, bit for bit.
    weights, differences = (shares / total.unsqueeze(-1)).to(x.dtype), moved - rows_of(kept, targets)
    with torch.autocast(x.device.type, enabled=False):  # otherwise mixed-precision training sums in half precision
        merged = kept + weights @ differences
    return torch.cat([x[:, :prefix], merged], dim=1), total


def token_merge(
    x: Tensor, sizes: Tensor, choice: Tensor, evidence: tuple[Tensor, ...], keep: int, prefix: int
) -> tuple[Tensor, Tensor]:
    """Like :func:`merge`, but becomes one ``evit::TokenMerge`` node during an ONNX export.

    Args:
        x: See :func:`merge`.
        sizes: See :func:`merge`.
        choice: int32, see :func:`merge`.
        evidence: Values that the choice is based on. The op does not use them; they are inputs of the exported node, so
            that a choice can be verified.
        keep: See :func:`merge`.
        prefix: See :func:`merge`.

    Raises:
        InputError: The shapes and ``keep`` do not match.
    """
    candidates = x.shape[1] - prefix
    if tuple(sizes.shape[1:]) != (candidates,):
        raise InputError("sizes do not fit the tokens", seen=list(sizes.shape), wanted=f"[batch, {candidates}]")
    if not 1 <= keep <= candidates or tuple(choice.shape[1:]) != (2 * candidates - keep,):
        raise InputError("the choice does not fit", seen=list(choice.shape), wanted=f"[batch, {2 * candidates - keep}]")
    if torch.onnx.is_in_onnx_export():
        batch, width = x.shape[0], x.shape[2]
        y, size = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}",
            (x, sizes, choice, *evidence),
            attrs={"keep": keep, "candidates": candidates, "prefix": prefix},
            dtypes=(x.dtype, torch.float32),
            shapes=((batch, prefix + keep, width), (batch, keep)),
            version=DOMAIN_VERSION,
        )
        return y, size
    return merge(x, precise(sizes), choice, keep, prefix)


# Rows are gathered by index from the flattened tokens of all images: with GatherND, OpenVINO first copies all tokens
# and needs a dozen more nodes. A merged token is computed as the kept token plus weighted differences to it, which
# takes three passes over the tokens instead of seven.
_FUNCTION = """
<opset_import: ["" : {opset}], domain: "evit",
 doc_string: "Merges tokens into others: means weighted by size. `choice` lists who stays, who moves, and whither.">
TokenMerge <keep, candidates, prefix> (x, sizes, choice{evidence}) => (y, size)
{{
  none = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  to_the_end = Constant <value_ints = [9223372036854775807]> ()
  one_element = Constant <value_ints = [1]> ()
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  keep_scalar = Constant <value_int: int = @keep> ()
  keep_count = Reshape (keep_scalar, one_element)
  candidates_scalar = Constant <value_int: int = @candidates> ()
  candidates_count = Reshape (candidates_scalar, one_element)
  moves_count = Sub (candidates_count, keep_count)
  prefix_scalar = Constant <value_int: int = @prefix> ()
  prefix_count = Reshape (prefix_scalar, one_element)
  tokens_count = Add (prefix_count, candidates_count)
  in_front_2d = Concat <axis = 0> (none, prefix_count, none, none)
  in_front_3d = Concat <axis = 0> (none, prefix_count, none, none, none, none)
  all_scalar = Add (prefix_scalar, keep_scalar)
  counted = Range (zero, all_scalar, one)
  offsets = Min (counted, prefix_count)
  numbers = Cast <to = 7> (choice)
  stay = Slice (numbers, none, keep_count, axis_1)
  move = Slice (numbers, keep_count, candidates_count, axis_1)
  targets = Slice (numbers, candidates_count, to_the_end, axis_1)
  stay_all = Pad (stay, in_front_2d)
  stay_rows = Add (stay_all, offsets)
  flat = Flatten <axis = 2> (x)
  batch_count = Shape <start = 0, end = 1> (x)
  batch = Squeeze (batch_count)
  images = Range (zero, batch, one)
  image_rows = Mul (images, tokens_count)
  image = Unsqueeze (image_rows, axis_1)
  stay_flat = Add (stay_rows, image)
  kept = Gather <axis = 0> (flat, stay_flat)
  joined_numbers = GatherElements <axis = 1> (stay, targets)
  pair_numbers = Concat <axis = 1> (move, joined_numbers)
  image_front = Add (image, prefix_count)
  pair_rows = Add (pair_numbers, image_front)
  pairs = Gather <axis = 0> (flat, pair_rows)
  moved = Slice (pairs, none, moves_count, axis_1)
  joined = Slice (pairs, moves_count, to_the_end, axis_1)
  staying = GatherElements <axis = 1> (sizes, stay)
  moving = GatherElements <axis = 1> (sizes, move)
  places = Range (zero, keep_scalar, one)
  places_column = Unsqueeze (places, axis_1)
  targets_row = Unsqueeze (targets, axis_1)
  joins = Equal (targets_row, places_column)
  joins_float = Cast <to = 1> (joins)
  moving_row = Unsqueeze (moving, axis_1)
  shares = Mul (joins_float, moving_row)
  gained = ReduceSum <keepdims = 0> (shares, axis_2)
  size = Add (staying, gained)
  size_column = Unsqueeze (size, axis_2)
  weights_float = Div (shares, size_column)
  weights_all = Pad (weights_float, in_front_3d)
  weights = CastLike (weights_all, x)
  differences = Sub (moved, joined)
  added = MatMul (weights, differences)
  y = Add (kept, added)
}}
"""


def onnx_function(opset: int, evidence: int) -> "onnx.FunctionProto":
    """The op's body in standard ONNX operators.

    Args:
        opset: Version of the default domain that the surrounding model imports.
        evidence: Number of inputs after the choice.
    """
    import onnx.parser

    names = "".join(f", evidence_{i}" for i in range(evidence))
    return onnx.parser.parse_function(_FUNCTION.format(opset=opset, evidence=names))
