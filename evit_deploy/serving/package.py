"""Packages verified bundles into a folder for Triton or for a C++ program.

All checks (:mod:`evit_deploy.serving.gates`) run before anything is written.
"""

import logging
import math
import os
import re
import shutil
import typing
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path

import msgspec

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.bundle import Bundle, Staging
from evit_deploy.bundle.manifest import ENGINE, GOLDEN, MANIFEST, PACKAGE, REPORT, Parent
from evit_deploy.engines.plugin.library import LIBRARY, plugin_for
from evit_deploy.environment.machine import versions
from evit_deploy.errors import GateFailed, InputError
from evit_deploy.files import hashes, sha256
from evit_deploy.progress import doing
from evit_deploy.serving import cpp as cpp_folder
from evit_deploy.serving.deployment import CLOSED_SCRIPT, Launch
from evit_deploy.serving.gates import (
    check_files,
    check_gpus,
    check_preprocess,
    check_same,
    check_tensors,
    compute_capability,
    device_for,
    doubt,
    engine_of,
    files_of,
    labels_of,
    platform_of,
    server_for,
    version_compatible,
)
from evit_deploy.serving.kubernetes import kubernetes
from evit_deploy.serving.options import Device, PackageOptions, Publish, Purpose, TritonOptions
from evit_deploy.serving.readme import triton_readme
from evit_deploy.serving.releases import FREES_BODIES, TritonRelease
from evit_deploy.serving.repository import MAX_BATCH, MODEL_FILES, Serving, covered, write_repository
from evit_deploy.serving.sbom import SBOM, bill_of_materials, cpp_parts, triton_parts

_LOG = logging.getLogger(__name__)

