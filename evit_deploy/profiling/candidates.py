"""Candidates for timing: a target and its twins, on the runtimes that can run them.

A target is a bundle, an engine (with or without its manifest), an ONNX file or a checkpoint.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.manifest import ENGINE, MANIFEST, MODEL, choose_profile
from evit_deploy.engines.plan_file import FAMILIES, read_header
from evit_deploy.engines.plugin.library import provide_plugin
from evit_deploy.engines.rebuild import other_body, slice_engine
from evit_deploy.environment.availability import TENSORRT
from evit_deploy.errors import InputError
from evit_deploy.export.card import load_onnx, read_card
from evit_deploy.export.outline import Outline, read_outline
from evit_deploy.export.precision import DTYPES, QUANTIZED
from evit_deploy.export.variants import reorganizations, slice_twin
from evit_deploy.files import sha256
from evit_deploy.models.checkpoint import build_model, read_checkpoint, resolve_tokens
from evit_deploy.models.parent import parent_model
from evit_deploy.registry import RUNTIMES
from evit_deploy.runtimes.runner import Runner
from evit_deploy.runtimes.select import artifact_of, subject_of, usable
from evit_deploy.tokens.plan import TokenOptions, TokenPlan
from evit_deploy.tokens.reduce import dense_twin, reduce_tokens_, token_plan
from evit_deploy.triton.connection import Server
from evit_deploy.triton.find import find_model

PLAN_SUFFIXES = (".plan", ".engine", ".trt")


class Candidate(msgspec.Struct, frozen=True):
    """One model on one runtime, to time.

    Args:
        runtime: Name in the registry of runtimes.
        variant: ``model``, ``dense`` or ``slice``; also ``body``, the model's engine without its plugin, and
            ``plugin``, the model's engine with a plugin.
        artifact: The artifact that the runtime runs.
    """

    runtime: str
    variant: str
    artifact: Any

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a GPU."""
        if isinstance(self.artifact, torch.nn.Module):
            return next(self.artifact.parameters()).is_cuda
        return RUNTIMES.get(self.runtime).on_gpu


class Comparison(msgspec.Struct, frozen=True):
    """A target and its twins, on the runtimes to measure.

    Args:
        candidates: What to time.
        plan: Token plan of the reduced models; ``None`` if unknown.
        notes: Notes on what is missing and why.
        required: Runtimes that must run; others are skipped if they fail when opened.
    """

    candidates: list[Candidate]
    plan: TokenPlan | None
    notes: list[str]
    required: frozenset[str] = frozenset()


def candidates_of(
    target: Path | str,
    against: Path | None,
    tokens: TokenOptions | None,
    runtimes: Sequence[str],
    *,
    batch_sizes: Sequence[int] | None = None,
    scratch: Path | None = None,
    plugin: Path | str | None = None,
    server: Server | None = None,
) -> Comparison:
    """Returns the target and its twins on each runtime.

    Args:
        target: A bundle, an engine, an ONNX file or a checkpoint.
        against: See :func:`evit_deploy.profiling.profile.profile`.
        tokens: For a checkpoint: how to reduce it.
        runtimes: Names in the registry of runtimes. Default: all that can run the target.
        batch_sizes: The requested batch sizes, if any.
        scratch: Empty folder for engines to compare with; without it none are built.
        plugin: See :func:`evit_deploy.profiling.profile.profile`.
        server: See :func:`evit_deploy.profiling.profile.profile`.

    Raises:
        InputError: The target cannot be profiled, or a runtime cannot run it.
        MissingRequirement: The target is an engine, and its runtime is not installed.
    """
    for name in runtimes:
        RUNTIMES.get(name)  # raises for an unknown name
    path = Path(target)
    if path.is_dir():
        bundle = bundles.read_bundle(path)
        found = _of_bundle(bundle, against, runtimes, plugin, server)
        return _with_built(found, bundle, batch_sizes, scratch, plugin)
    if server is not None:
        raise InputError("a server is profiled together with its bundle", where=path, fix="Give the bundle's folder.")
    if is_plan(path):
        return _of_plan(path, against, runtimes, batch_sizes, scratch, plugin)
    if plugin not in (None, "none", "auto"):
        raise InputError("only an engine takes a plugin", where="--plugin", seen=plugin)
    if path.suffix == ".onnx":
        return _of_onnx(path, against, runtimes)
    checkpoint = read_checkpoint(str(target))
    spec, notes = resolve_tokens(checkpoint, **(tokens or {}))
    model = reduce_tokens_(build_model(checkpoint), spec)
    names = [name for name in RUNTIMES.names() if _runs_torch(RUNTIMES.get(name))]
    rows = [row for name in names if takes_part(name, model, runtimes) for row in torch_candidates(model, name)]
    return Comparison(rows, token_plan(model), checkpoint.notes + notes, frozenset(runtimes))


