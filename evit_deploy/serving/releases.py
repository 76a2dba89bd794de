"""Releases of Triton Inference Server, their contents, and the choice of one for a package."""

import re

import msgspec
from packaging.version import Version

from evit_deploy.errors import InputError

IMAGE = "nvcr.io/nvidia/tritonserver"


class Release(msgspec.Struct, frozen=True):
    """Contents of one month's container.

    Args:
        tensorrt: Version of TensorRT as far as known, usually only the major version.
        onnxruntime: Version of ONNX Runtime.
    """

    tensorrt: str
    onnxruntime: str


RELEASES = {
    "25.09": Release("10", "1.23.0"),
    "25.10": Release("10", "1.23.1"),
    "25.11": Release("10", "1.23.2"),
    "25.12": Release("10", "1.23.2"),
    "26.01": Release("10", "1.23.2"),
    "26.02": Release("10", "1.24.1"),
    "26.03": Release("10", "1.24.2"),
    "26.04": Release("10", "1.24.4"),
    "26.05": Release("10", "1.24.4"),
    "26.06": Release("11", "1.24.4"),
    "26.07": Release("11", "1.27.0"),
}
"""Month -> contents, starting with ONNX Runtime 1.23, the first to support the opset of ``model.onnx``.

Sources: for ONNX Runtime, triton-inference-server/server, docs/introduction/compatibility.md at e1db8a6. That page
lists TensorRT only for the TensorRT-LLM images; the ``-py3`` images moved from 10 to 11 with 26.06 (server#8828). Full
TensorRT versions are in NVIDIA's support matrix, https://docs.nvidia.com/deeplearning/frameworks/support-matrix/, and
in a container in the output of ``dpkg -l libnvinfer-bin``.
"""


QUANTIZES = "1.24"
"""First ONNX Runtime that runs the INT8 models of ``convert``; 1.23 does not support ``QuantizeLinear`` of opset 23."""

FREES_BODIES = "26.05"
"""First release that frees the decompressed body of a refused request (server#8764)."""


class TritonRelease(msgspec.Struct, frozen=True):
    """The Triton server of a package.

    Args:
        release: Month of the container, such as ``26.07``.
        tensorrt: Its TensorRT version, as far as known.
        onnxruntime: Its ONNX Runtime version, if known.
        digest: Digest of the container, ``sha256:…``, if given.
    """

    release: str
    tensorrt: str | None
    onnxruntime: str | None
    digest: str | None = None

    @property
    def image(self) -> str:
        """Name of the container, pinned by its digest if given."""
        return f"{IMAGE}:{self.release}-py3" + (f"@{self.digest}" if self.digest is not None else "")


def declared_server(release: str | None, tensorrt: str | None, plan: str | None) -> TritonRelease:
    """Returns the declared server, completed with the known contents of its release.

    Args:
        release: Month of the container. Default: the newest known one that fits.
        tensorrt: Version of TensorRT in it. Default: the known version of the release.
        plan: Version of TensorRT that built the plan, if any.

    Raises:
        InputError: A version is invalid, or no known release fits.
    """
    for option, value in (("--server", release), ("--server-tensorrt", tensorrt)):
        if value is not None and not re.fullmatch(r"[0-9]+(\.[0-9]+)*", value):
            raise InputError("not a version", where=option, seen=repr(value), wanted="numbers, as in 26.07 or 11.1.0")
    if release is not None and (len(release) != 5 or release.count(".") != 1):
        raise InputError("not a release of Triton", where="--server", seen=repr(release), wanted="year.month, as 26.07")
    if release is not None and release < min(RELEASES):
        raise InputError(
            "this Triton is too old for these models", where="--server", seen=release, wanted=min(RELEASES)
        )
    if release is None:
        wanted = tensorrt or plan
        fitting = [month for month, known in RELEASES.items() if wanted is None or same(known.tensorrt, wanted)]
        if not fitting:
            raise InputError(
                f"no release of Triton with TensorRT {wanted} is known", where="--server",
                fix="Give --server YY.MM --server-tensorrt VERSION.",
            )  # fmt: skip
        release = max(fitting)
    known = RELEASES.get(release)
    if known is not None and tensorrt is not None and not same(known.tensorrt, tensorrt):
        raise InputError(
            f"Triton {release} has another TensorRT", where="--server-tensorrt", seen=tensorrt, wanted=known.tensorrt
        )
    return TritonRelease(release, tensorrt or (known.tensorrt if known else None), known.onnxruntime if known else None)


def same(one: str, other: str) -> bool:
    """Whether two versions of TensorRT agree in the parts (major, minor, patch) that both have.

    >>> same("11", "11.1.0.106"), same("11.1", "11.2.0"), same("10.14.1.48", "10.14.1.50")
    (True, False, True)
    """
    return all(a == b for a, b in _shared(one, other))


def older(one: str, other: str) -> bool:
    """Whether a version of TensorRT is older than another in the parts (major, minor, patch) that both have.

    >>> older("10.13", "10.14.1.48"), older("10.14", "10.14.1.48"), older("11", "10.14.1")
    (True, False, False)
    """
    return next((a < b for a, b in _shared(one, other) if a != b), False)


def _shared(one: str, other: str) -> list[tuple[int, int]]:
    return list(zip(Version(one).release[:3], Version(other).release[:3], strict=False))