_HTTP_LIMIT = 64 << 20
"""Triton's default limit of an HTTP request, in bytes."""
_HTTP_HEADER = 1 << 20
"""Upper bound of the JSON description before the tensors, in bytes."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


class Package(msgspec.Struct, frozen=True):
    """Content of ``package.json``.

    Args:
        target: Purpose of the package: ``triton`` or ``cpp``.
        name: Name of the model.
        platform: Platform that runs it.
        verified: Whether every bundle was verified on that platform.
        doubts: Why not, if it was packaged with ``--unverified``.
        parents: The bundles, with the hashes of their manifests.
        gpus: Declared compute capabilities.
        server: Triton's release and its contents.
        plugin: SHA-256 of the plugin library that the plan needs.
        launch: The server's command line.
        options: The requested settings of the server.
        files: Name inside the package -> SHA-256 of every file but this one.
        versions: Packages that created it.
        notes: Assumptions and warnings.
        format: Version of this structure.
    """

    target: str
    name: str
    platform: str
    verified: bool
    doubts: list[str]
    parents: list[Parent]
    gpus: list[str]
    server: TritonRelease | None
    plugin: str | None
    launch: list[str]
    options: TritonOptions | None
    files: dict[str, str]
    versions: dict[str, str]
    notes: list[str] = []
    format: int = 1

    @property
    def called(self) -> str:
        """Name of the model that clients call."""
        alone = self.options is not None and self.options.preprocess == "none"
        return f"{self.name}_model" if alone else self.name


def package(
    paths: str | Path | Sequence[str | Path],
    purpose: str,
    *,
    options: PackageOptions | None = None,
    triton: TritonOptions | None = None,
    out: str | Path | None = None,
    force: bool = False,
) -> tuple[Path, Package]:
    """Packages the bundles of one model.

    Args:
        paths: The bundle, or several bundles with TensorRT plans for different GPUs.
        purpose: ``triton`` or ``cpp``.
        options: Platform, name, labels, GPUs, plugin.
        triton: Settings of the server; only with ``triton``.
        out: Folder to write. Default: ``<name>-<purpose>`` next to the first bundle.
        force: Whether to replace an existing package.

    Returns:
        The folder, and the content of its ``package.json``.

    Raises:
        InputError: The bundles or options cannot be packaged; nothing was written.
        GateFailed: A bundle was not verified on the platform; nothing was written.
        MissingRequirement: The plugin library or ``tritonclient`` is missing; nothing was written.
        StageError: Writing failed.
    """
    options, target = options or PackageOptions(), purpose
    paths = [paths] if isinstance(paths, str | Path) else paths
    found, name, place = _read([Path(path) for path in paths], target, options.name, out, triton)
    bundles.check_out(place, force=force)
    platform = platform_of(found[0], target, options.platform)
    for bundle in found:
        check_tensors(bundle)
        platform_of(bundle, target, platform)
    check_same(found, platform)
    first = found[0]
    names = labels_of(first, Path(options.labels) if options.labels is not None else None)
    doing(_LOG, "checking the bundles' files")
    for bundle in found:
        check_files(bundle)
    doubts = [f"{bundle.path.name}: {reason}" for bundle in found if (reason := doubt(bundle, platform)) is not None]
    if doubts and not options.unverified:
        raise GateFailed(
            f"not verified on {platform}: {'; '.join(doubts)}",
            fix="Convert where it can be verified, or give --unverified, which is written into the package.",
        )
    gpus = [gpu.strip().lower() for gpu in options.gpus]
    if platform.startswith("tensorrt"):
        check_gpus(found, gpus)
    elif gpus:
        raise InputError("only a plan depends on the GPU", where="--gpu", seen=", ".join(gpus), fix="Leave it out.")
    library = plugin_for(first.manifest.engine, options.plugin) if platform == "tensorrt" else None
    served = (triton or TritonOptions()) if target == "triton" else None
    server = serving = None
    if served is not None:
        server = server_for(found, platform, served)
        serving = _serving(found, name, platform, names, served)
    notes = [f"NOT verified on {platform}: {reason}" for reason in doubts] + _notes(server, platform, served)
    for note in notes:
        _LOG.warning(note)

    doing(_LOG, "writing the package")
    with Staging(place, force=force) as staging:
        if library is not None:
            (staging.path / "plugins").mkdir()
            shutil.copyfile(library, staging.path / "plugins" / LIBRARY)
        launch = None
        if served is not None and serving is not None and server is not None:
            launch = _launch(found, serving, server, served, plugin=library is not None)
            _write_triton(staging.path, found, serving, launch, notes)
            _write_rest(first, names, (), staging.path, place)
        else:
            cpp_folder.write_example(staging.path, name, platform, plugin=library is not None)
            _write_rest(first, names, files_of(platform), staging.path / cpp_folder.BUNDLE, place / cpp_folder.BUNDLE)
        parents = [Parent(_relative(b.path, place), sha256(b.path / MANIFEST)) for b in found]
        parts = cpp_parts(platform, first.manifest) if launch is None else triton_parts(launch.server, launch.pillow)
        bill = bill_of_materials(name, first.manifest, parents, hashes(staging.path), parts)
        (staging.path / SBOM).write_bytes(bill)
        made = Package(
            target=target,
            name=name,
            platform=platform,
            verified=not doubts,
            doubts=doubts,
            parents=parents,
            gpus=list(gpus),
            server=server,
            plugin=sha256(library) if library is not None else None,
            launch=launch.arguments() if launch is not None else [],
            options=served,
            files=hashes(staging.path),
            versions=versions(),
            notes=notes,
        )
        (staging.path / PACKAGE).write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=2))
        staging.publish(place)
    return place, made


def _read(
    paths: Sequence[Path], target: str, name: str | None, out: str | Path | None, triton: TritonOptions | None
) -> tuple[list[Bundle], str, Path]:
    """Reads the bundles; returns them with the model's name and the folder of the package."""
    if target not in typing.get_args(Purpose):
        wanted = " or ".join(typing.get_args(Purpose))
        raise InputError("unknown purpose", where="--for", seen=repr(target), wanted=wanted)
    if triton is not None:
        _check_options(triton, target)
    if not paths:
        raise InputError("no bundle was given")
    found = [bundles.read_bundle(path) for path in paths]
    folder = found[0].path.resolve()
    chosen = name or re.sub(r"[^A-Za-z0-9_.-]", "_", folder.name)
    if not _NAME.fullmatch(chosen):
        wanted = "at most 100 letters, digits, _, - and ., the first a letter or a digit"
        raise InputError("not a name that Triton takes", where="--name", seen=repr(chosen), wanted=wanted)
    place = Path(out) if out is not None else folder.with_name(f"{chosen}-{target}")
    for bundle in found:
        if place.resolve().is_relative_to(bundle.path.resolve()):
            raise InputError("a package cannot be inside its bundle", where=place, fix="Give another --out.")
    return found, chosen, place


