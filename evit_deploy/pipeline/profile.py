"""Profiling, optionally with the accuracy of the model and its dense twin on the same images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

from evit_deploy.bundle.bundle import Bundle, changed_files, read_bundle
from evit_deploy.errors import InputError
from evit_deploy.models.parent import parent_model
from evit_deploy.profiling import profile as profiling
from evit_deploy.profiling.candidates import bundle_candidates
from evit_deploy.recipe.options import ProfileOptions
from evit_deploy.registry import RUNTIMES
from evit_deploy.report.report import Report
from evit_deploy.tokens.plan import TokenOptions
from evit_deploy.triton.connection import Server
from evit_deploy.triton.find import find_model
from evit_deploy.verification.answers.cost import Pair, side_by_side
from evit_deploy.verification.answers.pictures import pictures_of


def profile(
    target: str | Path,
    *,
    runtimes: Sequence[str] = (),
    measure: ProfileOptions | None = None,
    against: str | Path | None = None,
    plugin: str | Path | None = None,
    server: Server | None = None,
    data: str | Path | None = None,
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
        data: For a bundle: folder of images to compare the model with its dense twin on every timed runtime: top-1,
            top-5 and agreement; for a model without classes, cosine and retrieval. Without class folders
            (class/image), only measures that need no labels.
        tokens: For a checkpoint: fields of :class:`~evit_deploy.tokens.plan.TokenSpec`.

    Returns:
        A report with ``rows``, the speed of each candidate, and with ``data`` also ``compared``, its accuracy, under
        the same names.

    Raises:
        InputError: The target cannot be profiled, a runtime cannot run it, an engine does not cover a requested batch
            size, or the images do not fit the model; nothing was measured.
        MissingRequirement: What a requested engine or runtime needs is missing.
    """
    bundle = None
    if data is not None:
        bundle = _bundle(Path(target))
        pictures_of(Path(data), bundle.manifest)  # refuse unsuitable images before the measurement
    report = profiling.profile(
        target, runtimes=runtimes, measure=measure, against=against, plugin=plugin, server=server, **tokens
    )
    if data is None or bundle is None:
        return report
    place = Path(against) if against is not None else None
    threads = measure.threads if measure is not None else None
    return report + _answers(bundle, report, Path(data), threads, place, server)


def _bundle(target: Path) -> Bundle:
    """Reads the bundle to profile.

    Raises:
        InputError: The target is not a bundle, so its preprocessing and dense twin are unknown.
    """
    if not target.is_dir():
        raise InputError("only a bundle's answers are compared with its dense twin's", where="--data", seen=target,
                         wanted="the folder of a bundle", fix="Leave --data out to measure speed alone.")  # fmt: skip
    bundle = read_bundle(target)
    changed = changed_files(bundle)
    if changed:
        what = "files are not what the manifest says: " + ", ".join(changed)
        raise InputError(what, where=bundle.path, fix="Convert again.")
    return bundle


def _answers(
    bundle: Bundle, report: Report, data: Path, threads: int | None, against: Path | None, server: Server | None
) -> Report:
    """Accuracy of model and dense twin on every timed runtime."""
    manifest = bundle.manifest
    pictures = pictures_of(data, manifest)
    timed = list(dict.fromkeys(row.runtime for row in report.rows if row.variant == "model"))
    in_torch = any(not RUNTIMES.get(name).files and not RUNTIMES.get(name).served for name in timed)
    model = parent_model(bundle, against)[0] if in_torch else None
    served = find_model(server, manifest).served if server is not None else None
    found: dict[str, dict[str, Any]] = {}
    for candidate in bundle_candidates(bundle, timed, model, served):
        found.setdefault(candidate.runtime, {})[candidate.variant] = candidate.artifact
    answers = Report()
    for runtime in timed:
        pair = Pair(runtime, found[runtime]["model"], found[runtime].get("dense"))
        answers += side_by_side(pair, manifest, pictures, threads)[0]
    return answers
