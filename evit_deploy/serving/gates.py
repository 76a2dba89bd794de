"""Checks before bundles are packaged: files, verification, one model, a matching platform, GPU and server."""

import re
import typing
from collections.abc import Sequence
from pathlib import Path

import msgspec
from packaging.version import Version

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import ENGINE, MANIFEST, REPORT, Engine, Manifest
from evit_deploy.data.labels import check_labels, read_labels
from evit_deploy.documents import read_json
from evit_deploy.engines.plan_file import read_header
from evit_deploy.errors import InputError, first_few
from evit_deploy.export.card import EMBEDDING, INPUT, LOGITS
from evit_deploy.export.precision import QUANTIZED
from evit_deploy.report.report import Report
from evit_deploy.serving.options import Device, Purpose, TritonOptions
from evit_deploy.serving.releases import QUANTIZES, RELEASES, TritonRelease, declared_server, older, same
from evit_deploy.targets.target import all_targets

_ONE_MODEL = ("kind", "model", "model_args", "tokens", "plan", "preprocess", "labels", "inputs", "outputs", "precision")
_DALI_PATH = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
DALI_FILTERS = ("bilinear", "bicubic", "lanczos")
_AMPERE = 80
CONTAINER = "nvcr.io/nvidia/tensorrt"
"""Container with the same TensorRT as Triton's release of the same month."""


def platforms(purpose: str) -> dict[str, tuple[str, ...]]:
    """Returns the platforms of a kind of package, preferred first: platform -> files of a bundle that it runs."""
    found: dict[str, tuple[str, ...]] = {}
    for target in all_targets().values():
        if purpose in target.platforms:
            platform, files = target.platforms[purpose]
            found.setdefault(platform, files)
    return found


def files_of(platform: str) -> tuple[str, ...]:
    """Returns the files of a bundle that a platform runs."""
    return next(files for purpose in typing.get_args(Purpose) if (files := platforms(purpose).get(platform)))


def platform_of(bundle: Bundle, purpose: str, asked: str | None) -> str:
    """Returns the requested platform, or the first one for which the bundle has all files.

    Raises:
        InputError: The platform does not exist, or the bundle has no files for it.
    """
    if asked is not None and asked not in platforms(purpose):
        raise InputError(
            f"there is no such platform for {purpose}", where="--platform", seen=repr(asked),
            wanted=" or ".join(platforms(purpose)),
        )  # fmt: skip
    reasons = {platform: _lacks(bundle, platform) for platform in ([asked] if asked else platforms(purpose))}
    found = next((platform for platform, reason in reasons.items() if reason is None), None)
    if found is None:
        able = {name: target.platforms.get(purpose, ("",))[0] for name, target in all_targets().items()}
        wanted = " or ".join(name for name, platform in able.items() if platform in reasons)
        raise InputError(
            "the bundle has nothing for " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()),
            where=bundle.path, fix=f"Convert again with --target {wanted}.",
        )  # fmt: skip
    return found


def _lacks(bundle: Bundle, platform: str) -> str | None:
    """Returns what a bundle lacks for a platform, or ``None``."""
    missing = [name for name in files_of(platform) if name not in bundle.manifest.files]
    if missing:
        return f"no {' and '.join(missing)} in it"
    if platform.startswith("tensorrt"):
        family = read_header(bundle.file(ENGINE)).family
        if family != platform:
            return f"its engine.plan is for {family}"
        if bundle.manifest.engine is None:
            return "its manifest does not say what engine.plan was built with"
    return None