def is_plan(path: Path) -> bool:
    """Whether a target is an engine, by its first bytes or its suffix."""
    try:
        with path.open("rb") as file:
            return file.read(4) in FAMILIES or path.suffix in PLAN_SUFFIXES
    except OSError:
        return path.suffix in PLAN_SUFFIXES


def _of_onnx(path: Path, against: Path | None, runtimes: Sequence[str]) -> Comparison:
    card = read_card(read_outline(path).proto)
    if card is None:
        raise InputError("evit-deploy did not write this file, so its token plan is unknown", where=path)
    if against is not None:
        read_outline(against)  # raises if it is not a model
    notes = [] if against else ["Speed-up not available: --against DENSE.onnx gives the dense twin."]
    names = [name for name in RUNTIMES.names() if MODEL in RUNTIMES.get(name).files]
    chosen = [name for name in names if takes_part(name, path, runtimes)]
    rows = [row for name in chosen for row in onnx_candidates(path, against, name)]
    return Comparison(rows, card.plan, notes, frozenset(runtimes))


def _of_plan(
    path: Path,
    against: Path | None,
    runtimes: Sequence[str],
    batch_sizes: Sequence[int] | None,
    scratch: Path | None,
    plugin: Path | str | None,
) -> Comparison:
    family = read_header(path).family
    required = frozenset(runtimes or (family,))
    bundle, why_bare = manifest_beside(path)
    if bundle is None and against is not None and read_header(against).family != family:
        raise InputError(
            "the dense twin is an engine for a different library", where="--against", seen=read_header(against).family,
            wanted=family,
        )  # fmt: skip
    if bundle is not None and family in required:
        _check_sizes(bundle, batch_sizes)
    missing = RUNTIMES.get(
        family
    ).missing()  # checked last, because another machine would not help with the errors above
    if missing is not None and family in required:
        raise missing
    if bundle is not None:
        found = _of_bundle(bundle, against, runtimes, plugin)
        found = msgspec.structs.replace(found, required=required)
        return _with_built(found, bundle, batch_sizes, scratch, plugin)
    lacking = provide_plugin(None, plugin)
    if lacking is not None:
        raise lacking
    notes = [why_bare, "Its token plan is unknown: no MAC ratio, no token counts by block, no slice twin."]
    notes += [] if against else ["Speed-up not available: --against DENSE.plan gives the dense twin."]
    rows = []
    for name in RUNTIMES.names():
        if name in required and ENGINE in RUNTIMES.get(name).files:
            rows.append(Candidate(name, "model", path))
            rows += [Candidate(name, "dense", against)] if against is not None else []
    return Comparison(rows, None, notes, required)


