"""Checks of results of ``evit::TokenReorg``, for every implementation of the op."""

import functools

import numpy as np
import pytest
import torch

from tests.support import oracle
from tests.support.cases import CASES, DTYPES, EPS, Case

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def to_torch(array: np.ndarray) -> torch.Tensor:
    """NumPy to PyTorch; BF16 is transferred as bits, because PyTorch does not support ml_dtypes."""
    if array.dtype == DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(DTYPES["bf16"])
    return tensor.numpy()


@functools.cache
def chosen(case: Case) -> np.ndarray:
    _, scores = case.inputs("fp32")
    return oracle.select(scores, case.keep)


def check_choice(case: Case, idx: np.ndarray) -> np.ndarray:
    """Checks idx, and returns the choice to check y with."""
    assert idx.dtype == np.int32
    assert idx.shape == (case.batch, case.keep)
    assert oracle.is_valid_choice(idx, case.candidates)
    if case.has_order:
        np.testing.assert_array_equal(idx, chosen(case))
    return idx.astype(np.int64)


def check_copies(case: Case, x: np.ndarray, y: np.ndarray, kept: np.ndarray) -> None:
    """Checks the prefix and the kept rows exactly, because they are copies."""
    assert y.dtype == x.dtype
    assert y.shape == (case.batch, case.prefix + case.keep + case.fuse, case.width)
    np.testing.assert_array_equal(y[:, : case.prefix], x[:, : case.prefix])
    rows = np.take_along_axis(x[:, case.prefix :], kept[:, :, None], axis=1)
    np.testing.assert_array_equal(y[:, case.prefix : case.prefix + case.keep], rows)


def largest(error: np.ndarray) -> float:
    """The largest finite error; NaN must match the reference (checked by :func:`error_of`)."""
    return float(np.max(error, initial=0.0, where=~np.isnan(error)))


def error_of(y: np.ndarray, reference: np.ndarray) -> float:
    y = y.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(reference))
    return largest(np.abs(y - reference))


def check_answer(case: Case, dtype: str, x: np.ndarray, scores: np.ndarray, y: np.ndarray, idx: np.ndarray) -> None:
    """All checks against the oracle."""
    kept = check_choice(case, idx)
    check_copies(case, x, y, kept)
    reference = oracle.reorganize(x, scores, kept, case.fuse, case.prefix)
    # 4 eps for the rounding to x's dtype, plus the usual error bound for a sum of n products in FP32.
    finite = np.nan_to_num(scores)
    limit = 4 * EPS[dtype] * largest(np.abs(reference)) + oracle.fused_row_error(x, finite, kept, case.prefix)
    assert error_of(y, reference) <= limit