def check_tensors(bundle: Bundle) -> None:
    """Checks that the manifest describes a model with ``input`` and with ``logits`` or ``embedding``, as ``convert``
    writes it.

    Raises:
        InputError: It has other inputs or outputs.
    """
    manifest = bundle.manifest
    inputs = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in manifest.inputs]
    outputs = [(tensor.name, tensor.dtype, len(tensor.shape)) for tensor in manifest.outputs]
    kept = all(dtype == "int32" and rank == 2 for _, dtype, rank in outputs[1:])
    answers = [(LOGITS, "float32", 2)], [(EMBEDDING, "float32", 2)]
    if inputs != [(INPUT, "float32", 4)] or outputs[:1] not in answers or not kept:
        raise InputError(
            "the manifest does not describe a model that convert makes", where=bundle.path,
            seen=f"{inputs} to {outputs}", wanted=f"{INPUT} to {LOGITS} or {EMBEDDING}", fix="Convert again.",
        )  # fmt: skip


def check_same(found: Sequence[Bundle], platform: str) -> None:
    """Checks that several bundles are one model for different GPUs.

    Raises:
        InputError: They are not, or the platform does not depend on the GPU.
    """
    if len(found) > 1 and platform != "tensorrt":
        raise InputError(
            "several bundles are packaged together for TensorRT on Triton only, with a plan for another GPU in each",
            seen=f"{len(found)} bundles for {platform}", fix="Package one of them.",
        )  # fmt: skip
    first = found[0].manifest
    for bundle in found[1:]:
        other = bundle.manifest
        unlike = [field for field in _ONE_MODEL if getattr(first, field) != getattr(other, field)]
        # Downloaded weights have no hash, only a name.
        origins = [[(p.sha256 or p.source, p.model) for p in manifest.parents] for manifest in (first, other)]
        unlike += ["checkpoint"] * (origins[0] != origins[1])
        unlike += ["batch profiles"] * (engine_of(found[0]).profiles != engine_of(bundle).profiles)
        unlike += ["plugin"] * (engine_of(found[0]).plugin != engine_of(bundle).plugin)
        if unlike:
            raise InputError(
                "not the same model for another GPU", where=bundle.path,
                seen=f"another {', '.join(unlike)} than {found[0].path}",
                fix="Convert the same checkpoint with the same options on each GPU.",
            )  # fmt: skip


def engine_of(bundle: Bundle) -> Engine:
    """Returns the engine record of a bundle that is known to have one."""
    engine = bundle.manifest.engine
    assert engine is not None
    return engine


def check_files(bundle: Bundle) -> None:
    """Checks that every file is unchanged.

    Raises:
        InputError: A file has changed or is missing.
    """
    changed = bundles.changed_files(bundle)
    if changed:
        raise InputError(
            f"changed or missing since it was written: {first_few(changed, 5)}", where=bundle.path,
            fix="Copy the bundle here again, or convert again.",
        )  # fmt: skip


def doubt(bundle: Bundle, platform: str) -> str | None:
    """Returns why a bundle does not count as verified on a platform, or ``None`` if it does."""
    if "passed" not in bundle.manifest.results or REPORT not in bundle.manifest.files:
        return "its manifest has no result of a verification"
    if bundle.manifest.results["passed"] is not True:
        return "its verification failed"
    try:
        report = read_json(bundle.file(REPORT), Report)
    except InputError as error:
        return f"its report cannot be read ({error})"
    if not report.passed:
        return f"a check failed: {report.failed[0].name}"
    if not any(check.name.startswith(f"{platform}, batch") for check in report.checks):
        return f"its report has no check of {platform}"
    return None


def labels_of(bundle: Bundle, path: Path | None) -> list[str] | None:
    """Returns the class names, or ``None`` if they are unknown.

    Args:
        bundle: The bundle; its manifest may have class names.
        path: File of labels that replaces the manifest's, see :func:`~evit_deploy.data.labels.read_labels`.

    Raises:
        InputError: The file cannot be read, there are more or fewer names than classes, or a name spans two lines.
    """
    names, where = bundle.manifest.labels, f"{bundle.path / MANIFEST}: labels"
    if path is not None:
        names, where = read_labels(path), str(path)
    if names is None:
        return None
    classes = bundle.manifest.outputs[0].shape[-1]
    if bundle.manifest.answer == EMBEDDING:
        raise InputError("the model has no classes, and so no labels", where=where, seen=f"{len(names)} labels",
                         fix="Leave --labels out.")  # fmt: skip
    if len(names) != classes:
        raise InputError(
            "the labels do not match the classes", where=where, seen=f"{len(names)} labels", wanted=f"{classes}",
            fix="Give a file with one label on each line, in the order of the model's outputs: --labels FILE.",
        )  # fmt: skip
    check_labels(names, where)
    return names