def _check_options(options: TritonOptions, target: str) -> None:
    if target != "triton":
        raise InputError("options of the server are for Triton only", where=f"--for {target}", fix="Leave them out.")
    if options.preprocess not in ("python", "dali", "none"):
        wanted = "python, dali or none"
        raise InputError("unknown preprocessing", where="--preprocess", seen=repr(options.preprocess), wanted=wanted)
    for where, seen, kinds in (("--device", options.device, Device), ("--publish", options.publish, Publish)):
        if seen is not None and seen not in typing.get_args(kinds):
            raise InputError(
                "not one of these", where=where, seen=repr(seen), wanted=" or ".join(typing.get_args(kinds))
            )


def _serving(
    found: Sequence[Bundle], name: str, platform: str, labels: list[str] | None, options: TritonOptions
) -> Serving:
    """Returns how Triton serves the model.

    Raises:
        InputError: The server cannot preprocess images for the model, or the plan does not cover the batch sizes.
    """
    manifest = found[0].manifest
    profiles = engine_of(found[0]).profiles if platform == "tensorrt" else ()
    most = covered(profiles) if profiles else None
    if most == 0:
        raise InputError(
            "the plan does not accept a single image, and Triton may have to send one", where=found[0].path,
            seen=" and ".join(map(str, profiles)), fix="Convert again with --batch 1:8:32.",
        )  # fmt: skip
    max_batch = options.max_batch or most or MAX_BATCH[platform]
    if most is not None and max_batch > most:
        raise InputError(
            "the plan does not accept every batch size up to this one", where="--max-batch", seen=max_batch,
            wanted=f"at most {most}",
        )  # fmt: skip
    device = device_for(platform, options.device)
    check_preprocess(manifest, name, device, options.preprocess)
    plans = {}
    if len(found) > 1:
        plans = {compute_capability(gpu): _plan_name(b) for b in found for gpu in engine_of(b).gpus}
    return Serving(
        name=name,
        platform=platform,
        inputs=manifest.inputs,
        outputs=manifest.outputs,
        max_batch=max_batch,
        preprocess=manifest.preprocess if options.preprocess != "none" else None,
        decoder=options.preprocess if options.preprocess != "none" else "python",
        labels=labels,
        profiles=profiles,
        plans=plans,
        on_gpu=device == "gpu",
        cpus=options.cpus,
        instances=options.instances,
        queue_delay=options.queue_delay,
    )


def _plan_name(bundle: Bundle) -> str:
    """File name of one of several plans."""
    return f"model_{'_'.join(engine_of(bundle).gpus)}.plan"


def _launch(
    found: Sequence[Bundle], serving: Serving, server: TritonRelease, options: TritonOptions, *, plugin: bool
) -> Launch:
    decodes = serving.preprocess is not None and serving.decoder == "python"
    model = max(sum(b.file(name).stat().st_size for name in files_of(serving.platform)) for b in found)
    largest = serving.max_batch * math.prod(size or 1 for size in serving.inputs[0].shape[1:]) * 4
    return Launch(
        name=serving.name,
        server=server,
        on_gpu=serving.on_gpu,
        plugin=LIBRARY if plugin else None,
        version_compatible=serving.platform == "tensorrt" and version_compatible(found),
        pillow=version("pillow") if decodes else None,
        publish=options.publish,
        shared_memory=options.shared_memory,
        cpus=options.cpus,
        memory=options.memory or _memory(model * options.instances, decodes=decodes),
        http_limit=largest + _HTTP_HEADER if largest + _HTTP_HEADER > _HTTP_LIMIT else None,
    )