def manifest_beside(path: Path) -> tuple[bundles.Bundle | None, str]:
    """Returns the bundle that an engine belongs to, if the manifest next to it lists this file by its hash.

    Returns:
        (bundle, ""), or (``None``, reason).
    """
    manifest = path.with_name(MANIFEST)
    if not manifest.is_file():
        return None, f"There is no {MANIFEST} next to {path.name}."
    bare = f"{path.name} is treated as an engine without a manifest"
    try:
        bundle = bundles.read_bundle(path.parent)
    except InputError as error:
        return None, f"{bare}: {error.what.rstrip('.')} ({manifest.name})."
    listed = bundle.manifest.files.get(ENGINE)
    if path.name != ENGINE or listed is None:
        return None, f"{bare}: the {manifest.name} next to it does not list it."
    if sha256(path) != listed:
        return None, f"{bare}: it is not the file that the {manifest.name} next to it lists (different SHA-256)."
    return bundle, ""


def _of_bundle(
    bundle: bundles.Bundle,
    against: Path | None,
    runtimes: Sequence[str],
    plugin: Path | str | None,
    server: Server | None = None,
) -> Comparison:
    """Returns the candidates in a bundle."""
    changed = bundles.changed_files(bundle)
    if changed:
        raise InputError(
            "files are not what the manifest says: " + ", ".join(changed), where=bundle.path, fix="Convert again."
        )
    model, why_not = parent_model(bundle, against)
    torch_wanted = not runtimes or any(_runs_torch(RUNTIMES.get(name)) for name in runtimes)
    notes = [f"PyTorch was not timed: {why_not}."] if model is None and torch_wanted else []
    served = find_model(server, bundle.manifest).served if server is not None else None
    rows = bundle_candidates(bundle, runtimes, model, served)
    own_plugin = plugin if _other_plugin(bundle, plugin) is None else None
    lacking = provide_plugin(bundle.manifest.engine, own_plugin)
    if lacking is not None:
        if TENSORRT in runtimes:
            raise lacking
        rows = [row for row in rows if row.runtime != TENSORRT]
        notes.append(f"{TENSORRT} was not timed: {lacking}")
    notes += [] if runtimes else _left_out(bundle, model)
    return Comparison(rows, bundle.manifest.plan, notes, frozenset(runtimes))


def _with_built(
    found: Comparison,
    bundle: bundles.Bundle,
    batch_sizes: Sequence[int] | None,
    scratch: Path | None,
    plugin: Path | str | None,
) -> Comparison:
    """Builds and adds engines to compare a bundle's engine with: its slice twin, and it with or without the plugin."""
    running = next((row for row in found.candidates if row.variant == "model" and _is_engine(row)), None)
    if running is not None:
        _check_sizes(bundle, batch_sizes)
    if running is None or scratch is None:
        return found
    twin, why_not = slice_engine(bundle, scratch)
    notes = [f"Overhead not available on {running.runtime}: {why_not}."] if why_not else []
    other, why_not = other_body(bundle, scratch, _other_plugin(bundle, plugin))
    notes += [f"Plugin and operator's body were not compared: {why_not}."] if why_not else []
    plans = {"slice": twin, other.stem if other is not None else "body": other}
    built = [Candidate(running.runtime, variant, plan) for variant, plan in plans.items() if plan]
    place = found.candidates.index(running) + 1
    rows = [*found.candidates[:place], *built, *found.candidates[place:]]
    return msgspec.structs.replace(found, candidates=rows, notes=found.notes + notes)


def _other_plugin(bundle: bundles.Bundle, plugin: Path | str | None) -> Path | str | None:
    """Returns the given plugin if the bundle's engine was built without one, to compare the two."""
    engine = bundle.manifest.engine
    return plugin if engine is not None and engine.target == TENSORRT and engine.plugin is None else None


def _check_sizes(bundle: bundles.Bundle, batch_sizes: Sequence[int] | None) -> None:
    """Refuses batch sizes that the engine does not cover, by the manifest, before twins are built."""
    engine = bundle.manifest.engine
    for batch in batch_sizes or ():
        if engine is not None:
            choose_profile(engine.profiles, batch)


def _runs_torch(runtime: type[Runner]) -> bool:
    return not runtime.files and not runtime.served


def _is_engine(row: Candidate) -> bool:
    return isinstance(row.artifact, Path) and row.artifact.name == Path(ENGINE).name


