"""The compiled kernel of ``evit::TokenReorg``, called on PyTorch's tensors: what C++ and TensorRT call too.

``plugins/token_reorg`` has its source. The libraries that ``evit-deploy plugin build`` makes run on a GPU; the *host*
library is the same kernel run by threads of the CPU, to be tested without one.
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
    """``EvitTokenReorgCall``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "scores", "y", "idx")),
        *((name, ctypes.c_int32) for name in ("dtype", "batch", "prefix", "candidates", "channels", "keep", "fuse")),
    )


class _Cut(ctypes.Structure):
    """``EvitCut``."""

    _fields_ = tuple((name, ctypes.c_int32) for name in ("lanes", "tiles", "slices", "early", "threads"))


class _ScoresCall(ctypes.Structure):
    """``EvitClassScoresCall``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "probabilities", "scores")),
        *((name, ctypes.c_int64) for name in ("q_image", "q_head", "k_image", "k_token", "k_head")),
        *((name, ctypes.c_int32) for name in ("dtype", "batch", "heads", "tokens", "width", "prefix")),
        ("scale", ctypes.c_float),
    )


class Cut(msgspec.Struct, frozen=True):
    """How the work is divided. It changes no bit of the result; see ``token_reorg.h``. 0 is the kernel's choice.

    Args:
        lanes: Accesses side by side in a team, a power of two.
        tiles: Teams that share an image's columns.
        slices: Teams that share a tile's rows.
        early: 1 to load rows when it is known which of them stay, 2 to load the first before.
        threads: Of a team: 256 or 512 on a GPU, 1 to 64 on the CPU.
    """

    lanes: int = 0
    tiles: int = 0
    slices: int = 0
    early: int = 0
    threads: int = 0


OWN_CHOICE = Cut()


class TokenReorgKernel:
    """The kernels in a library: the reorganization, and the score row that EViT ranks by.

    Loading a library runs its code: load only what you built.

    Args:
        library: Any library that :func:`read_identity` knows.

    Raises:
        InputError: evit-deploy did not build the file, or its interface is another version's.
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
        """``y, idx = TokenReorg(x, scores)``; on a GPU on PyTorch's current stream, without waiting for it.

        Args:
            x: FP32, FP16 or BF16 ``[B, prefix + N, C]``, on the device that the library is for.
            scores: FP32 ``[B, N]``.
            keep: K, 1 to N.
            fuse: Whether the rest becomes one more row.
            prefix: Tokens in front that are no candidates, 0 to 8.
            out: Where y and idx go; they are allocated when ``None``.
            cut: How the work is shared out.

        Returns:
            y ``[B, prefix + K + fuse, C]`` in x's dtype and idx int32 ``[B, K]``.

        Raises:
            InputError: The tensors do not go together, or the kernel does not take them.
            StageError: CUDA refused.
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
        """Softmax of q_cls · Kᵀ · scale over all tokens, and its mean over heads at the candidates.

        Args:
            q: FP32, FP16 or BF16 ``[B, 1 or more, H, d]``, of which token 0 is read. A head's d elements lie side by
                side; heads, tokens and images may lie anywhere on a grid of 16 bytes.
            k: ``[B, N, H, d]``, in q's dtype.
            scale: Factor on the logits.
            prefix: Tokens in front that are no candidates.
            threads: Host library: members of a team, 1 to 64; 0 is one.

        Returns:
            Scores FP32 ``[B, N - prefix]`` and probabilities FP32 ``[B, H, N]``.

        Raises:
            InputError: The kernel does not take these.
            StageError: CUDA refused.
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
