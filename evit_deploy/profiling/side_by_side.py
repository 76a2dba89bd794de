"""Speed of several bundles: on each runtime, all bundles and their baselines are measured interleaved.

Every bundle is compared with two baselines: its dense twin, which bundles of the same dense model share, and the slice
twin of the same token counts. The clocks are those of :mod:`evit_deploy.profiling.timing`.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import DENSE, ENGINE, choose_profile
from evit_deploy.engines.plugin.library import provide_plugin
from evit_deploy.engines.rebuild import slice_engine
from evit_deploy.environment.availability import TENSORRT
from evit_deploy.errors import InputError
from evit_deploy.models.parent import parent_model
from evit_deploy.profiling.batch_sizes import sizes_for
from evit_deploy.profiling.candidates import Candidate, bundle_candidates, takes_part
from evit_deploy.profiling.clocks.gpu_clocks import summarize_states
from evit_deploy.profiling.clocks.gpu_times import measure_on_gpu
from evit_deploy.profiling.clocks.turns import MINIMUM_ROUNDS, Times, random_feeds
from evit_deploy.profiling.speedup import hidden_gains, overhead_of, ratios_to_dense, row_of, verdict
from evit_deploy.profiling.timing import measure_on_cpu, watched
from evit_deploy.progress import in_stages, stage
from evit_deploy.recipe.options import ProfileOptions
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import ProfileRow, Report
from evit_deploy.runtimes.runner import Runner
from evit_deploy.runtimes.select import subject_of
from evit_deploy.tokens.plan import TokenPlan

_LOG = logging.getLogger(__name__)


class Contender(msgspec.Struct, frozen=True):
    """A bundle in a comparison.

    Args:
        name: Name of its rows.
        bundle: The bundle.
        dense: Name of the rows of its dense twin; the same for bundles that share one.
    """

    name: str
    bundle: Bundle
    dense: str


class Entry(msgspec.Struct, frozen=True):
    """One model to time on a runtime.

    Args:
        name: Name of its rows; ``None`` for a slice twin, which has no rows.
        candidate: The candidate.
        plan: Its token plan; ``None`` for baselines and slice twins.
        dense: Index of the entry of its dense twin; ``None`` for a dense twin.
        sliced: Index of the entry of its slice twin, if any.
    """

    name: str | None
    candidate: Candidate
    plan: TokenPlan | None = None
    dense: int | None = None
    sliced: int | None = None


class Lane(msgspec.Struct, frozen=True):
    """All models to time on one runtime.

    Args:
        runtime: Name in the registry of runtimes.
        entries: The models.
        notes: Notes on what is missing and why.
    """

    runtime: str
    entries: list[Entry]
    notes: list[str]


class Parents(msgspec.Struct):
    """Cache of the PyTorch models that bundles were made from, each built on first use."""

    known: dict[Path, tuple[torch.nn.Module | None, str]] = {}

    def of(self, bundle: Bundle) -> tuple[torch.nn.Module | None, str]:
        """See :func:`evit_deploy.models.parent.parent_model`; a comparison cannot be given another checkpoint."""
        if bundle.path not in self.known:
            model, why_not = parent_model(bundle)
            self.known[bundle.path] = model, why_not.removesuffix("; --against says where it is")
        return self.known[bundle.path]


def named(bundles: Sequence[tuple[str, Bundle]]) -> list[Contender]:
    """Finds bundles that share a dense twin, and names the twins.

    Bundles share one if ``dense/model.onnx`` is identical (so weights, precision and form are the same), the
    preprocessing is equal, and the engines, if any, were built with the same options.

    Args:
        bundles: (name, bundle) pairs.
    """
    groups: dict[Any, str] = {}
    keys = [_dense_key(bundle) for _, bundle in bundles]
    taken = {name for name, _ in bundles}
    for (name, _), key in zip(bundles, keys, strict=True):
        alone = len(set(keys)) == 1 and "dense" not in taken
        groups.setdefault(key, "dense" if alone else f"dense of {name}")
    return [Contender(name, bundle, groups[key]) for (name, bundle), key in zip(bundles, keys, strict=True)]


def _dense_key(bundle: Bundle) -> tuple[Any, ...]:
    manifest, engine = bundle.manifest, bundle.manifest.engine
    built = None
    if engine is not None:
        options = msgspec.json.encode(engine.options, order="sorted")
        built = engine.target, engine.version, engine.gpus, engine.precision, engine.profiles, options
    return manifest.files.get(DENSE, str(bundle.path)), manifest.preprocess, built


def choose_runtimes(
    contenders: Sequence[Contender], asked: Sequence[str], batch_sizes: Sequence[int] | None, parents: Parents
) -> tuple[list[str], list[str]]:
    """Returns the runtimes to compare on: the requested ones, or all that run every bundle here.

    Args:
        contenders: The bundles.
        asked: Names of the requested runtimes.
        batch_sizes: The requested batch sizes, if any.
        parents: PyTorch models.

    Returns:
        The names, and a note on each runtime that was skipped because it cannot run all bundles, or because the PyTorch
        models are not available.

    Raises:
        InputError: A requested runtime, or every runtime, cannot run one of the bundles, or its engine does not cover
            a batch size.
        MissingRequirement: A requested runtime is not installed.
    """
    for name in asked:
        check_runtime(name)
    chosen, notes, refusals = [], [], []
    files_first = sorted(RUNTIMES.names(), key=lambda name: not RUNTIMES.get(name).files)
    for name in dict.fromkeys(asked or files_first):
        reasons = {one.name: _why_not(one, name, batch_sizes, parents) for one in contenders}
        unable = {one: reason for one, reason in reasons.items() if reason}
        first = next(iter(unable.items()), None)
        if asked and first is not None:
            raise InputError(f"{name} cannot run {first[0]}: {first[1]}", where="--runtime")
        if asked:
            _check_here(contenders, name)
            chosen.append(name)
        elif first is None and all(takes_part(name, _artifact(one, name, parents), ()) for one in contenders):
            chosen.append(name)
        elif first is not None and RUNTIMES.get(name).default and RUNTIMES.get(name).missing() is None:
            refusals.append(f"{name} cannot run {first[0]} ({first[1]})")
            if len(unable) < len(contenders) or not RUNTIMES.get(name).files:
                notes.append(f"{name} was left out: it cannot run {first[0]} ({first[1]}).")
    if not chosen:
        raise InputError("no runtime here can run all of these bundles", seen="; ".join(refusals) or None)
    return chosen, notes


def check_runtime(name: str) -> None:
    """Checks that bundles can be compared on a runtime; needs no bundle.

    Raises:
        InputError: There is no such runtime, or it is a server.
    """
    if RUNTIMES.get(name).served:
        raise InputError(
            "a comparison runs in this process, not on a server", where="--runtime", seen=name,
            fix="Measure one bundle there with evit-deploy profile --url.",
        )  # fmt: skip


def _artifact(contender: Contender, runtime: str, parents: Parents) -> Any:
    kind: type[Runner] = RUNTIMES.get(runtime)
    model = None if kind.files or kind.served else parents.of(contender.bundle)[0]
    return subject_of(contender.bundle, kind, model, None)


def _why_not(contender: Contender, runtime: str, batch_sizes: Sequence[int] | None, parents: Parents) -> str:
    """Returns why a runtime cannot run a bundle on any machine; empty if it can."""
    kind: type[Runner] = RUNTIMES.get(runtime)
    if kind.served:
        return "it runs on a server"
    artifact = _artifact(contender, runtime, parents)
    if artifact is None:
        return f"it has no {' or '.join(kind.files)}" if kind.files else parents.of(contender.bundle)[1]
    engine = contender.bundle.manifest.engine
    if _is_engine(artifact) and engine is not None:
        for batch in batch_sizes or ():
            choose_profile(engine.profiles, batch)
    return "; ".join(kind.accepts(artifact))


def _check_here(contenders: Sequence[Contender], runtime: str) -> None:
    missing = RUNTIMES.get(runtime).missing()
    if missing is not None:
        raise missing
    for one in contenders if runtime == TENSORRT else ():
        lacking = provide_plugin(one.bundle.manifest.engine, None)
        if lacking is not None:
            raise lacking


def _is_engine(artifact: Any) -> bool:
    return isinstance(artifact, Path) and artifact.name == Path(ENGINE).name


def lane_of(runtime: str, contenders: Sequence[Contender], parents: Parents, scratch: Path) -> Lane:
    """Returns the models to time on a runtime: each dense twin once, and every bundle with its slice twin.

    Args:
        runtime: Name in the registry of runtimes.
        contenders: The bundles.
        parents: PyTorch models.
        scratch: Folder for engines of slice twins.
    """
    entries: list[Entry] = []
    notes: list[str] = []
    baselines: dict[str, int] = {}
    for number, one in enumerate(contenders):
        model = parents.of(one.bundle)[0] if not RUNTIMES.get(runtime).files else None
        found = {row.variant: row for row in bundle_candidates(one.bundle, (runtime,), model)}
        if one.dense not in baselines and "dense" in found:
            baselines[one.dense] = len(entries)
            entries.append(Entry(one.dense, found["dense"]))
        sliced = found.get("slice")
        if sliced is None and _is_engine(found["model"].artifact):
            folder = scratch / f"{runtime}-{number}"
            folder.mkdir()
            plan, why_not = slice_engine(one.bundle, folder)
            sliced = Candidate(runtime, "slice", plan) if plan is not None else None
            notes += [f"{one.name}: overhead not available on {runtime}: {why_not}."] if why_not else []
        place = len(entries) if sliced is not None else None
        entries += [Entry(None, sliced)] if sliced is not None else []
        plan = one.bundle.manifest.plan
        entries.append(Entry(one.name, found["model"], plan, baselines.get(one.dense), place))
    return Lane(runtime, entries, notes)


def measure_lane(lane: Lane, runners: Sequence[Runner], measure: ProfileOptions) -> Report:
    """Times all models of a lane, one batch size after another.

    Args:
        lane: The models.
        runners: The opened runner of each entry.
        measure: Batch sizes, seconds for each, and threads.

    Returns:
        A row for every bundle, dense twin and batch size, with its name as ``variant``.

    Raises:
        InputError: The engines have no batch size in common.
    """
    on_gpu = lane.entries[0].candidate.on_gpu
    sizes = sizes_for([runner.profiles for runner in runners], measure.batch_sizes, on_gpu=on_gpu)
    report = Report(notes=tuple(lane.notes))
    with ExitStack() as stack:
        watch, notes = watched(stack) if on_gpu else (None, [])
        for batch in in_stages(sizes):
            stage(_LOG, f"timing {len(lane.entries)} models in turn on {lane.runtime}, batch {batch}")
            mark = len(watch.states) if watch else 0
            times = (
                measure_on_gpu(runners, random_feeds(runners, batch), measure.duration, MINIMUM_ROUNDS)
                if on_gpu
                else measure_on_cpu(runners, batch, measure.duration, MINIMUM_ROUNDS, measure.threads)
            )
            report += Report(rows=tuple(rows_of_lane(lane, batch, times)))
            if watch:
                watch.look()
                report += Report(gpu=(summarize_states(watch.states[mark:], batch),))
        notes += watch.notes if watch else []
        first = watch.states[0] if watch else None
    if first is not None:
        device = {"gpu": first.name, "driver": first.driver, "compute_capability": first.compute_capability}
        report += Report(device=device)
    return report + Report(notes=(*_verdicts(report.rows), *notes))


def rows_of_lane(lane: Lane, batch: int, times: Sequence[Times]) -> list[ProfileRow]:
    """Returns a row for each bundle and dense twin.

    Args:
        lane: The models.
        batch: Images per call.
        times: Times of each entry, from the same rounds.
    """
    rows = []
    for entry, own in zip(lane.entries, times, strict=True):
        if entry.name is None:
            continue
        row = row_of(lane.runtime, entry.name, batch, own, on_gpu=entry.candidate.on_gpu)
        ratios = {}
        if entry.dense is not None:
            ratios = ratios_to_dense(times[entry.dense], own, entry.plan)
        if entry.sliced is not None:
            ratios["overhead"] = overhead_of(own, times[entry.sliced])
        rows.append(msgspec.structs.replace(row, **ratios))
    return rows


def _verdicts(rows: Sequence[ProfileRow]) -> list[str]:
    """Returns notes on bundles that are not faster, and on gains hidden by copies."""
    notes = []
    for name in dict.fromkeys(row.variant for row in rows):
        own = [row for row in rows if row.variant == name and row.mac_ratio != 1]  # 1: no tokens are reduced
        own = [msgspec.structs.replace(row, variant="model") for row in own]
        notes += [f"{name}: {note}" for note in (*verdict(own), *hidden_gains(own))]
    return notes
