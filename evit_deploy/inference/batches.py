"""Splits any number of images into calls that a runner supports."""

from collections.abc import Iterator, Sequence

from evit_deploy.recipe.options import BatchProfile

MOST = 32
"""Default maximum images per call; more would not be faster on a CPU, and need more memory."""


def calls_for(count: int, profiles: Sequence[BatchProfile], most: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Splits ``count`` images into calls.

    >>> list(calls_for(50, [BatchProfile(8, 16, 32)], 32))
    [(0, 32, 32), (32, 18, 18)]
    >>> list(calls_for(3, [BatchProfile(8, 16, 32)]))
    [(0, 3, 8)]

    Args:
        count: Number of images.
        profiles: Batch sizes that the runner supports; empty if it supports any.
        most: Maximum images per call, as far as the profiles allow it. Default: :data:`MOST`, or the size that an
            engine was tuned for.

    Yields:
        First image of a call, number of images in it, and the batch size that it must be padded to.
    """
    largest = most or max((profile.optimum for profile in profiles), default=MOST)
    if profiles:
        allowed = [min(largest, profile.maximum) for profile in profiles if profile.minimum <= largest]
        largest = max(allowed, default=min(profile.minimum for profile in profiles))
    start = 0
    while start < count:
        taken = min(largest, count - start)
        covering = [max(taken, profile.minimum) for profile in profiles if profile.maximum >= taken]
        yield start, taken, min(covering, default=taken)
        start += taken
