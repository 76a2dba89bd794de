"""``sbom.json``: the software bill of materials of a package, in CycloneDX 1.6.

It has no date, and its serial number is derived from its contents, so packages are reproducible. The format is
described at https://cyclonedx.org/docs/1.6/json/.
"""

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from evit_deploy.bundle.manifest import Manifest, Parent
from evit_deploy.serving.releases import IMAGE, TritonRelease

SBOM = "sbom.json"
_EXAMPLE = {
    "nlohmann-json": "pkg:github/nlohmann/json",
    "openssl": "pkg:generic/openssl",
    "libpng": "pkg:generic/libpng",
    "libjpeg-turbo": "pkg:github/libjpeg-turbo/libjpeg-turbo",
}
"""Libraries that the C++ program is built with, besides its runtime; versions depend on the build machine."""


def triton_parts(server: TritonRelease, pillow: str | None) -> list[dict[str, Any]]:
    """Returns the known components of a server's image.

    Args:
        server: The server.
        pillow: Version of Pillow that is installed into it, if any.
    """
    name, tag = IMAGE.rpartition("/")[2], f"{server.release}-py3"
    version = f"@{server.digest.replace(':', '%3A')}" if server.digest is not None else ""
    image: dict[str, Any] = {
        "type": "container", "bom-ref": "server", "name": IMAGE, "version": tag,
        "purl": f"pkg:oci/{name}{version}?repository_url={IMAGE}&tag={tag}",
    }  # fmt: skip
    if server.digest is not None:
        image["hashes"] = _hash(server.digest.removeprefix("sha256:"))
    inside = {"tensorrt": server.tensorrt, "onnxruntime": server.onnxruntime}
    image["components"] = [
        {"type": "library", "bom-ref": f"server/{part}", "name": part, "version": known}
        for part, known in inside.items()
        if known is not None
    ]
    return [image, *([_python("pillow", pillow)] if pillow is not None else [])]


def cpp_parts(platform: str, manifest: Manifest) -> list[dict[str, Any]]:
    """Returns the components of the C++ program.

    Args:
        platform: Its runtime.
        manifest: Manifest of the bundle, with the version of the runtime that built the plan, if any.
    """
    runtime: dict[str, Any] = {"type": "library", "bom-ref": platform, "name": platform}
    if manifest.engine is not None and platform == manifest.engine.target:
        runtime["version"] = manifest.engine.version
    libraries = [{"type": "library", "bom-ref": name, "name": name, "purl": purl} for name, purl in _EXAMPLE.items()]
    return [runtime, *libraries]


def bill_of_materials(
    name: str,
    manifest: Manifest,
    bundles: Sequence[Parent],
    files: Mapping[str, str],
    parts: Sequence[Mapping[str, Any]],
) -> bytes:
    """Returns the document as JSON.

    Args:
        name: Name of the model.
        manifest: Manifest of the first bundle.
        bundles: The bundles, with the hashes of their manifests.
        files: Name in the package -> SHA-256.
        parts: Components that run the model: :func:`triton_parts` or :func:`cpp_parts`.
    """
    ancestors = [
        {"type": "data", "bom-ref": f"ancestor/{number}", "name": PurePosixPath(parent.source).name}
        | ({"hashes": _hash(parent.sha256)} if parent.sha256 is not None else {})
        for number, parent in enumerate([*manifest.parents, *bundles])
    ]
    model = {
        "type": "machine-learning-model", "bom-ref": "model", "name": name,
        "description": f"{manifest.model}, {manifest.kind}, {manifest.precision}",
        "pedigree": {"ancestors": ancestors},
    }  # fmt: skip
    listed = [
        {"type": "file", "bom-ref": f"file/{path}", "name": path, "hashes": _hash(digest)}
        for path, digest in sorted(files.items())
    ]
    components = [model, *parts, *listed]
    tools = [
        {"type": "application", "name": tool, "version": version} if tool == "evit-deploy" else _python(tool, version)
        for tool, version in sorted(manifest.versions.items())
    ]
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "component": {"type": "application", "bom-ref": "package", "name": name},
            "tools": {"components": tools},
        },
        "components": components,
        "dependencies": [{"ref": "package", "dependsOn": [part["bom-ref"] for part in components]}],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(document, sort_keys=True))
    return json.dumps(document | {"serialNumber": f"urn:uuid:{serial}"}, indent=2).encode() + b"\n"


def _python(name: str, version: str) -> dict[str, Any]:
    return {
        "type": "library", "bom-ref": f"pypi/{name}", "name": name, "version": version,
        "purl": f"pkg:pypi/{name}@{version}",
    }  # fmt: skip


def _hash(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]
