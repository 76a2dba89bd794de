"""Calls the compiled kernel of ``evit::TokenReorg`` on PyTorch tensors; C++ and TensorRT call the same kernel.

The source is in ``plugins/token_reorg``. Libraries built by ``evit-deploy plugin build`` run on a GPU; the *host*
library runs the same kernel on CPU threads, so that it can be tested without a GPU.
"""

import ctypes
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.tokens.operators.library import ABI, read_identity

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_INVALID_CALL = 1


class _Call(ctypes.Structure):
    """The C struct ``EvitTokenReorgCall``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "scores", "y", "idx")),
        *((name, ctypes.c_int32) for name in ("dtype", "batch", "prefix", "candidates", "channels", "keep", "fuse")),
    )


class _Cut(ctypes.Structure):
    """The C struct ``EvitCut``."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("lanes", "tiles", "slices", "early", "threads"))


class _ScoresCall(ctypes.Structure):
    """The C struct ``EvitClassScoresCall``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "probabilities", "scores")),
        *((name, ctypes.c_int64) for name in ("q_image", "q_head", "k_image", "k_token", "k_head")),
        *((name, ctypes.c_int32) for name in ("dtype", "batch", "heads", "tokens", "width", "prefix")),
        ("scale", ctypes.c_float),
    )


class Cut(msgspec.Struct, frozen=True):
    """How the kernel divides its work; see ``token_reorg.h``. The result is bitwise the same for all values.

    For each field, 0 lets the kernel choose.

    Args:
        lanes: Adjacent accesses in a team, a power of two.
        tiles: Teams that share an image's columns.
        slices: Teams that share a tile's rows.
        early: 1 to load rows once the kept ones are known, 2 to load the first rows earlier.
        threads: Threads per team: 256 or 512 on a GPU, 1 to 64 on the CPU.
    """

    lanes: int = 0
    tiles: int = 0
    slices: int = 0
    early: int = 0
    threads: int = 0


OWN_CHOICE = Cut()


class TokenReorgKernel:
    """The kernels of a library: the reorganization, and the scores that EViT ranks by.

    Loading a library runs its code: only load libraries that you built.

    Args:
        library: A library that :func:`read_identity` accepts.

    Raises:
        InputError: The file was not built by evit-deploy, or has a different interface version.
        MissingRequirement: It cannot be loaded on this machine.
    """

    def __init__(self, library: Path) -> None:
        self.path, self.identity = library, read_identity(library)
        if self.identity.abi != ABI:
            raise InputError(
                "the library has a different interface", where=library, seen=self.identity.abi, wanted=ABI,
                fix="Build it with this version: evit-deploy plugin build.",
            )  # fmt: skip
        try:
            self._library = ctypes.CDLL(str(library.resolve()))
        except OSError as error:
            raise MissingRequirement(f"the library cannot be loaded ({error})", where=library) from None

    def __call__(
        self,
        x: Tensor,
        scores: Tensor,
        keep: int,
        fuse: bool = True,
        prefix: int = 1,
        *,
        out: tuple[Tensor, Tensor] | None = None,
        cut: Cut = OWN_CHOICE,
    ) -> tuple[Tensor, Tensor]:
        """``y, idx = TokenReorg(x, scores)``; on a GPU, asynchronously on PyTorch's current stream.

        Args:
            x: FP32, FP16 or BF16 ``[B, prefix + N, C]``, on the library's device.
            scores: FP32 ``[B, N]``.
            keep: K, 1 to N.
            fuse: Whether to add a fused row of the remaining tokens.
            prefix: Tokens in front that are not candidates, 0 to 8.
            out: Output tensors for y and idx; allocated if ``None``.
            cut: How the work is divided.

        Returns:
            y ``[B, prefix + K + fuse, C]`` in x's dtype and idx int32 ``[B, K]``.

        Raises:
            InputError: The tensors do not match each other, or the kernel does not support them.
            StageError: CUDA reported an error.
        """
        x, scores = x.contiguous(), scores.contiguous()
        self._check(x, scores, prefix)
        batch, tokens, channels = x.shape
        if out is None:
            y = x.new_empty((batch, max(prefix + keep + int(fuse), 0), channels))
            out = y, x.new_empty((batch, max(keep, 0)), dtype=torch.int32)
        pointers = (tensor.data_ptr() for tensor in (x, scores, *out))
        sizes = batch, prefix, tokens - prefix, channels, keep, int(fuse)
        call = _Call(*pointers, DTYPES[x.dtype], *sizes)
        shares = ctypes.byref(_Cut(*msgspec.structs.astuple(cut)))
        if self.identity.kind == "host":
            self._run("evit_token_reorg_on_host", ctypes.byref(call), shares)
        else:
            with torch.cuda.device(x.device):
                self._run("evit_token_reorg_cut", ctypes.byref(call), shares, _stream())
        return out

    def class_scores(
        self, q: Tensor, k: Tensor, scale: float, prefix: int, *, threads: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Softmax of q_cls · Kᵀ · scale over all tokens, and its mean over heads for the candidates.

        Args:
            q: FP32, FP16 or BF16 ``[B, 1 or more, H, d]``; only token 0 is read. The d elements of a head must be
                contiguous; heads, tokens and images may have any strides that are multiples of 16 bytes.
            k: ``[B, N, H, d]``, in q's dtype.
            scale: Factor on the logits.
            prefix: Tokens in front that are not candidates.
            threads: Host library only: threads per team, 1 to 64; 0 means 1.

        Returns:
            Scores FP32 ``[B, N - prefix]`` and probabilities FP32 ``[B, H, N]``.

        Raises:
            InputError: The kernel does not support these tensors.
            StageError: CUDA reported an error.
        """
        batch, tokens, heads, width = k.shape
        if q.dtype not in DTYPES or k.dtype != q.dtype or q.stride(-1) != 1 or k.stride(-1) != 1:
            raise InputError(
                "unsupported types, or elements of a head that are not contiguous", where="ClassScores",
                seen=f"q {q.dtype}, k {k.dtype}", wanted="both in FP32, FP16 or BF16",
            )  # fmt: skip
        probabilities = k.new_empty((batch, heads, tokens), dtype=torch.float32)
        scores = k.new_empty((batch, tokens - prefix), dtype=torch.float32)
        pointers = (tensor.data_ptr() for tensor in (q, k, probabilities, scores))
        strides = q.stride(0), q.stride(2), k.stride(0), k.stride(1), k.stride(2)
        call = _ScoresCall(*pointers, *strides, DTYPES[q.dtype], batch, heads, tokens, width, prefix, scale)
        if self.identity.kind == "host":
            self._run("evit_class_scores_on_host", ctypes.byref(call), threads)
        else:
            with torch.cuda.device(k.device):
                self._run("evit_class_scores", ctypes.byref(call), _stream())
        return scores, probabilities

    def _run(self, name: str, *arguments: Any) -> None:
        message = ctypes.create_string_buffer(256)
        status = getattr(self._library, name)(*arguments, message, ctypes.c_size_t(len(message)))
        if status:
            raise (InputError if status == _INVALID_CALL else StageError)(message.value.decode())

    def _check(self, x: Tensor, scores: Tensor, prefix: int) -> None:
        device = "cpu" if self.identity.kind == "host" else "cuda"
        if x.device.type != device or scores.device != x.device:
            raise InputError(
                f"this library is for tensors on {device}", where="TokenReorg", seen=f"{x.device}, {scores.device}"
            )
        if x.dtype not in DTYPES or scores.dtype != torch.float32:
            raise InputError(
                "unsupported types", where="TokenReorg", seen=f"x {x.dtype}, scores {scores.dtype}",
                wanted="x in FP32, FP16 or BF16, scores in FP32",
            )  # fmt: skip
        wanted = (x.shape[0], x.shape[1] - prefix) if x.dim() == 3 else None
        if wanted is None or tuple(scores.shape) != wanted:
            raise InputError(
                "x and scores do not match", where="TokenReorg", seen=f"{list(x.shape)}, {list(scores.shape)}",
                wanted="[batch, prefix + candidates, channels] and [batch, candidates]",
            )  # fmt: skip


def _stream() -> ctypes.c_void_p:
    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
