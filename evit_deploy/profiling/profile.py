"""Measures the speed of a model and its two twins, interleaved in the same run.

The *dense twin* (no token reduction) gives the speed-up; the *slice twin* (same token counts, without scoring and
gathering) gives the cost of the reorganization. :mod:`evit_deploy.profiling.candidates` chooses what is timed,
:mod:`evit_deploy.profiling.timing` times it, and :mod:`evit_deploy.profiling.engine_times` times parts of engines.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from evit_deploy.bundle.manifest import ENGINE
from evit_deploy.environment.command import commands
from evit_deploy.environment.machine import device, versions
from evit_deploy.errors import InputError
from evit_deploy.files.drafts import draft
from evit_deploy.profiling.candidates import candidates_of
from evit_deploy.profiling.timing import measure_all
from evit_deploy.progress import doing
from evit_deploy.recipe.options import ProfileOptions
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import Check, ProfileRow, Report
from evit_deploy.runtimes.select import check_server
from evit_deploy.tokens.plan import TokenOptions
from evit_deploy.triton.connection import Server

_LOG = logging.getLogger(__name__)


def profile(
    target: str | Path,
    *,
    runtimes: Sequence[str] = (),
    measure: ProfileOptions | None = None,
    against: str | Path | None = None,
    plugin: str | Path | None = None,
    server: Server | None = None,
    **tokens: Unpack[TokenOptions],
) -> Report:
    """Profiles a bundle, an engine, an ONNX file or a checkpoint.

    Args:
        target: Bundle, ``engine.plan``, ``model.onnx``, or checkpoint (file or timm name). An engine is profiled like
            its bundle if the manifest next to it lists its hash.
        runtimes: Names in the registry of runtimes. Default: all that can run the target.
        measure: Batch sizes, seconds and threads; at least five rounds are always run.
        against: For a bundle: its checkpoint, if it was moved. For an engine or ONNX file: its dense twin.
        plugin: Library that a TensorRT engine needs. Default: the one in the user's cache with the hash from the
            manifest. For an engine built without the plugin: the plugin to compare it with.
        server: A running Triton server that serves the bundle; the round trip of a call is timed.
        tokens: For a checkpoint: fields of :class:`~evit_deploy.tokens.plan.TokenSpec`.

    Raises:
        InputError: The target cannot be profiled, a runtime cannot run it, or an engine does not cover a requested
            batch size; nothing was measured.
        MissingRequirement: What a requested engine or runtime needs is missing.
    """
    measure = measure or ProfileOptions()
    against = Path(against) if against is not None else None
    runtimes = check_server(runtimes, server)
    doing(_LOG, "reading the models")
    with draft() as scratch:
        found = candidates_of(
            target, against, tokens, runtimes, batch_sizes=measure.batch_sizes, scratch=scratch.folder, plugin=plugin,
            server=server,
        )  # fmt: skip
        if not found.candidates:
            raise InputError("none of these runtimes can run this", where=target, seen=", ".join(runtimes) or None)
        report = measure_all(
            found.candidates, found.plan, measure.batch_sizes, threads=measure.threads, duration=measure.duration,
            required=found.required,
        )  # fmt: skip
    return Report(notes=tuple(found.notes), versions=versions(), device=device(), commands=commands()) + report


def speed_gate(report: Report, min_speedup: float | None) -> Report:
    """Checks for every batch size that the deployed model is at least ``min_speedup`` times as fast as its dense twin.

    The deployed models are the engines if there are any, else the files; PyTorch counts only if nothing else was timed.

    Raises:
        InputError: ``min_speedup`` was given, but no dense twin was measured.
    """
    if min_speedup is None:
        return Report()
    rows = _deployed([row for row in report.rows if row.variant == "model"])
    if any(row.speedup is None for row in rows):
        raise InputError("there is no dense twin to compare with", where="--min-speedup", fix="Give it with --against.")
    reason = "Not as fast as --min-speedup asks: lower the keep rate, or profile at larger batches."
    checks = (
        Check(
            f"{row.runtime}, batch {row.batch}: speed-up", row.speedup, min_speedup, row.speedup >= min_speedup, reason
        )
        for row in rows
        if row.speedup is not None
    )
    return Report(checks=tuple(checks))


def _deployed(rows: Sequence[ProfileRow]) -> Sequence[ProfileRow]:
    files = {row.runtime: RUNTIMES.get(row.runtime).files for row in rows}
    engines = [row for row in rows if ENGINE in files[row.runtime]]
    return engines or [row for row in rows if files[row.runtime]] or rows