def _left_out(bundle: bundles.Bundle, model: torch.nn.Module | None) -> list[str]:
    """Returns notes on why a bundle's engine, or PyTorch on a GPU, was not timed."""
    notes = []
    for name in RUNTIMES.names():
        runtime: type[Runner] = RUNTIMES.get(name)
        artifact = artifact_of(bundle, runtime) if ENGINE in runtime.files else None
        if not runtime.files and torch.cuda.is_available():
            artifact = model
        missing = None if artifact is None or runtime.accepts(artifact) else runtime.missing()
        notes += [f"{name} was not timed: {missing.what}."] if missing is not None else []
    return notes


def takes_part(name: str, artifact: Any, runtimes: Sequence[str]) -> bool:
    """Whether to time a runtime: it was requested, or by default it can run the artifact here."""
    if runtimes:
        return name in runtimes
    runtime: type[Runner] = RUNTIMES.get(name)
    if usable(runtime, artifact):
        return True
    # On a GPU also compiled PyTorch, the alternative to an engine, although compiling takes long.
    return (
        not runtime.files and torch.cuda.is_available() and runtime.missing() is None and not runtime.accepts(artifact)
    )


def bundle_candidates(
    bundle: bundles.Bundle,
    runtimes: Sequence[str] = (),
    model: torch.nn.Module | None = None,
    server: Server | None = None,
) -> list[Candidate]:
    """Returns a bundle's model and its twins on every requested runtime, or on all that can run them here.

    Args:
        bundle: The bundle.
        runtimes: Names in the registry of runtimes.
        model: The PyTorch model that the bundle was made from.
        server: The served model.
    """
    rows: list[Candidate] = []
    for name in sorted(RUNTIMES.names(), key=lambda name: not RUNTIMES.get(name).files):  # PyTorch last
        runtime: type[Runner] = RUNTIMES.get(name)
        artifact = subject_of(bundle, runtime, model, server)
        if artifact is None or not takes_part(name, artifact, runtimes):
            continue
        if isinstance(artifact, torch.nn.Module):
            rows += torch_candidates(artifact, name, bundle.manifest.precision)
            continue
        rows.append(Candidate(name, "model", artifact))
        if MODEL in runtime.files:
            rows += _slice(bundle.file(MODEL), name)
        dense = artifact_of(bundle, runtime, dense=True)
        rows += [Candidate(name, "dense", dense)] if dense is not None else []
    return rows


def onnx_candidates(model: Path, dense: Path | None, runtime: str = "onnxruntime") -> list[Candidate]:
    """Returns the portable file and its twins on one runtime."""
    rows = [Candidate(runtime, "model", model), *_slice(model, runtime)]
    return rows + ([Candidate(runtime, "dense", dense)] if dense is not None else [])


def _slice(model: Path, runtime: str) -> list[Candidate]:
    outline = read_outline(model)
    if not reorganizations(outline.proto):
        return []
    if RUNTIMES.get(runtime).accepts(outline):
        return [Candidate(runtime, "slice", slice_twin(load_onnx(model)))]
    return [Candidate(runtime, "slice", Outline(slice_twin(outline.proto), outline.folder))]


def torch_candidates(model: torch.nn.Module, runtime: str, precision: str = "fp32") -> list[Candidate]:
    """Returns the PyTorch model and its dense twin, on the GPU if there is one.

    Args:
        model: The reduced model, FP32.
        runtime: Name of a runtime that runs PyTorch models.
        precision: Precision of the bundle. PyTorch also computes in it, except that for quantized files it uses FP16
            on a GPU and FP32 on a CPU.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if precision in QUANTIZED:
        precision = "fp16" if device == "cuda" else "fp32"
    twins = {"model": model, "dense": dense_twin(model)}
    if precision != "fp32" or device == "cuda":
        twins = {name: copy.deepcopy(twin).to(device, DTYPES[precision]) for name, twin in twins.items()}
    return [Candidate(runtime, name, twin) for name, twin in twins.items()]
