"""``torch.ops.evit.token_reorg`` and ``class_scores``: the compiled kernels as PyTorch operators.

Eager PyTorch, ``torch.compile`` (one opaque node, no graph break) and training use these operators if a kernel is in
use: on CUDA, the library set by ``EVIT_DEPLOY_KERNEL``, or otherwise the one that ``evit-deploy plugin build`` built
for this GPU. In all other cases, :mod:`evit_deploy.tokens.operators.token_reorg` and
:mod:`evit_deploy.tokens.methods.evit` compute in PyTorch. The kernel's results are bitwise the same on every device and
in every batch; PyTorch's fused row differs from them by rounding.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.tokens.operators.kernel import DTYPES, TokenReorgKernel
from evit_deploy.tokens.operators.library import ABI, KERNEL, Identity, cache, read_identity

ENVIRONMENT = "EVIT_DEPLOY_KERNEL"
"""Environment variable with the path of the kernel's library, or ``none`` to use PyTorch's operations."""
MOST_CANDIDATES, MOST_PREFIX, MOST_HEAD_WIDTH = 4096, 8, 256
"""Limits of the kernel, as in ``token_reorg.h``."""
_LOG = logging.getLogger(__name__)
_IN_USE: dict[torch.device, TokenReorgKernel | None] = {}

torch.library.define(
    "evit::token_reorg", "(Tensor x, Tensor scores, int keep, bool fuse, int prefix) -> (Tensor, Tensor)"
)


torch.library.define("evit::class_scores", "(Tensor q, Tensor k, float scale, int prefix) -> (Tensor, Tensor)")


def _kernel_for(tensor: Tensor) -> TokenReorgKernel:
    kernel = kernel_on(tensor.device)
    if kernel is None:
        raise MissingRequirement(
            f"no kernel is in use on {tensor.device}", where="torch.ops.evit",
            fix=f"Run: evit-deploy plugin build. Or name a library: {ENVIRONMENT}=libevit_token_reorg.so.",
        )  # fmt: skip
    return kernel


# ---- the reorganization


@torch.library.impl("evit::token_reorg", ("cpu", "cuda"))
def _run(x: Tensor, scores: Tensor, keep: int, fuse: bool, prefix: int) -> tuple[Tensor, Tensor]:
    return _kernel_for(x)(x, scores, keep, fuse, prefix)


@torch.library.register_fake("evit::token_reorg")
def _shapes(x: Tensor, scores: Tensor, keep: int, fuse: bool, prefix: int) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    return x.new_empty((batch, prefix + keep + int(fuse), channels)), x.new_empty((batch, keep), dtype=torch.int32)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool, int], output: tuple[Tensor, Tensor]) -> None:
    x, scores, _, ctx.fuse, ctx.prefix = inputs
    ctx.save_for_backward(x if ctx.fuse else None, scores if ctx.fuse else None, output[1])
    ctx.shape = x.shape
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
    """Gradients of x and scores, for y = [prefix, kept rows, Σ score · row over the rest]."""
    x, scores, idx = ctx.saved_tensors
    (batch, tokens, channels), prefix = ctx.shape, ctx.prefix
    kept, last = idx.long(), grad.shape[1] - int(ctx.fuse)
    of_scores = None
    if ctx.fuse:
        weights = scores.scatter(1, kept, 0.0)
        fused = grad[:, last:].float()
        of_patches = (weights.unsqueeze(-1) * fused).to(grad.dtype)
        # Kept rows do not depend on their score.
        of_scores = torch.bmm(x[:, prefix:].float(), fused.transpose(1, 2)).squeeze(-1).scatter(1, kept, 0.0)
    else:
        of_patches = grad.new_zeros((batch, tokens - prefix, channels))
    rows = (kept + torch.arange(batch, device=kept.device).unsqueeze(1) * (tokens - prefix)).flatten()
    of_patches = of_patches.flatten(0, 1).index_copy(0, rows, grad[:, prefix:last].flatten(0, 1))
    return torch.cat([grad[:, :prefix], of_patches.unflatten(0, (batch, -1))], 1), of_scores, None, None, None


torch.library.register_autograd("evit::token_reorg", _gradients, setup_context=_remember)
# Autocast needs no rule: x keeps its dtype, scores are FP32, and the kernel sums in FP32.


# ---- the score row


@torch.library.impl("evit::class_scores", ("cpu", "cuda"))
def _run_scores(q: Tensor, k: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    # A compiled graph cannot check the alignment of addresses, so unaligned tensors are copied here.
    q, k = (t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.contiguous_format) for t in (q, k))
    return _kernel_for(k).class_scores(q, k, scale, prefix)


@torch.library.register_fake("evit::class_scores")
def _shapes_of_scores(q: Tensor, k: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = k.shape
    scores = k.new_empty((batch, tokens - prefix), dtype=torch.float32)
    return scores, k.new_empty((batch, heads, tokens), dtype=torch.float32)


def _remember_scores(ctx: Any, inputs: tuple[Tensor, Tensor, float, int], output: tuple[Tensor, Tensor]) -> None:
    q, k, ctx.scale, ctx.prefix = inputs
    ctx.save_for_backward(q, k, output[1])
    ctx.mark_non_differentiable(output[1])


def _gradients_of_scores(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
    """Gradients of q and k, for the mean over heads of softmax(q · Kᵀ · scale)."""
    q, k, probabilities = ctx.saved_tensors
    heads = probabilities.shape[1]
    grad = torch.nn.functional.pad(grad, (ctx.prefix, 0)).unsqueeze(1) / heads  # [B, 1, N], the same for every head
    inner = probabilities * (grad - (grad * probabilities).sum(-1, keepdim=True)) * ctx.scale  # of q · k: [B, H, N]
    of_k = inner.transpose(1, 2).unsqueeze(-1).to(k.dtype) * q[:, :1]
    of_q = torch.matmul(inner.unsqueeze(2).to(k.dtype), k.transpose(1, 2)).transpose(1, 2)
    rest = q.shape[1] - 1
    of_q = torch.nn.functional.pad(of_q, (0, 0, 0, 0, 0, rest)) if rest else of_q
    return of_q, of_k, None, None


torch.library.register_autograd("evit::class_scores", _gradients_of_scores, setup_context=_remember_scores)


# ---- choice of the kernel


def takes_scores(q: Tensor, k: Tensor) -> bool:
    """Whether the kernel in use on this device supports these queries and keys for the class scores.

    Args:
        q: ``[B, N, H, d]``.
        k: ``[B, N, H, d]``.
    """
    if k.dtype not in DTYPES or q.dtype != k.dtype or k.shape[1] > MOST_CANDIDATES:
        return False
    grid = 16 // k.element_size()
    side_by_side = q.stride(-1) == 1 and k.stride(-1) == 1 and k.shape[-1] <= MOST_HEAD_WIDTH
    on_grid = all(size % grid == 0 for t in (q, k) for size in (*t.stride()[:-1], t.shape[-1]))
    return side_by_side and on_grid and in_use(k.device)


def takes(x: Tensor, scores: Tensor, prefix: int) -> bool:
    """Whether the kernel in use on this device supports these arguments of the reorganization.

    Args:
        x: ``[B, prefix + N, C]``.
        scores: ``[B, N]``.
        prefix: Tokens in front that are always kept.
    """
    fits = x.dtype in DTYPES and scores.dtype == torch.float32
    return fits and prefix <= MOST_PREFIX and scores.shape[1] <= MOST_CANDIDATES and in_use(x.device)


@torch.compiler.assume_constant_result
def in_use(device: torch.device) -> bool:
    """Whether there is a kernel for tensors on a device; compiled graphs keep the result from their compilation.

    Exports keep PyTorch's operations, because readers of the exported graph do not have this project's operators.
    ``is_exporting()`` is called here, where Dynamo does not trace: in PyTorch 2.11, Dynamo evaluates it as true during
    compilation.
    """
    return not torch.compiler.is_exporting() and kernel_on(device) is not None


def kernel_on(device: torch.device) -> TokenReorgKernel | None:
    """Returns the kernel for tensors on a device; the first call finds and loads it.

    Raises:
        InputError: The library in ``EVIT_DEPLOY_KERNEL`` was not built by evit-deploy.
        MissingRequirement: It was not built for this GPU.
    """
    if device not in _IN_USE:
        _IN_USE[device] = _find(device) if device.type == "cuda" else None
        if _IN_USE[device] is not None:
            _LOG.debug("evit::TokenReorg on %s: compiled kernel", device)
    return _IN_USE[device]


@contextmanager
def using(kernel: TokenReorgKernel | None, device: torch.device | str) -> Iterator[None]:
    """Context manager that uses a kernel for tensors on a device, or PyTorch's operations.

    Graphs that are already compiled are not affected.

    Args:
        kernel: The kernel; ``None`` for PyTorch's operations.
        device: Device of the tensors.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:  # the devices of tensors have an index
        device = torch.device("cuda", torch.cuda.current_device())
    before = _IN_USE.get(device, ...)
    _IN_USE[device] = kernel
    try:
        yield
    finally:
        if before is ...:
            del _IN_USE[device]
        else:
            _IN_USE[device] = before


