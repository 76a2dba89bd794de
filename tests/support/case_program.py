"""Calls of ``evit::TokenReorg`` for the programs ``token_reorg_cases`` and ``token_reorg_cases_gpu``, as bytes.

``plugins/token_reorg/test/cases.cpp`` reads the calls and writes the results; it has no other selection of cases.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from evit_deploy.tokens.operators.kernel import DTYPES, Cut
from tests.support.cases import Case
from tests.support.op_checks import TORCH

_HEADER = np.dtype([("pointers", "u8", 4), ("call", "i4", 7), ("", "i4"), ("how", "i4", 6)])
CUTS = (
    Cut(),
    Cut(lanes=4, tiles=1, early=1),
    Cut(lanes=2, tiles=3, slices=3, early=2),
    Cut(lanes=16, tiles=1, slices=2, early=1),
    Cut(lanes=1, tiles=7, slices=64, early=2),
    Cut(slices=5, early=2),
)
"""Ways to divide the work; none may change the result by a bit."""


@dataclass(frozen=True)
class ProgramCall:
    """One call.

    Attributes:
        case: The case to run.
        dtype: Type of x.
        offset: Offset of x and y from a 16-byte boundary, in elements.
        cut: How the work is divided.
    """

    case: Case
    dtype: str
    offset: int = 0
    cut: Cut = CUTS[0]


def sent(calls: Iterable[ProgramCall]) -> bytes:
    """Encodes calls as the program's input."""
    parts = []
    for one in calls:
        case = one.case
        x, scores = case.inputs(one.dtype)
        header = np.zeros((), _HEADER)
        sizes = case.batch, case.prefix, case.candidates, case.width, case.keep, case.fuse
        header["call"] = DTYPES[TORCH[one.dtype]], *sizes
        header["how"] = one.offset, *msgspec.structs.astuple(one.cut)
        parts += [header.tobytes(), x.tobytes(), scores.tobytes()]
    return b"".join(parts)


def answered(calls: Iterable[ProgramCall], said: bytes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Decodes y and idx of each call from the program's output.

    Raises:
        ValueError: The program refused a call, or its output has the wrong length.
    """
    at = 0
    for one in calls:
        case, dtype = one.case, one.case.inputs(one.dtype)[0].dtype
        y_shape = case.batch, case.prefix + case.keep + case.fuse, case.width
        y_size, idx_size = int(np.prod(y_shape)), case.batch * case.keep
        end = at + 4 + y_size * dtype.itemsize + 4 * idx_size
        if len(said) < at + 4 or said[at : at + 4] != bytes(4) or len(said) < end:
            raise ValueError(f"no answer to {case.id} in {one.dtype}")
        y = np.frombuffer(said, dtype, y_size, at + 4).reshape(y_shape)
        yield y, np.frombuffer(said, np.int32, idx_size, end - 4 * idx_size).reshape(case.batch, case.keep)
        at = end
    if at != len(said):
        raise ValueError(f"{len(said) - at} bytes more than the answers")
