"""Speed of many keep rates side by side, as in the tables of the paper, with random weights.

All variants of a model are interleaved on all runtimes of one kind of device, so that a drift of the machine's speed
does not change their ratios.
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import onnx
import timm
import torch

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.engines import build
from evit_deploy.engines.options import BUILDERS, check_options
from evit_deploy.environment.command import commands
from evit_deploy.environment.machine import device, versions
from evit_deploy.environment.nvidia import compute_capability
from evit_deploy.errors import InputError
from evit_deploy.export.portable import export_onnx
from evit_deploy.export.precision import DTYPES, set_precision
from evit_deploy.files.drafts import draft
from evit_deploy.models.identify import check_model_name
from evit_deploy.profiling.candidates import Candidate
from evit_deploy.profiling.clocks.gpu_times import measure_on_gpu
from evit_deploy.profiling.clocks.turns import MINIMUM_ROUNDS, Times, random_feeds
from evit_deploy.profiling.speedup import ratios_to_dense, row_of
from evit_deploy.profiling.timing import measure_on_cpu
from evit_deploy.progress import doing
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.recipe.recipe import Sweep
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import ProfileRow, Report
from evit_deploy.runtimes.fp32 import TF32, missing_tf32
from evit_deploy.runtimes.runner import Runner
from evit_deploy.runtimes.select import check_tf32, opened
from evit_deploy.tokens.plan import TokenPlan, TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan

_LOG = logging.getLogger(__name__)

DENSE = "dense"
_DTYPES = DTYPES | {TF32: torch.float32}  # PyTorch's dtype of the weights


class Variant(msgspec.Struct, frozen=True):
    """One keep rate of one model.

    Args:
        name: ``dense``, ``0.7`` or ``0.7 without fusion``.
        model: PyTorch, FP32, on the CPU.
        plan: Its token plan.
    """

    name: str
    model: torch.nn.Module
    plan: TokenPlan


class Entry(msgspec.Struct, frozen=True):
    """One variant on one runtime.

    Args:
        runtime: Runtime and precision, such as ``eager fp32``.
        variant: The variant.
        runner: Its opened runner.
        on_gpu: Whether it computes on a GPU.
    """

    runtime: str
    variant: Variant
    runner: Runner
    on_gpu: bool


def sweep(recipe: Sweep) -> Report:
    """Runs a sweep.

    Args:
        recipe: The sweep.

    Returns:
        A row for every model, variant and runtime, with its speed-up over the dense model; published figures from the
        recipe as notes.

    Raises:
        InputError: An unknown runtime or precision, or a model that cannot be reduced.
        MissingRequirement: A runtime is not installed, or the GPU has no TF32.
        StageError: An engine could not be built.
    """
    pairs = [_pair(text, recipe.batch_size) for text in recipe.runtimes]
    report = Report(versions=versions(), device=device(), commands=commands())
    for name in recipe.models:
        doing(_LOG, f"making {name}")
        variants = list(_variants(name, recipe))
        with draft() as scratch, ExitStack() as stack:
            entries: list[Entry] = []
            for runtime, precision in pairs:
                for variant in variants:
                    doing(_LOG, f"{name}, {variant.name}: preparing {runtime} in {precision}")
                    place = scratch.folder / f"{len(entries)}"
                    artifact = _artifact(variant, name, runtime, precision, recipe.batch_size, place)
                    runner = stack.enter_context(opened(runtime, artifact, recipe.threads, tf32=precision == TF32))
                    on_gpu = Candidate(runtime, variant.name, artifact).on_gpu
                    entries.append(Entry(f"{runtime} {precision}", variant, runner, on_gpu))
            doing(_LOG, f"{name}: measuring {len(entries)} variants")
            report += _measured(name, entries, recipe)
        report += Report(notes=tuple(_published(name, recipe)))
    return report


def _pair(text: str, batch: int) -> tuple[str, str]:
    """Splits and checks a runtime with its precision, before any work."""
    runtime, _, precision = text.partition(":")
    if precision not in _DTYPES:
        raise InputError(
            "not a runtime with its precision", where="runtimes", seen=repr(text), wanted=f"RUNTIME:{'|'.join(_DTYPES)}"
        )
    check_tf32(runtime, tf32=precision == TF32)
    missing = RUNTIMES.get(runtime).missing()
    if missing is None and precision == TF32:
        missing = missing_tf32(_torch_device())
    if missing is not None:
        raise missing
    if runtime in BUILDERS:
        check_options(runtime, precision, _options(batch))
    return runtime, precision


def _torch_device() -> torch.device:
    """The device of PyTorch's runtimes: the GPU if there is one."""
    return torch.device("cuda" if compute_capability() else "cpu")


