"""How any number of images is cut into calls that a runner takes."""

from collections.abc import Iterator, Sequence

from evit_deploy.recipe.options import BatchProfile

MOST = 32
"""Images a call, unless the user or an engine says otherwise: more gain nothing on a CPU, and cost memory."""


def calls_for(count: int, profiles: Sequence[BatchProfile], most: int | None = None) -> Iterator[tuple[int, int, int]]:
    """Cuts ``count`` images into calls.

    >>> list(calls_for(50, [BatchProfile(8, 16, 32)], 32))
    [(0, 32, 32), (32, 18, 18)]
    >>> list(calls_for(3, [BatchProfile(8, 16, 32)]))
    [(0, 3, 8)]

    Args:
        count: Images.
        profiles: Batch sizes that the runner covers; none where it takes any.
        most: Images a call at most, where the profiles allow it; by default :data:`MOST`, or what an engine was tuned
            for.

    Yields:
        First image of a call, images in it, and the size that the call has to be filled up to.
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