def device_for(platform: str, asked: Device | None) -> Device:
    """Returns the device that the server runs the model on.

    Args:
        platform: The platform.
        asked: The requested device (``--device``), if any.

    Raises:
        InputError: The platform does not support the requested device.
    """
    only: Device | None = {"openvino": "cpu", "tensorrt": "gpu"}.get(platform)  # type: ignore[assignment]
    if asked is not None and only not in (asked, None):
        raise InputError(
            f"Triton runs {platform} on the {only.upper()} only", where="--device", seen=asked, wanted=only
        )
    return asked or only or "gpu"


def check_preprocess(manifest: Manifest, name: str, device: Device, choice: str) -> None:
    """Checks that the server can preprocess image files for a model.

    Args:
        manifest: The model's manifest.
        name: Name of the model.
        device: Device that it runs on.
        choice: ``python``, ``dali`` or ``none`` (``--preprocess``).

    Raises:
        InputError: It cannot, or not with DALI.
    """
    channels, preprocess = manifest.inputs[0].shape[1], manifest.preprocess
    if choice != "none" and channels != 3:
        raise InputError(
            "photographs have 3 channels, but the model takes a different number", where=f"--preprocess {choice}",
            seen=channels, fix="Give --preprocess none, and send inputs.",
        )  # fmt: skip
    if choice != "dali":
        return
    reasons = {
        "the model runs on the CPU, DALI on a GPU": device == "cpu",
        # Its backend runs a shell command with the path, and takes no other character in that.
        f"a name with other characters than letters, digits, _ and . ({name!r})": not _DALI_PATH.fullmatch(name),
        f"crop mode {preprocess.crop_mode}": preprocess.crop_mode not in ("center", "squash"),
        "an input that is not square": preprocess.crop_mode == "center" and len(set(preprocess.size)) > 1,
        f"crop_pct {preprocess.crop_pct:g}": preprocess.crop_pct > 1,
        f"interpolation {preprocess.interpolation}": preprocess.interpolation not in DALI_FILTERS,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found:
        raise InputError(
            "the preprocessing cannot be done with DALI here", where="--preprocess dali", seen="; ".join(found),
            fix="Give --preprocess python, or another --name.",
        )  # fmt: skip


def compute_capability(gpu: str) -> str:
    """``sm80`` as CUDA writes it: ``8.0``.

    Raises:
        InputError: Not a compute capability.
    """
    digits = gpu.removeprefix("sm")
    if not (digits.isascii() and digits.isdecimal() and 2 <= len(digits) <= 3):
        raise InputError("not a compute capability", where="--gpu", seen=repr(gpu), wanted="as in sm80 or sm120")
    return f"{int(digits[:-1])}.{digits[-1]}"


def check_gpus(found: Sequence[Bundle], gpus: Sequence[str]) -> None:
    """Checks that the plans match the declared GPUs, and that no two plans are for the same GPU.

    Args:
        found: Bundles with a plan.
        gpus: Declared GPUs, such as ``sm80``; empty to declare none.

    Raises:
        InputError: A GPU has no plan, a plan has no GPU, or two plans are for the same GPU.
    """
    built: dict[str, Path] = {}
    for bundle in found:
        for gpu in engine_of(bundle).gpus:
            if gpu in built:
                raise InputError(f"two plans for {gpu}", where=bundle.path, seen=built[gpu], fix="Package one of them.")
            built[gpu] = bundle.path
    for gpu in gpus:
        compute_capability(gpu)
        if not any(_serves(engine_of(bundle), gpu) for bundle in found):
            raise InputError(
                "there is no plan for this GPU", where=f"--gpu {gpu}", seen=f"plans for {', '.join(built)}",
                fix=f"Convert on a GPU with {gpu}, and package that bundle too.",
            )  # fmt: skip
    for bundle in found if gpus else ():
        if not any(_serves(engine_of(bundle), gpu) for gpu in gpus):
            raise InputError(
                "the plan is for a GPU that was not declared", where=bundle.path,
                seen=", ".join(engine_of(bundle).gpus), wanted=" or ".join(gpus),
                fix="Leave it out, or convert on such a GPU.",
            )  # fmt: skip


def _serves(engine: Engine, gpu: str) -> bool:
    anywhere = bool(engine.options.get("hardware_compatible")) and int(gpu.removeprefix("sm")) >= _AMPERE
    return gpu in engine.gpus or anywhere


def version_compatible(found: Sequence[Bundle]) -> bool:
    """Whether a later TensorRT runs all plans, because each contains the lean runtime of its own version.

    Earlier versions of evit-deploy always included the lean runtime and did not record it.
    """
    options = [engine_of(bundle).options for bundle in found]
    return all(each.get("version_compatible") and each.get("lean_runtime", True) for each in options)


def server_for(found: Sequence[Bundle], platform: str, options: TritonOptions) -> TritonRelease:
    """Returns the declared server, after checking that it can run the bundles.

    Args:
        found: The bundles.
        platform: The platform.
        options: Release, TensorRT version and digest of the server.

    Raises:
        InputError: Its TensorRT is unknown or differs from the one that built the plans.
    """
    server = _server_for(found, platform, options.server, options.server_tensorrt)
    digest = options.server_digest
    if digest is None:
        return server
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest):
        raise InputError("not a digest", where="--server-digest", seen=repr(digest), wanted="sha256: and 64 digits")
    if options.server is None:
        raise InputError(
            "a digest identifies one image", where="--server-digest", fix="Give its release: --server 26.07."
        )
    return msgspec.structs.replace(server, digest=digest)