def _options(batch: int) -> BuildOptions:
    return BuildOptions(batches=((batch, batch, batch),))


def _variants(name: str, recipe: Sweep) -> Iterator[Variant]:
    check_model_name(name, where="models")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    specs = [(DENSE, TokenSpec(keep_rate=1.0))]
    for rate in recipe.keep_rates:
        for fuse in recipe.fuse:
            specs.append((f"{rate:g}" + ("" if fuse else " without fusion"), TokenSpec(keep_rate=rate, fuse=fuse)))
    for label, spec in specs:
        reduced = reduce_tokens_(copy.deepcopy(model), spec)
        yield Variant(label, reduced, token_plan(reduced))


def _artifact(variant: Variant, name: str, runtime: str, precision: str, batch: int, place: Path) -> Any:
    """Creates the artifact for a runtime: the module, an ONNX file, or an engine for the batch size."""
    files = RUNTIMES.get(runtime).files
    if not files:
        return copy.deepcopy(variant.model).to(_torch_device(), _DTYPES[precision])
    proto = export_onnx(variant.model, name=name, preprocess=Preprocess.from_model(variant.model))
    path = place.with_suffix(".onnx")
    onnx.save(set_precision(proto, precision), path)
    if runtime not in BUILDERS:
        return path
    plan = place.with_suffix(".plan")
    build.build_engine(path, plan, runtime, precision, _options(batch))
    return plan


def _measured(name: str, entries: Sequence[Entry], recipe: Sweep) -> Report:
    """Times a model's variants, interleaved with those on the same kind of device."""
    report = Report()
    for on_gpu in (False, True):
        own = [entry for entry in entries if entry.on_gpu == on_gpu]
        runners, batch = [entry.runner for entry in own], recipe.batch_size
        if on_gpu and own:
            times = measure_on_gpu(runners, random_feeds(runners, batch), recipe.duration, MINIMUM_ROUNDS)
            report += Report(rows=tuple(_rows(name, own, batch, times)))
        elif own:
            times = measure_on_cpu(runners, batch, recipe.duration, MINIMUM_ROUNDS, recipe.threads)
            report += Report(rows=tuple(_rows(name, own, batch, times)))
    return report


def _rows(name: str, entries: Sequence[Entry], batch: int, times: Sequence[Times]) -> Iterator[ProfileRow]:
    dense = {entry.runtime: own for entry, own in zip(entries, times, strict=True) if entry.variant.name == DENSE}
    for entry, own in zip(entries, times, strict=True):
        row = row_of(entry.runtime, f"{name}, {entry.variant.name}", batch, own, on_gpu=entry.on_gpu)
        ratios = ratios_to_dense(dense[entry.runtime], own, entry.variant.plan)
        yield msgspec.structs.replace(row, **ratios)


def _published(name: str, recipe: Sweep) -> Iterator[str]:
    figures = recipe.published.get(name, {})
    for variant, speed in figures.items():
        gain = f", {speed / figures[DENSE]:.2f}x dense" if DENSE in figures else ""
        yield f"Published for {name}, {variant}: {speed:g} images/s{gain}."
