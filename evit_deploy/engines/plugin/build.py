"""``evit-deploy plugin``: compiles ``plugins/`` with CMake into the user's cache, and checks the libraries."""

import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from evit_deploy import interrupts
from evit_deploy.engines.plugin import library as plugin
from evit_deploy.environment.availability import TENSORRT
from evit_deploy.environment.machine import device, versions
from evit_deploy.environment.nvidia import compute_capability
from evit_deploy.environment.requirements import version_of
from evit_deploy.errors import InputError, MissingRequirement, StageError
from evit_deploy.files.drafts import draft
from evit_deploy.progress import doing
from evit_deploy.report.report import Check, Report
from evit_deploy.tokens.operators.kernel import DTYPES, TokenReorgKernel
from evit_deploy.tokens.operators.library import ABI, KERNEL, Identity, cache, read_identity
from evit_deploy.tokens.operators.token_reorg import token_reorg
from evit_deploy.tokens.operators.torch_ops import runs_on, using

_LOG = logging.getLogger(__name__)

LIBRARIES = (plugin.LIBRARY, plugin.CREATORS, KERNEL)
HEADERS = {
    10: "9973b2f4ab5c0d0055e9d36cd94a5692f8f8da1f",  # 10.15
    11: "82d1dca801c8318a5605399d5240780d0679e4e1",  # 11.1
}
"""TensorRT's major version -> commit of NVIDIA/TensorRT to download headers from if none are installed."""
TIME_LIMIT = 1800.0
_TOOLS = {
    "cmake": "pip install cmake",
    "nvcc": "Install NVIDIA's CUDA toolkit, or add its bin folder to PATH.",
    "c++": "Install a C++ compiler: apt-get install g++.",
}


def sources() -> Path:
    """Returns the folder ``plugins/``, in the installed package or in the checkout."""
    package = Path(__file__).parents[2]
    return next((f for f in (package / "plugins", package.parent / "plugins") if f.is_dir()), package / "plugins")


def build_plugin(
    out: Path | None = None,
    *,
    tensorrt_root: Path | None = None,
    architectures: Sequence[str] = (),
    kernel_only: bool = False,
) -> Path:
    """Compiles the plugin, runs its C++ tests, and installs the libraries.

    Args:
        out: Folder for the libraries. Default: a folder in the cache, where ``--plugin auto`` finds them.
        tensorrt_root: Folder with TensorRT's ``include/``. Default: ``$TENSORRT_ROOT``, the system's, or a download of
            the headers that NVIDIA publishes.
        architectures: CUDA architectures, such as ``90`` or ``sm90``. Default: all that the plugin supports.
        kernel_only: Whether to build only the kernel's library for PyTorch, without TensorRT.

    Returns:
        The folder with the libraries.

    Raises:
        InputError: An architecture or a folder is invalid.
        MissingRequirement: A compiler or TensorRT's headers are missing.
        StageError: The code does not compile, or its tests fail.
    """
    if out is not None and out.exists() and not out.is_dir():
        raise InputError("this is a file", where=f"--out {out}", wanted="a folder for the libraries")
    for tool, fix in _TOOLS.items():
        if shutil.which(tool) is None:
            raise MissingRequirement(f"{tool} was not found", where="plugin build", fix=fix)
    if kernel_only and tensorrt_root is not None:
        raise InputError("TensorRT is left out", where="--kernel-only", seen="--tensorrt-root", fix="Give one of them.")
    root, told_by = tensorrt_root, "--tensorrt-root "
    if not kernel_only and root is None and os.environ.get("TENSORRT_ROOT"):
        root, told_by = Path(os.environ["TENSORRT_ROOT"]), "TENSORRT_ROOT="
    if root is not None and not (root / "include" / "NvInferRuntime.h").is_file():
        raise InputError(
            "TensorRT's headers are not there", where=f"{told_by}{root}", wanted="include/NvInferRuntime.h",
            fix="Give the folder that TensorRT was unpacked to, or a checkout of NVIDIA/TensorRT.",
        )  # fmt: skip
    installed = version_of(TENSORRT)
    major = int(installed.split(".")[0]) if installed else max(HEADERS)
    arguments = ["-DCMAKE_BUILD_TYPE=Release", f"-DTENSORRT_ROOT={root.resolve() if root else ''}"]
    arguments += [f"-DEVIT_TENSORRT_COMMIT={HEADERS.get(major, HEADERS[max(HEADERS)])}"]
    if kernel_only:
        arguments.append("-DEVIT_TENSORRT=OFF")
    if architectures:
        arguments.append(f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(map(_architecture, architectures))}")
    with draft() as room:
        folder, scratch = room.folder, str(room.folder)
        doing(_LOG, "looking for compilers and headers")
        said = _run(["cmake", "-S", str(sources()), "-B", scratch, *arguments], "the plugin cannot be configured")
        if not kernel_only and "evit: the plugin is not built" in said:
            raise MissingRequirement(
                "TensorRT's headers are not on this machine and could not be fetched", where="plugin build",
                fix="Give the folder with include/NvInferRuntime.h (a TensorRT archive, or NVIDIA/TensorRT checked "
                "out at your release): --tensorrt-root FOLDER.",
            )  # fmt: skip
        doing(_LOG, "compiling (a minute or two)")
        jobs = str(os.cpu_count() or 1)
        _run(["cmake", "--build", scratch, "--parallel", jobs], "the plugin does not compile")
        doing(_LOG, "running its tests")
        _run(["ctest", "--test-dir", scratch, "--output-on-failure"], "the plugin's own tests fail")
        built = [folder / "token_reorg" / name for name in ((KERNEL,) if kernel_only else LIBRARIES)]
        return _install(built, out or cache() / _label(read_identity(built[0])))