def _server_for(found: Sequence[Bundle], platform: str, release: str | None, tensorrt: str | None) -> TritonRelease:
    if platform != "tensorrt":
        if tensorrt is not None:
            raise InputError("only a plan depends on the server's TensorRT", where="--server-tensorrt", seen=tensorrt)
        server = declared_server(release, None, None)
        quantized = next((bundle for bundle in found if bundle.manifest.precision in QUANTIZED), None)
        known = server.onnxruntime
        if platform == "onnxruntime" and quantized and known and Version(known) < Version(QUANTIZES):
            raise InputError(
                f"Triton {server.release} has ONNX Runtime {known}, which does not run {quantized.manifest.precision}",
                where="--server", seen=server.release,
                wanted=f"a release with ONNX Runtime {QUANTIZES} or newer, as {max(RELEASES)}",
            )  # fmt: skip
        return server
    headers = [read_header(bundle.file(ENGINE)).version for bundle in found]
    lasting = version_compatible(found)
    server = declared_server(release, tensorrt, None if lasting else headers[0])
    if server.tensorrt is None:
        raise InputError(
            f"the TensorRT version of Triton {release} is unknown", where="--server",
            fix=f"Give --server-tensorrt VERSION. Known are {min(RELEASES)} to {max(RELEASES)}.",
        )  # fmt: skip
    for bundle, built in zip(found, headers, strict=True):
        later = lasting and not older(server.tensorrt, built)
        if not (same(server.tensorrt, built) or later):
            raise InputError(
                "the plan was built with another TensorRT than the server's, and runs on that one only",
                where=bundle.path, seen=built, wanted=f"{server.tensorrt}, as in Triton {server.release}",
                fix=f"Convert in the container {CONTAINER}:{server.release}-py3, or declare another server.",
            )  # fmt: skip
    return server
