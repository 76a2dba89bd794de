"""A real Triton server for the tests: NVIDIA's own binary, without a GPU, on loopback.

``nvidia-pytriton`` ships the server with only the Python backend and needs NumPy 1, so it is installed in a separate
virtual environment in the user's cache; the first use takes about a minute and 460 MB.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Self

import pytest

from evit_deploy.errors import EvitDeployError
from evit_deploy.triton.connection import Connection
from tests.support.environments import cached_environment, hashed
from tests.support.paths import ROOT
from tests.support.shared import made_once

LOCK = ROOT / "tests" / "environments" / "triton.lock"
READY = 60.0
SERVER = Path("pytriton") / "tritonserver"
BACKENDS = ("onnxruntime", "tensorrt", "openvino")


@cache
def site_packages() -> Path:
    """The packages of the server's environment, created if necessary; skips if that fails."""
    folder = cached_environment(
        "triton",
        "EVIT_TRITON_ENVIRONMENT",
        lambda making: (
            [sys.executable, "-m", "venv", str(making)],
            [str(making / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries", "1", *hashed(LOCK)],
        ),
    )
    found = next(iter(sorted(folder.glob("lib/python3.*/site-packages"))), None)
    if found is None or not (found / SERVER / "bin" / "tritonserver").is_file():
        pytest.skip(f"{folder} has no Triton server; delete it to have it made again")
    return found


def backends() -> Path:
    """A folder with the server's Python backend, and ours under the backend names used in configurations."""
    return made_once("triton-backends", _make_backends)


def _make_backends(folder: Path) -> None:
    server = site_packages() / SERVER
    shutil.copytree(server / "backends" / "python", folder / "python")
    version = site_packages().parent.name.removeprefix("python")
    shutil.copy(server / "python_backend_stubs" / version / "triton_python_backend_stub", folder / "python")
    for name in BACKENDS:
        (folder / name).mkdir()
        shutil.copy(Path(__file__).with_name("triton_backend.py"), folder / name / "model.py")


def environment(**more: str) -> dict[str, str]:
    """Environment variables of the server's process, with only its own packages."""
    packages = site_packages()
    programs = packages.parents[2] / "bin"
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV")}
    return kept | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(packages),
        "LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"),
        "OMP_NUM_THREADS": "1",
        **more,
    }


def binary() -> Path:
    """The server itself."""
    return site_packages() / SERVER / "bin" / "tritonserver"


def free_ports(count: int) -> list[int]:
    """Different unused ports on loopback."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


class TritonServer:
    """A server on loopback; a context manager that yields it when ready.

    Args:
        repository: Folder with the models.
        options: Additional options of the server.
        ready: Timeout in seconds until it is ready.
        ports: HTTP, gRPC and metrics; free ones by default.
        onnx: ONNX file that replaces plans; see ``triton_backend.py``.
        control: The server's model control mode.
        before: A command that starts the server.
    """

    def __init__(
        self,
        repository: Path,
        *options: str,
        ready: float = READY,
        ports: tuple[int, ...] = (),
        onnx: Path | None = None,
        control: str = "explicit",
        before: tuple[str, ...] = (),
    ) -> None:
        self.repository, self.options, self.ready, self.control = repository, options, ready, control
        self.before = before
        self.ports = ports or tuple(free_ports(3))
        self._environment = environment(**({"SERVED_ONNX": str(onnx)} if onnx else {}))
        self._folder = Path(tempfile.mkdtemp(prefix="evit-triton-"))
        self._log = self._folder / "log"
        self._region = self._folder.name  # of shared memory, which a killed server leaves behind
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def http(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def grpc(self) -> str:
        """Its other address."""
        return f"grpc://127.0.0.1:{self.ports[1]}"

    @property
    def log(self) -> str:
        """Its log since the first start."""
        return self._log.read_text(errors="replace") if self._log.is_file() else ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()  # not gracefully, which takes seconds
        shutil.rmtree(self._folder, ignore_errors=True)

    def command(self) -> list[str]:
        """The command that starts it."""
        http, grpc, metrics = map(str, self.ports)
        explicit = ["--load-model=*"] if self.control == "explicit" else []
        return [
            *self.before, str(binary()), f"--model-repository={self.repository}", f"--backend-directory={backends()}",
            "--http-address=127.0.0.1", f"--http-port={http}", "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
            "--metrics-address=127.0.0.1", f"--metrics-port={metrics}", f"--model-control-mode={self.control}",
            f"--backend-config=python,shm-region-prefix-name={self._region}",
            "--exit-timeout-secs=2", *explicit, *self.options,
        ]  # fmt: skip

    def start(self) -> None:
        """Starts it and waits until it is ready; on failure, raises with the end of its log."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), env=self._environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = time.monotonic() + self.ready
        while not self._is_ready():
            ended = self.process.poll() is not None
            if ended or time.monotonic() > end:
                what = f"ended with {self.process.returncode}" if ended else f"was not ready within {self.ready:g} s"
                self.stop()
                raise RuntimeError(f"the Triton server {what}; its last words:\n" + self.last_words())
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", self.ports[0])):
                return False
        try:
            with Connection(self.http, timeout=0.5) as connection:
                connection.wait_ready()
        except EvitDeployError:
            return False
        return True

    def last_words(self, lines: int = 25) -> str:
        """The end of its log, without its tables."""
        return "\n".join([line for line in self.log.splitlines() if line and line[0] not in "|+"][-lines:])

    def stop(self) -> None:
        """Stops it like an orchestrator: SIGTERM, then SIGKILL."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(15)
        self.kill()

    def kill(self) -> None:
        """Kills it and its child processes."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
            for left in Path("/dev/shm").glob(f"{self._region}*"):
                left.unlink(missing_ok=True)

    def memory(self) -> int:
        """Private memory of it and its child processes in bytes."""
        assert self.process is not None
        total = 0
        for status in Path("/proc").glob("[0-9]*/smaps_rollup"):
            try:
                if os.getsid(int(status.parent.name)) == self.process.pid:
                    private = [line.split()[1] for line in status.read_text().splitlines() if "Private_" in line]
                    total += 1024 * sum(map(int, private))
            except (OSError, ProcessLookupError):
                continue  # it has ended
        return total
