"""Checks the kernel against the oracle, bit by bit against the host library, and under graphs and streams.

Outputs are in one buffer with gaps, filled with a pattern before each run, so that missing writes and writes out of
bounds are detected.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evit_deploy.errors import InputError
from evit_deploy.tokens.operators.kernel import TokenReorgKernel
from evit_deploy.tokens.operators.token_reorg import token_reorg
from tests.support.cases import CASES, Case
from tests.support.op_checks import TORCH, check_answer, to_numpy, to_torch

from .job import Job

POISON, GUARD = 0xA5, 256
"""The pattern byte, and the number of bytes before and after each output."""
REPLAYS = 20
REAL = ((196, 384, 138), (196, 768, 98), (576, 384, 404))
"""N, C and K of real models, for the batches."""
SHOWN = 5


class Outputs:
    """y and idx of many calls in one buffer filled with a pattern.

    Args:
        shapes: Of each call: y's shape, its dtype, idx's shape.
        device: Where.
        offset: Elements by which every y is off 16 bytes.
    """

    def __init__(self, shapes: Iterable[tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]], device: str, offset=0):
        at, places = GUARD, []
        for y_shape, dtype, idx_shape in shapes:
            for shape, kind, shift in ((y_shape, dtype, offset * dtype.itemsize), (idx_shape, torch.int32, 0)):
                size = int(np.prod(shape)) * kind.itemsize
                places.append((at + shift, size, kind, shape))
                at += -(-(size + shift) // 16) * 16 + GUARD
        self.memory = torch.full((at,), POISON, dtype=torch.uint8, device=device)
        views = [self.memory[start : start + size].view(kind).view(shape) for start, size, kind, shape in places]
        self.pairs = list(zip(views[::2], views[1::2], strict=True))
        self._places = places

    def poison(self) -> None:
        """Fills the buffer with the pattern."""
        self.memory.fill_(POISON)

    def guards_hold(self) -> bool:
        """Whether nothing was written outside the outputs."""
        outside = torch.ones_like(self.memory, dtype=torch.bool)
        for start, size, *_ in self._places:
            outside[start : start + size] = False
        return bool((self.memory[outside] == POISON).all())


def shifted(tensor: Tensor, offset: int) -> Tensor:
    """A copy at an address that is offset from 16-byte alignment by a number of elements."""
    room = tensor.new_empty(tensor.numel() + 16)
    return room[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


def shapes_of(case: Case, dtype: str) -> tuple[tuple[int, ...], torch.dtype, tuple[int, ...]]:
    """y's shape and dtype, idx's shape."""
    return (case.batch, case.prefix + case.keep + case.fuse, case.width), TORCH[dtype], (case.batch, case.keep)


def inputs_of(case: Case, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """x and scores."""
    x, scores = (to_torch(array).to(device) for array in case.inputs(dtype))
    return x, scores


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors on any devices are bitwise equal."""
    one, other = one.detach().cpu(), other.detach().cpu()
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    kind = {4: torch.int32, 2: torch.int16}[one.element_size()]
    return torch.equal(one.contiguous().view(kind), other.contiguous().view(kind))


def host_beside(library: Path) -> TokenReorgKernel | None:
    """The host library next to another library; ``None`` if there is none."""
    path = library.with_name("libevit_token_reorg_host.so")
    return TokenReorgKernel(path) if path.is_file() else None


def check_bits(job: Job) -> None:
    """All cases in all types, aligned and not; batches of real shapes; the operator that PyTorch's models call."""
    if not job.libraries:
        job.rows.add(failed="no kernel library runs here")
    for name, path in job.libraries.items():
        kernel, host = TokenReorgKernel(path), host_beside(path)
        if host is None:
            job.rows.add(library=name, check="host library's bits", failed="no libevit_token_reorg_host.so beside it")
        for dtype in TORCH:
            for offset in (0, 1):
                with job.rows.attempt(library=name, check="cases", dtype=dtype, offset=offset):
                    wrong = _wrong_cases(job, kernel, host, dtype, offset)
                    row = {"cases": len(CASES), "against": "oracle and host" if host else "oracle"}
                    job.rows.add(library=name, check="cases", dtype=dtype, offset=offset, wrong=wrong, **row)
        for dtype, shape in job.rows.in_time([(d, s) for s in REAL for d in TORCH], reserve=3):
            with job.rows.attempt(library=name, check="batches", dtype=dtype, shape=shape):
                wrong = _wrong_batches(job, kernel, host, dtype, shape)
                job.rows.add(library=name, check="batches", dtype=dtype, shape=shape, wrong=wrong)
        with job.rows.attempt(library=name, check="null idx"):
            job.rows.add(library=name, check="null idx", answer=_null_idx(job, kernel))
        with job.rows.attempt(library=name, check="token_reorg()"):
            job.rows.add(library=name, check="token_reorg()", **_operator(job, kernel))


