"""Reads the header of a plan file without TensorRT, and checks whether the plan matches this machine."""

import shlex
import struct
from pathlib import Path

import msgspec

from evit_deploy.environment.availability import RTX_GPUS
from evit_deploy.errors import EvitDeployError, InputError, MissingRequirement

FAMILIES = {b"ftrt": "tensorrt", b"vtrt": "tensorrt-rtx"}
"""First four bytes of a plan -> name of its target. TensorRT's format is the one that ``trtexec --getPlanVersionOnly``
checks (NVIDIA/TensorRT, samples/common/sampleEngines.cpp, printPlanVersion: tag 0x74727466, serialization version 0,
then the version in bytes 24 to 27); TensorRT-RTX 1.7.1 writes the same format with its own tag.
"""

MODULES = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
HEADER = 28
_ONNX_SECOND_FIELDS = (0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42)  # tags of ModelProto's fields 2 to 8


class PlanHeader(msgspec.Struct, frozen=True):
    """Header of a plan.

    Args:
        family: ``tensorrt`` or ``tensorrt-rtx``.
        version: Version of the library that built it, four numbers.
        gpus: Compute capabilities it was built for; empty if not in the header, as in TensorRT's.
    """

    family: str
    version: str
    gpus: tuple[str, ...] = ()


def read_header(path: Path) -> PlanHeader:
    """Reads the header of a plan, without TensorRT.

    Raises:
        InputError: The file is missing or not a plain plan: empty, truncated, text, ONNX, or with other data in front.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            size = path.stat().st_size
    except OSError as error:
        raise InputError(f"the plan cannot be read ({error.strerror})", where=path) from None
    if not start:
        raise InputError("the file is empty", where=path, wanted="a TensorRT plan", fix="Build the engine again.")
    family = FAMILIES.get(start[:4])
    if family is None:
        raise _stranger(path, start)
    if len(start) < HEADER:
        raise InputError(
            "the plan is cut short", where=path, seen=f"{size} bytes", fix="Copy it again, or build the engine again."
        )
    serialization = struct.unpack_from("<I", start, 4)[0]
    version = ".".join(str(number) for number in start[24:28])
    if serialization != 0 or version.startswith("0.0."):
        raise InputError(
            f"the plan is damaged, or for an unsupported version of {MODULES[family]}",
            where=path,
            seen=f"serialization {serialization}, version {version}",
            wanted="serialization 0",
            fix="Copy it again, or build the engine again.",
        )
    gpus: tuple[str, ...] = ()
    if family == "tensorrt-rtx":
        gpus = _rtx_gpus(path, start, size)
    return PlanHeader(family, version, gpus)


def _rtx_gpus(path: Path, start: bytes, size: int) -> tuple[str, ...]:
    """Reads the GPUs from a TensorRT-RTX header, as written by 1.7.1.

    Found by comparing plans for every single target and for several: bytes 16 to 23 are the length of the file, and a
    second tag is followed by the compute capabilities as bits. The format is undocumented, so a header that does not
    look like this is not an error; its GPUs are then unknown.
    """
    if len(start) < 64 or start[28:32] != b"vtrt":
        return ()
    length = struct.unpack_from("<Q", start, 16)[0]
    if size < length:
        raise InputError(
            "the plan is cut short",
            where=path,
            seen=f"{size} bytes",
            wanted=f"{length} bytes",
            fix="Copy it again, or build the engine again.",
        )
    bits = struct.unpack_from("<Q", start, 32)[0]
    if not bits or bits >> len(RTX_GPUS):
        return ()
    return tuple(name for index, name in enumerate(RTX_GPUS) if bits >> index & 1)


def _stranger(path: Path, start: bytes) -> InputError:
    """Returns the error for a file that does not start like a plan, with a guess of what it is."""
    length = int.from_bytes(start[:4], "little")
    if start[4:5] == b"{" and 2 <= length < 1 << 20:  # Ultralytics: the length of a JSON text, the text, the plan
        fix = f"Cut it off: tail -c +{length + 5} {shlex.quote(path.name)} > engine.plan"
        return InputError("metadata stands in front of the plan, as Ultralytics writes it", where=path, fix=fix)
    if start.startswith(b"version https://git-lfs"):
        return InputError("a Git LFS pointer, not the plan itself", where=path, fix="Fetch the file: git lfs pull.")
    if start[0] == 0x08 and len(start) > 2 and start[2] in _ONNX_SECOND_FIELDS:
        fix = "Give it its .onnx name back, or build an engine from it: evit-deploy convert --target tensorrt."
        return InputError("an ONNX model, not a plan", where=path, fix=fix)
    if all(byte in b"\t\n\r" or byte >= 0x20 for byte in start) and _is_text(start):
        return InputError("a text file, not a plan", where=path, seen=repr(start[:20].decode("utf-8", "ignore")))
    return InputError(
        "not a TensorRT plan",
        where=path,
        seen=f"a file that starts with {start[:4]!r}",
        wanted=" or ".join(f"{tag!r} ({MODULES[name]})" for tag, name in FAMILIES.items()),
    )


def _is_text(start: bytes) -> bool:
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return (
            len(start) == 4096 and error.start > 4092
        )  # only the last character is incomplete, because reading stopped there
    return True


def misfit(path: Path, header: PlanHeader, *, version: str, gpu: str | None) -> EvitDeployError | None:
    """Returns why a plan does not match this machine, as far as its header shows; ``None`` if it does.

    Call this only after the library has refused the plan: a version-compatible plan with a lean runtime also runs on
    a newer TensorRT, and its header does not show that.

    Args:
        path: The plan, for the message.
        header: Its header.
        version: Version of the library on this machine.
        gpu: Compute capability of this machine's GPU, such as ``sm80``.
    """
    name = MODULES[header.family]
    if version.split(".")[:3] != header.version.split(".")[:3]:
        package = header.family if header.family == "tensorrt" else "tensorrt-rtx"
        numbers = ".".join(header.version.split(".")[:3])
        return MissingRequirement(
            f"the plan was built with another {name}, and runs on that one only",
            where=path,
            seen=f"{name} {version} here",
            wanted=header.version,
            fix=f'Convert again here, or: pip install "{package}=={numbers}.*"',
        )
    if gpu is not None and header.gpus and gpu not in header.gpus:
        return InputError(
            "the plan was built for another GPU",
            where=path,
            seen=f"{gpu} here",
            wanted=" or ".join(header.gpus),
            fix=f"Convert again on this machine, or with --gpu {gpu}.",
        )
    return None