def _find(device: torch.device) -> TokenReorgKernel | None:
    capability = torch.cuda.get_device_capability(device)
    named = os.environ.get(ENVIRONMENT)
    if named == "none":
        return None
    if named:
        identity = read_identity(Path(named))
        if not runs_on(identity, capability):
            raise MissingRequirement(
                "the kernel was not built for this GPU", where=f"{ENVIRONMENT}={named}",
                seen=", ".join(identity.architectures), wanted="{}{}".format(*capability),
                fix="Build it here: evit-deploy plugin build.",
            )  # fmt: skip
        return TokenReorgKernel(Path(named))
    found = sorted(cache().glob(f"*/{KERNEL}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in found:
        try:
            identity = read_identity(path)
            if identity.abi == ABI and runs_on(identity, capability):
                return TokenReorgKernel(path)
        except (InputError, MissingRequirement) as error:  # found, not requested: a warning is enough
            _LOG.warning("ignoring a kernel in the cache: %s", error)
    return None


def runs_on(identity: Identity, capability: tuple[int, int]) -> bool:
    """Whether a library has code for a GPU.

    Machine code (``90-real``) runs on GPUs of the same major version and the same or a higher minor version, except
    that Jetson (87, 110) only runs its own. Without ``-real``, the library also has PTX, which the driver compiles for
    every newer GPU.

    Args:
        identity: The library's identity.
        capability: The GPU's compute capability.
    """
    gpu = capability[0] * 10 + capability[1]
    for name in identity.architectures:
        number = int(name.partition("-")[0])
        jetson = gpu != number and (gpu in (87, 110) or number in (87, 110))
        if not jetson and number // 10 == capability[0] and number <= gpu:
            return True
        if not name.endswith("-real") and number <= gpu:
            return True
    return False