def _architecture(name: str) -> str:
    number = name.strip().lower().removeprefix("sm").removeprefix("_")
    if not number.isdecimal() or not 75 <= int(number) <= 150:
        raise InputError("not a CUDA architecture", where="--architectures", seen=repr(name), wanted="80, 90, 120, ...")
    return number


def _label(identity: Identity) -> str:
    return f"{identity.version}-" + (f"tensorrt{identity.tensorrt}" if identity.tensorrt else "kernel")


def _install(built: Sequence[Path], out: Path) -> Path:
    """Installs libraries atomically; a process that has loaded an older one is not affected."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with draft(out) as making:
            for library in built:
                shutil.copy2(library, making.folder)
            for library in built:
                making.publish(making.folder / library.name, out / library.name, replace=True)
    except OSError as error:
        raise StageError(f"the libraries could not be written ({error.strerror})", where=out) from error
    return out


def _run(command: list[str], failed: str) -> str:
    """Runs a tool and returns its output; a failure is reported with its first error message.

    On a timeout or an interrupt, the processes that the tool has started (make, compilers) are killed too.
    """
    with contextlib.ExitStack() as stack:
        try:
            with interrupts.held():  # an interrupt before the assignment would leave the process running
                process = stack.enter_context(_Ended(command))
        except OSError as error:
            raise MissingRequirement(f"{command[0]} cannot be run ({error.strerror})", where="plugin build") from None
        try:
            said, complaints = process.communicate(timeout=TIME_LIMIT)
        except subprocess.TimeoutExpired:
            what = f"{failed}: {command[0]} took more than {TIME_LIMIT:g} seconds"
            raise StageError(what, where="plugin build") from None
    if process.returncode:
        raise StageError(f"{failed}: {_complaint(said + complaints)}", where="plugin build")
    return said


class _Ended(subprocess.Popen[str]):
    """A process that is killed, with all its children, if the ``with`` block fails."""

    def __init__(self, command: list[str]) -> None:
        super().__init__(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", start_new_session=True
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        super().__exit__(kind, error, trace)


def _complaint(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    starts = [i for i, line in enumerate(lines) if "rror" in line and "-Werror" not in line]
    picked = lines[starts[0] : starts[0] + 4] if starts else lines[-3:]
    return " ".join(picked)[:700] or "it does not say why"


def check_plugin(library: Path | None = None) -> Report:
    """Checks a library: its identity, whether it matches this machine, and whether it returns PyTorch's results.

    Args:
        library: The library. Default: the one that ``--plugin auto`` uses.

    Raises:
        InputError: It is not a library of evit-deploy.
        MissingRequirement: The cache has no library.
    """
    path = library or plugin.choose_plugin("auto")
    assert path is not None
    identity = read_identity(path)
    notes = [f"{path}: {identity.kind}, evit-deploy {identity.version}"]
    notes[0] += f", for TensorRT {identity.tensorrt}" if identity.tensorrt else ""
    checks = [Check("interface", identity.abi, ABI, identity.abi == ABI, "built with another version of evit-deploy")]
    found, more = _fits(identity)
    checks, notes = checks + found, notes + more
    doing(_LOG, "loading the library")
    loaded, reason = _loads(path)
    checks.append(Check("loads in a separate process", str(loaded).lower(), "true", loaded, reason))
    if loaded and identity.abi == ABI:
        doing(_LOG, "comparing with PyTorch")
        found, more = _answers(path, identity)
        checks, notes = checks + found, notes + more
    return Report(checks=tuple(checks), notes=tuple(notes), versions=versions(), device=device())


def _fits(identity: Identity) -> tuple[list[Check], list[str]]:
    """Checks that a library matches this machine's TensorRT and GPU."""
    checks, notes = [], []
    if identity.tensorrt is not None:
        installed = version_of(TENSORRT)
        if installed is None:
            notes.append("TensorRT is not installed here: whether it takes the plugin was not checked.")
        else:
            reason = plugin.misfit(identity)
            checks.append(Check("TensorRT", identity.tensorrt, installed, reason is None, reason or ""))
    capability = compute_capability() if torch.cuda.is_available() else None
    if identity.architectures and capability is None:
        notes.append("There is no GPU here: the kernel was not run.")
    elif identity.architectures and capability is not None:
        number = int(capability.removeprefix("sm"))
        fits = runs_on(identity, (number // 10, number % 10))
        reason = f"it has code for {', '.join(identity.architectures)}"
        checks.append(Check("GPU", capability, " ".join(identity.architectures), fits, reason))
    return checks, notes


def _loads(path: Path) -> tuple[bool, str]:
    """Loads a library in a separate process, which a broken one may crash."""
    command = [sys.executable, "-P", "-m", "evit_deploy.engines.plugin.build", str(path.resolve())]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folder or os.getcwd() for folder in sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, timeout=120)
    if done.returncode < 0:
        return False, f"the process that loaded it was ended by signal {-done.returncode}: the file is damaged"
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return False, (done.stderr.strip().splitlines() or ["it does not say why"])[-1]
    return answer["loaded"], answer["reason"] or ""


def _answers(path: Path, identity: Identity) -> tuple[list[Check], list[str]]:
    """Compares the kernel with PyTorch, if it can run here: kept rows must be equal, the sum within rounding."""
    where = "cpu" if identity.kind == "host" else "cuda"
    if where == "cuda" and not torch.cuda.is_available():
        return [], []
    kernel, checks = TokenReorgKernel(path), []
    random = np.random.default_rng(0)
    for dtype in DTYPES:
        worst, same = 0.0, True
        for batch, candidates, channels, keep in ((1, 196, 384, 138), (8, 576, 192, 404), (3, 1025, 33, 7)):
            x = torch.from_numpy(random.standard_normal((batch, candidates + 1, channels))).to(where, dtype)
            scores = torch.from_numpy(random.dirichlet(np.ones(candidates), batch)).to(where, torch.float32)
            y, idx = kernel(x, scores, keep)
            with using(None, x.device):  # turn the kernel off, so that it is not compared with itself
                wanted, wanted_idx = token_reorg(x, scores, keep, True, 1)
            same = same and torch.equal(idx, wanted_idx) and torch.equal(y[:, :-1], wanted[:, :-1])
            scale = (scores.unsqueeze(-1) * x[:, 1:].float().abs()).sum(1)  # sum of absolute values
            worst = max(worst, float(((y[:, -1].float() - wanted[:, -1].float()).abs() / scale).max()))
        limit = float(torch.finfo(dtype).eps) + 2.0**-20
        name = str(dtype).removeprefix("torch.")
        checks.append(Check(f"{name}: kept rows and indices as PyTorch's", str(same).lower(), "true", same))
        checks.append(Check(f"{name}: fused row against PyTorch's", worst, limit, worst <= limit))
    return checks, []


def _main(path: Path) -> None:
    """Program of the process that loads a library."""
    import ctypes
    import importlib.util

    identity, reason = read_identity(path), None
    registers = identity.kind == "registers" and importlib.util.find_spec(TENSORRT) is not None
    try:
        if registers:
            plugin.load_plugin(path)
        else:
            ctypes.CDLL(str(path))
    except (OSError, InputError, MissingRequirement) as error:
        reason = str(error)
    print(json.dumps({"loaded": reason is None, "reason": reason}))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