def _memory(models: int, *, decodes: bool) -> int:
    """Memory of a server in GiB: 3 for itself and CUDA, 3 for shared memory and four decoders, and 3 times its models.

    Args:
        models: Size of the model's files for all instances, in bytes.
        decodes: Whether it decodes images in Python.
    """
    return 3 + (3 if decodes else 0) + math.ceil(3 * models / 2**30)


def _write_triton(folder: Path, found: Sequence[Bundle], serving: Serving, launch: Launch, notes: list[str]) -> None:
    """Writes the model repository and the files that start a server with it."""
    if serving.plans:
        files = {_plan_name(bundle): bundle.file(ENGINE) for bundle in found}
    else:
        named = [MODEL_FILES[serving.platform], "model.bin"]  # the second only for platforms with two files
        files = {name: found[0].file(source) for name, source in zip(named, files_of(serving.platform), strict=False)}
    write_repository(serving, files, folder / "model_repository")
    for name, text in (
        ("Dockerfile", launch.dockerfile()),
        ("compose.yaml", launch.compose()),
        ("kubernetes.yaml", kubernetes(launch)),
        (CLOSED_SCRIPT, _closed_script()),
        ("README.md", triton_readme(serving, launch, notes)),
    ):
        (folder / name).write_text(text, encoding="utf-8")


def _closed_script() -> str:
    return (resources.files("evit_deploy.serving") / "server_files" / CLOSED_SCRIPT).read_text(encoding="utf-8")


def _write_rest(bundle: Bundle, labels: list[str] | None, names: Sequence[str], folder: Path, place: Path) -> None:
    """Writes a smaller copy of the first bundle, which ``verify`` can still read.

    Args:
        bundle: The bundle.
        labels: Class names.
        names: Files to copy, besides the golden answers and the report.
        folder: Folder to write to.
        place: Final path of that folder.
    """
    manifest = bundle.manifest
    kept = [name for name in (*names, GOLDEN, REPORT) if name in manifest.files]
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.file(name), folder / name)
    parents = [
        msgspec.structs.replace(p, source=_relative(bundle.path / p.source, place)) if p.sha256 else p
        for p in manifest.parents
    ]
    files = {name: manifest.files[name] for name in kept}
    manifest = msgspec.structs.replace(manifest, labels=labels, files=files, parents=parents)
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))


def _relative(path: Path, place: Path) -> str:
    """Path relative to the package, so that the package and its bundles can be moved together."""
    return os.path.relpath(path.resolve(), place.resolve())


def _notes(server: TritonRelease | None, platform: str, options: TritonOptions | None) -> list[str]:
    """Notes about assumptions, and about differences from what was verified."""
    notes = []
    if options is not None and options.preprocess == "dali":
        notes.append(
            "With DALI the model sees pixels that are near those it was verified with, and not the same; "
            "Triton's DALI backend itself has not been tested."
        )
    if server is not None and server.release < FREES_BODIES:
        notes.append(
            f"Triton {server.release} keeps the memory of compressed bodies that it refuses, until its limit ends it: "
            f"take {FREES_BODIES} or later, or a gateway that refuses Content-Encoding."
        )
    if server is None or platform != "tensorrt" or server.tensorrt is None or "." in server.tensorrt:
        return notes
    return [
        *notes,
        f"Of Triton {server.release} evit-deploy knows that it has TensorRT {server.tensorrt}, but not the exact "
        f"version; a plan runs on one version only. To see it: docker run --rm {server.image} dpkg -l libnvinfer-bin, "
        "and give --server-tensorrt VERSION.",
    ]
