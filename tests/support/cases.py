"""The table of cases for ``evit::TokenReorg``; every implementation of the op is tested with all of them.

Independent of frameworks: a case returns NumPy arrays; BF16 is ``ml_dtypes.bfloat16``, a dependency of onnx.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

DTYPES = {"fp32": np.dtype(np.float32), "fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
EPS = {name: float(ml_dtypes.finfo(dtype).eps) for name, dtype in DTYPES.items()}
SCORES = ("random", "ties", "equal", "zeros", "nan", "one_hot")


@dataclass(frozen=True)
class Case:
    """One call of the op.

    Attributes:
        batch: Images.
        prefix: Number of prefix tokens, which are always kept.
        candidates: N.
        width: C.
        keep: K.
        fuse: Whether there is a fused token.
        scores: One of ``SCORES``: ``random`` like a softmax row; ``ties`` four levels only; ``equal``; ``zeros``;
            ``nan`` some are NaN; ``one_hot`` a single 1 among zeros.
        values: ``normal``, or ``canceling``: rows of ±40000 under scores of 1, whose sum is small but whose partial
            sums overflow FP16 (65504), so that it must be summed in FP32. For an even N and K = 1 only.
    """

    batch: int
    prefix: int
    candidates: int
    width: int
    keep: int
    fuse: bool
    scores: str = "random"
    values: str = "normal"

    @property
    def id(self) -> str:
        """A readable name, unique in the table."""
        name = f"b{self.batch}-p{self.prefix}-n{self.candidates}-c{self.width}-k{self.keep}"
        return f"{name}-{'fuse' if self.fuse else 'drop'}-{self.scores}" + ("-canceling" * (self.values != "normal"))

    @property
    def has_order(self) -> bool:
        """Whether the contract fixes the order of idx; with NaN among the scores it only wants a valid choice."""
        return self.scores != "nan"

    def inputs(self, dtype: str) -> tuple[np.ndarray, np.ndarray]:
        """x ``[B, prefix + N, C]`` in the dtype and scores FP32 ``[B, N]``; the same on every call and machine."""
        random = np.random.default_rng(zlib.crc32(self.id.encode()))
        shape = (self.batch, self.prefix + self.candidates, self.width)
        if self.values == "canceling":
            half = self.candidates // 2
            signs = np.ones(shape[1])
            signs[self.prefix + half :] = -1  # long runs of one sign: partial sums exceed FP16
            x = 40000.0 * signs[None, :, None] + random.standard_normal(shape)
        else:
            x = random.standard_normal(shape)
        return x.astype(np.float32).astype(DTYPES[dtype]), self._scores(random)

    def _scores(self, random: np.random.Generator) -> np.ndarray:
        shape = (self.batch, self.candidates)
        if self.values == "canceling":
            return np.ones(shape, np.float32)
        exponentials = np.exp(2 * random.standard_normal(shape))
        # a tenth of the attention went to the prefix
        softmax = exponentials / (exponentials.sum(1, keepdims=True) * 1.1)
        match self.scores:
            case "random":
                scores = softmax
            case "ties":
                scores = random.integers(0, 4, shape) / (2.0 * self.candidates)
            case "equal":
                scores = np.full(shape, 1 / (self.candidates + 1))
            case "zeros":
                scores = np.zeros(shape)
            case "nan":
                scores = np.where(random.random(shape) < 0.3, np.nan, softmax)
                scores[:, -1] = np.nan  # at least one NaN
            case "one_hot":
                scores = np.zeros(shape)
                scores[np.arange(self.batch), random.integers(0, self.candidates, self.batch)] = 1
            case other:
                raise ValueError(other)
        return scores.astype(np.float32)


def _table() -> Iterator[Case]:
    # Every K of small N, with and without fusion; the prefix changes from one to the next.
    prefixes = (1, 2, 5, 0, 8)
    step = 0
    for candidates in (1, 2, 3, 7):
        for keep in range(1, candidates + 1):
            for fuse in (True, False):
                yield Case(2, prefixes[step % len(prefixes)], candidates, 8, keep, fuse)
                step += 1
    # Every kind of scores, at one small and one real size, with every prefix.
    for kind in SCORES:
        for prefix in prefixes:
            yield Case(3, prefix, 45, 16, 32, True, kind)
        yield Case(2, 1, 45, 16, 32, False, kind)
        yield Case(1, 1, 7, 4, 3, True, kind)
        yield Case(2, 1, 7, 4, 7, True, kind)
        yield Case(2, 1, 196, 24, 138, True, kind)
    # DeiT at 224 and keep rate 0.7, location by location; then at 384; DINOv2 with registers at 336; the extremes of K.
    for candidates, keep in ((196, 138), (139, 98), (99, 70), (71, 50)):
        yield Case(2, 1, candidates, 192, keep, True)
    yield Case(1, 2, 196, 384, 98, True)
    yield Case(1, 5, 576, 384, 404, True)
    yield Case(1, 5, 576, 64, 404, False)
    yield Case(1, 1, 576, 33, 1, True)
    yield Case(1, 1, 576, 33, 575, True)
    yield Case(1, 1, 576, 33, 576, True)
    yield Case(8, 1, 45, 1, 9, True)
    # Where the kernel switches from counting to merging and changes the number of row groups; and its maximum size.
    for candidates in (255, 256, 257, 319, 320, 511, 512, 513):
        yield Case(1, 1, candidates, 8, 40, True, "ties")
    yield Case(2, 1, 1025, 16, 64, True, "ties")
    yield Case(1, 1, 1024, 8, 64, True, "nan")
    yield Case(1, 8, 4096, 8, 32, True)
    yield Case(2, 1, 196, 16, 1, True, "equal", "canceling")
    yield Case(1, 1, 8, 3, 1, True, "equal", "canceling")


CASES = tuple(dict.fromkeys(_table()))
