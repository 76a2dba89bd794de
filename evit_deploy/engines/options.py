"""Checks of the options for building an engine, before any work."""

from pathlib import Path

import msgspec

from evit_deploy.engines.plugin.library import choose_plugin
from evit_deploy.environment import nvidia as gpu
from evit_deploy.environment.availability import RTX_GPUS, TENSORRT, Needs, availability
from evit_deploy.environment.requirements import require_extra
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.recipe.options import BuildOptions


class Builder(msgspec.Struct, frozen=True):
    """A library that builds engines.

    Args:
        module: Its Python module.
        needs: Its requirements.
    """

    module: str
    needs: Needs


TENSORRT_RTX = "tensorrt-rtx"
BUILDERS = {
    TENSORRT: Builder("tensorrt", Needs(extra=TENSORRT, wheel=TENSORRT, gpu=True)),
    TENSORRT_RTX: Builder(
        "tensorrt_rtx",
        Needs(extra=TENSORRT_RTX, wheel=TENSORRT_RTX, gpu=True, ahead=True, gpus=RTX_GPUS, label="TensorRT-RTX"),
    ),
}
"""Builders by name, which is also the name of their target and of the family of their plans."""
_DATA_CENTRE = ("sm90", "sm100", "sm103")
_LEAST = {"fp8": 89, "bf16": 80}
"""Lowest compute capability with matrix units for a type."""
_WHICH_GPU = "An A100 is sm80, an A10 or RTX 30 sm86, an L4, L40 or RTX 40 sm89, an RTX 50 sm120."


def check_options(target: str, precision: str, options: BuildOptions) -> None:
    """Checks, before any work, that this machine can build an engine with these options.

    Args:
        target: ``tensorrt``, ``tensorrt-rtx`` or ``torch-tensorrt``, which checks for its packages itself.
        precision: Precision of the engine.
        options: Options for its builder.

    Raises:
        InputError: The options contradict the target or one another.
        MissingRequirement: The builder or its GPU is missing.
    """
    _check_values(options)
    if target in BUILDERS and BUILDERS[target].needs.ahead:
        _check_rtx(options)
    elif options.gpus:
        raise InputError(
            f"{target} builds for the GPU it runs on", where="--gpu", seen=", ".join(options.gpus),
            fix="Leave --gpu out, or use --target tensorrt-rtx, which builds ahead of time.",
        )  # fmt: skip
    for name in gpus_of(options):
        least = _LEAST.get(precision, 0)
        if int(name.removeprefix("sm")) < least:
            raise InputError(
                f"{name} cannot compute in {precision}", where="--precision", seen=precision,
                wanted=f"a GPU from sm{least} on", fix="Use --precision fp16 or int8.",
            )  # fmt: skip
    if target == TENSORRT and options.plugin is not None:
        choose_plugin(options.plugin)
    if target in BUILDERS:
        require_extra(target)
    if target == TENSORRT and (lacking := gpu.missing_gpu()) is not None:
        raise MissingRequirement(
            f"TensorRT builds on the GPU that will run the engine: {lacking.what}",
            where="--target tensorrt",
            seen=lacking.seen,
            fix="Build where the engine will run, or ahead of time with --target tensorrt-rtx --gpu sm80.",
        )


def _check_values(options: BuildOptions) -> None:
    if not options.profiles:
        raise InputError("an engine covers at least one range of batch sizes", where="--batch", wanted="MIN:OPT:MAX")
    for profile in options.profiles:
        if not 1 <= profile.minimum <= profile.optimum <= profile.maximum:
            raise InputError(
                "not a range of batch sizes", where="--batch", seen=profile, wanted="1 <= MIN <= OPT <= MAX"
            )
    cache = Path(options.timing_cache) if options.timing_cache is not None else None
    if cache is not None and (cache.is_dir() or not cache.parent.is_dir()):
        raise InputError("cannot write there", where="--timing-cache", seen=cache)


def _check_rtx(options: BuildOptions) -> None:
    for field, why in (
        ("timing_cache", "has no use for a timing cache"),
        ("plugin", "takes no plugins: the operator's body is built in"),
        ("version_compatible", "runs an engine in its own version only: pip has no lean runtime for others"),
        ("hardware_compatible", "builds for every GPU that is named: repeat --gpu instead"),
    ):
        if getattr(options, field):
            raise InputError(f"TensorRT-RTX {why}", where=flag(field), fix="Leave it out.")
    gpus = gpus_of(options)
    if not gpus:
        raise InputError(
            "the GPU to build for is unknown, because this machine has none", where="--gpu", wanted=", ".join(RTX_GPUS),
            fix=_WHICH_GPU,
        )  # fmt: skip
    for name in gpus:
        if name not in RTX_GPUS:
            raise InputError(
                "not a GPU that TensorRT-RTX builds for", where="--gpu", seen=repr(name), wanted=", ".join(RTX_GPUS),
                fix="Hopper and data-center Blackwell need --target tensorrt." if name in _DATA_CENTRE else _WHICH_GPU,
            )  # fmt: skip


def flag(field: str) -> str:
    """Returns the command-line flag of a field of :class:`BuildOptions`."""
    return {"batches": "--batch", "gpus": "--gpu"}.get(field, "--" + field.replace("_", "-"))


def gpus_of(options: BuildOptions) -> tuple[str, ...]:
    """Returns the GPUs to build for, without duplicates: those in the options, else this machine's, if any."""
    current = gpu.compute_capability()
    return tuple(dict.fromkeys(options.gpus)) or ((current,) if current else ())


def usable(target: str) -> bool:
    """Whether this machine can build and run a builder's engines with default options."""
    found = availability(target, BUILDERS[target].needs)
    return found.builds and found.runs and gpu.missing_gpu() is None
