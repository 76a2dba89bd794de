"""The op ``y, idx = TokenReorg(x, scores)`` in PyTorch and as an ONNX function.

The op selects the K highest scores in descending order, with the lowest index first on ties. The fused row (equation 3)
is the sum of score · row over the rest, not normalized, in FP32. The method defines the scores.

The other implementations of the op (NumPy reference, CUDA) are tested on the same cases: ``tests/support/cases.py``.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evit_deploy.errors import InputError
from evit_deploy.tokens.operators import torch_ops

if TYPE_CHECKING:
    import onnx

DOMAIN = "evit"
NAME = "TokenReorg"
DOMAIN_VERSION = 1


def precise(tensor: Tensor) -> Tensor:
    """Converts to FP32, because half precision is too coarse for ranking; keeps FP64, which references use."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def select(scores: Tensor, keep: int) -> Tensor:
    """Indices of the ``keep`` highest scores, descending, lowest index first on ties.

    ``torch.topk`` does not define the order of ties, so a stable sort is used.

    Args:
        scores: ``[B, N]``.
        keep: K, 1 to N.

    Returns:
        int64 ``[B, K]``; valid and unique even where scores are NaN.
    """
    if torch.onnx.is_in_onnx_export():  # ONNX has no stable sort, but its TopK returns the lowest index first on ties
        return scores.topk(keep, dim=1).indices
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :keep]


def rows_of(x: Tensor, numbers: Tensor, prefix: int = 0) -> Tensor:
    """Gathers complete rows by index; ``gather`` works by element and takes five times as long on a CPU.

    Args:
        x: ``[B, prefix + N, C]``.
        numbers: int64 ``[B, K]``, counted without the prefix.
        prefix: Tokens in front of the candidates.

    Returns:
        ``[B, K, C]``.
    """
    first = torch.arange(x.shape[0], device=x.device) * x.shape[1] + prefix
    return x.flatten(0, 1).index_select(0, (numbers + first.unsqueeze(1)).flatten()).unflatten(0, numbers.shape)


def reorganize(x: Tensor, scores: Tensor, kept: Tensor, fuse: bool, prefix: int) -> Tensor:
    """Builds ``[prefix, kept rows, fused row]``.

    Args:
        x: ``[B, prefix + N, C]``.
        scores: FP32 ``[B, N]``, the weights of the fused row.
        kept: int64 ``[B, K]``.
        fuse: Whether to add the weighted sum of the rows that are not kept.
        prefix: Tokens in front, copied unchanged.

    Returns:
        ``[B, prefix + K + fuse, C]`` in x's dtype.
    """
    patches = x[:, prefix:]
    parts = [x[:, :prefix], rows_of(x, kept, prefix)]
    if fuse:
        rest, exact = scores.scatter(1, kept, 0.0), precise(patches)
        with torch.autocast(x.device.type, enabled=False):  # otherwise mixed-precision training sums in half precision
            parts.append(torch.bmm(rest.unsqueeze(1).to(exact.dtype), exact).to(x.dtype))
    return torch.cat(parts, dim=1)


