"""Choice of the batch sizes to measure."""

from collections.abc import Sequence

from evit_deploy.bundle.manifest import choose_profile
from evit_deploy.errors import InputError
from evit_deploy.recipe.options import BatchProfile

CPU_BATCH_SIZES = (1, 8, 32)
GPU_BATCH_SIZES = (1, 8, 32, 128)
"""128 is the batch size of the throughputs in the EViT paper."""


def sizes_within(profiles: Sequence[BatchProfile], sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns the batch sizes that profiles cover; if none is covered, those that the profiles were tuned for."""
    covered = tuple(n for n in sizes if covers(profiles, n))
    return covered or tuple(sorted({p.optimum for p in profiles}))


def covers(profiles: Sequence[BatchProfile], batch: int) -> bool:
    """Whether profiles cover a batch size; no profiles cover every size."""
    return not profiles or any(p.minimum <= batch <= p.maximum for p in profiles)


def sizes_for(
    profiles: Sequence[Sequence[BatchProfile]], asked: Sequence[int] | None, *, on_gpu: bool
) -> tuple[int, ...]:
    """Returns the batch sizes to measure.

    Args:
        profiles: Profiles of each candidate; empty if it supports any size.
        asked: Requested batch sizes, all of which must be supported; ``None`` for the defaults.
        on_gpu: Whether the defaults include 128.

    Raises:
        InputError: A candidate does not cover a requested size, or the candidates have no size in common.
    """
    own = [covered for covered in profiles if covered]
    if asked is not None:
        for covered in own:
            for batch in asked:
                choose_profile(covered, batch)
        return tuple(asked)
    optima = sorted({profile.optimum for covered in own for profile in covered})
    for sizes in (GPU_BATCH_SIZES if on_gpu else CPU_BATCH_SIZES, optima):
        common = tuple(batch for batch in sizes if all(covers(covered, batch) for covered in own))
        if common:
            return common
    raise InputError(
        "the engines have no usual batch size in common",
        seen="; ".join(" ".join(map(str, covered)) for covered in dict.fromkeys(map(tuple, own))),
        fix="Give one that all of them cover with --batch-sizes.",
    )