def _wrong_cases(job: Job, kernel: TokenReorgKernel, host: TokenReorgKernel | None, dtype: str, offset: int) -> list:
    """Descriptions of the first few faults."""
    outputs = Outputs([shapes_of(case, dtype) for case in CASES], job.device.name, offset)
    for case, out in zip(CASES, outputs.pairs, strict=True):
        x, scores = inputs_of(case, dtype, job.device.name)
        kernel(shifted(x, offset), scores, case.keep, case.fuse, case.prefix, out=out)
    job.device.synchronize()
    wrong = [] if outputs.guards_hold() else ["something was written outside of the outputs"]
    for case, (y, idx) in zip(CASES, outputs.pairs, strict=True):
        arrays = case.inputs(dtype)
        try:
            check_answer(case, dtype, *arrays, to_numpy(y.cpu()), to_numpy(idx.cpu()))
        except AssertionError as error:
            wrong.append(f"{case.id}: oracle: {' '.join(str(error).split())[:80]}")
            continue
        if host is not None and case.has_order:
            x, scores = (to_torch(array) for array in arrays)
            wanted = host(x, scores, case.keep, case.fuse, case.prefix)
            if not (same_bits(y, wanted[0]) and same_bits(idx, wanted[1])):
                wrong.append(f"{case.id}: other bits than the host's")
    return [*wrong[:SHOWN], *([f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else [])]


def _batch_call(job: Job, shape: tuple[int, int, int], dtype: str, batch: int) -> tuple[Tensor, Tensor]:
    candidates, channels, _ = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, candidates + 1, channels, generator=generator).to(TORCH[dtype])
    return x.to(job.device.name), (torch.rand(batch, candidates, generator=generator) / candidates).to(job.device.name)


def _wrong_batches(job: Job, kernel: TokenReorgKernel, host: TokenReorgKernel | None, dtype: str, shape: tuple) -> list:
    """An image has the same bits in a batch of 1, 7 and 256 as on the host."""
    most = 8 if job.toy else 256
    x, scores = _batch_call(job, shape, dtype, most)
    y, idx = kernel(x, scores, shape[2])
    wrong = []
    for batch in (1, 7):
        outputs = Outputs([((batch, *y.shape[1:]), y.dtype, (batch, shape[2]))], job.device.name)
        kernel(x[:batch], scores[:batch], shape[2], out=outputs.pairs[0])
        job.device.synchronize()
        if not (same_bits(outputs.pairs[0][0], y[:batch]) and same_bits(outputs.pairs[0][1], idx[:batch])):
            wrong.append(f"batch {batch}: other bits than in a batch of {most}")
        if not outputs.guards_hold():
            wrong.append(f"batch {batch}: something was written outside of the outputs")
    if host is not None:
        some = slice(0, None, max(most // 16, 1))  # one image in 16, because the host is slow
        wanted = host(x[some].cpu(), scores[some].cpu(), shape[2])
        if not (same_bits(y[some], wanted[0]) and same_bits(idx[some], wanted[1])):
            wrong.append(f"batch {most}: other bits than the host's")
    return wrong


def _null_idx(job: Job, kernel: TokenReorgKernel) -> str:
    x, scores = _batch_call(job, REAL[0], "fp16", 2)
    wanted, _ = kernel(x, scores, REAL[0][2])
    y = torch.full_like(wanted, -1)
    try:
        kernel(x, scores, REAL[0][2], out=(y, torch.empty(0, dtype=torch.int32, device=x.device)))
    except InputError as error:
        return f"refused: {error}"
    return "taken, y is the same" if same_bits(y, wanted) else "taken, y is WRONG"


def _operator(job: Job, kernel: TokenReorgKernel) -> dict:
    """Whether ``token_reorg`` on this device uses the kernel: its fused rows are bitwise equal to the kernel's."""
    equal = 0
    ordered = [case for case in CASES if case.has_order]
    for case in ordered:
        x, scores = inputs_of(case, "fp16", job.device.name)
        y, idx = token_reorg(x, scores, case.keep, case.fuse, case.prefix)
        wanted = kernel(x, scores, case.keep, case.fuse, case.prefix)
        equal += same_bits(y, wanted[0]) and same_bits(idx, wanted[1])
    return {"cases": len(ordered), "equal": equal}


# ---- graphs and streams


def check_capture(job: Job) -> None:
    """All cases in one CUDA graph, replayed; on two streams at once; on a stream that is not the default."""
    if not job.libraries:
        job.rows.add(failed="no kernel library runs here")
    for name, path in job.libraries.items():
        kernel = TokenReorgKernel(path)
        for dtype in job.rows.in_time(TORCH):
            calls = [(case, *inputs_of(case, dtype, job.device.name)) for case in CASES if case.has_order]
            wanted = Outputs([shapes_of(case, dtype) for case, *_ in calls], job.device.name)
            found = Outputs([shapes_of(case, dtype) for case, *_ in calls], job.device.name)
            runs = [_bound(kernel, call, out) for call, out in zip(calls, found.pairs, strict=True)]
            for call, out in zip(calls, wanted.pairs, strict=True):
                _bound(kernel, call, out)()
            job.device.synchronize()
            rounds: dict[str, Callable[[], Callable[[], Any]]] = {
                "graph": lambda runs=runs: job.device.capture(runs),
                "two streams": lambda runs=runs: _on_streams(job, runs, 2),
                "another stream": lambda runs=runs: _on_streams(job, runs, 1),
            }
            for check, prepare in rounds.items():
                with job.rows.attempt(library=name, check=check, dtype=dtype):
                    again, wrong = prepare(), 0
                    for _ in range(REPLAYS):
                        found.poison()
                        job.device.synchronize()
                        again()
                        job.device.synchronize()
                        wrong += not torch.equal(found.memory, wanted.memory)
                    job.rows.add(library=name, check=check, dtype=dtype, calls=len(runs), rounds=REPLAYS, wrong=wrong)


def _bound(kernel: TokenReorgKernel, call: tuple[Case, Tensor, Tensor], out: tuple[Tensor, Tensor]) -> Callable:
    case, x, scores = call
    return lambda: kernel(x, scores, case.keep, case.fuse, case.prefix, out=out)


def _on_streams(job: Job, runs: list[Callable], count: int) -> Callable[[], None]:
    def round_() -> None:
        streams = [job.device.stream() for _ in range(count)]
        for number, run in enumerate(runs):
            with streams[number % count]:
                run()

    return round_