def token_reorg(x: Tensor, scores: Tensor, keep: int, fuse: bool, prefix: int) -> tuple[Tensor, Tensor]:
    """Keeps the highest-scored tokens and, with ``fuse``, adds the weighted sum of the rest.

    Differentiable in ``x`` and, through the fused row, in ``scores``. During an ONNX export it becomes one
    ``evit::TokenReorg`` node. On a GPU it uses the compiled kernel if there is one
    (:mod:`evit_deploy.tokens.operators.torch_ops`), otherwise PyTorch.

    Args:
        x: ``[B, prefix + N, C]``, FP32, FP16 or BF16.
        scores: FP32 ``[B, N]``.
        keep: K, 1 to N.
        fuse: Whether to add the fused row.
        prefix: Tokens in front that are always kept.

    Returns:
        y ``[B, prefix + K + fuse, C]`` in x's dtype and idx int32 ``[B, K]``, 0-based over the candidates.

    Raises:
        InputError: The shapes and ``keep`` do not match.
    """
    candidates = x.shape[1] - prefix
    if tuple(scores.shape[1:]) != (candidates,):
        raise InputError("scores do not fit the tokens", seen=list(scores.shape), wanted=f"[batch, {candidates}]")
    if not 1 <= keep <= candidates:
        raise InputError("cannot keep that many tokens", seen=keep, wanted=f"1 to {candidates}")
    if torch.onnx.is_in_onnx_export():
        batch, width = x.shape[0], x.shape[2]
        y, kept = torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{NAME}",
            (x, scores),
            attrs={
                "keep": keep,
                "fuse": int(fuse),
                "prefix": prefix,
                # Without these attributes on the node, TensorRT >= 10.15 uses the function body, not a loaded plugin.
                "plugin_version": "1",
                "plugin_namespace": DOMAIN,
            },
            dtypes=(x.dtype, torch.int32),
            shapes=((batch, prefix + keep + int(fuse), width), (batch, keep)),
            version=DOMAIN_VERSION,
        )
        return y, kept
    if torch_ops.takes(x, scores, prefix):
        return torch.ops.evit.token_reorg(x, scores, keep, fuse, prefix)
    kept = select(scores, keep)
    return reorganize(x, scores, kept, fuse, prefix), kept.to(torch.int32)


# One body serves all attribute values: without fusion, the fused row is sliced to zero rows. GatherND is faster than
# GatherElements in OpenVINO and as fast elsewhere. The kept scores are overwritten with zero, because subtracting them
# from the total cancels in FP16. The zeros are made from the indices, so that they are 0 even if scores are NaN or
# infinite.
_FUNCTION = """
<opset_import: ["" : {opset}], domain: "evit",
 doc_string: "Keeps the best-scored tokens and sums up the rest by score (EViT, arXiv 2202.07800, algorithm 1).">
TokenReorg <keep, fuse, prefix> (x, scores) => (y, idx)
{{
  axis_0 = Constant <value_ints = [0]> ()
  axis_1 = Constant <value_ints = [1]> ()
  axis_2 = Constant <value_ints = [2]> ()
  to_the_end = Constant <value_ints = [9223372036854775807]> ()
  one_element = Constant <value_ints = [1]> ()
  keep_scalar = Constant <value_int: int = @keep> ()
  keep_count = Reshape (keep_scalar, one_element)
  fuse_scalar = Constant <value_int: int = @fuse> ()
  fuse_count = Reshape (fuse_scalar, one_element)
  prefix_scalar = Constant <value_int: int = @prefix> ()
  prefix_count = Reshape (prefix_scalar, one_element)
  front = Slice (x, axis_0, prefix_count, axis_1)
  patches = Slice (x, prefix_count, to_the_end, axis_1)
  top_scores, order = TopK <axis = 1, largest = 1, sorted = 1> (scores, keep_count)
  order_3d = Unsqueeze (order, axis_2)
  kept = GatherND <batch_dims = 1> (patches, order_3d)
  order_float = Cast <to = 1> (order)
  zero = Constant <value_float = 0.0> ()
  zeros = Mul (order_float, zero)
  rest = ScatterElements <axis = 1> (scores, order, zeros)
  rest_row = Unsqueeze (rest, axis_1)
  patches_float = Cast <to = 1> (patches)
  sum_float = MatMul (rest_row, patches_float)
  sum = CastLike (sum_float, x)
  fused = Slice (sum, axis_0, fuse_count, axis_1)
  y = Concat <axis = 1> (front, kept, fused)
  idx = Cast <to = 6> (order)
}}
"""


def onnx_function(opset: int) -> "onnx.FunctionProto":
    """The op's body in standard ONNX operators, for runtimes without a kernel for the op.

    Args:
        opset: Version of the default domain that the surrounding model imports.
    """
    import onnx.parser

    return onnx.parser.parse_function(_FUNCTION.format(opset=opset))
