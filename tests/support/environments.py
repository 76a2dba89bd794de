"""Virtual environments in the user's cache for packages that conflict with ours, created on first use."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

TIME_LIMIT = 240


def cached_environment(name: str, variable: str, commands: Callable[[Path], Sequence[Sequence[str]]]) -> Path:
    """The folder of an environment, created if necessary; skips with the reason if that fails.

    Args:
        name: Name of the folder, without the Python version.
        variable: Environment variable that overrides the folder.
        commands: Commands that create it in a folder.
    """
    chosen, home = os.environ.get(variable), os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    folder = Path(chosen) if chosen else base / "evit-deploy" / f"{name}-python{version}"
    if not folder.is_dir():
        _make(folder, commands)
    return folder


def hashed(lock: Path) -> tuple[str, ...]:
    """pip's arguments for exactly the files that a lock file lists, by their SHA-256."""
    return "--require-hashes", "-r", str(lock)


def _make(folder: Path, commands: Callable[[Path], Sequence[Sequence[str]]]) -> None:
    """Creates it in a temporary folder and moves it into place, because test runs may be concurrent or interrupted."""
    making = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        making.parent.mkdir(parents=True, exist_ok=True)
        for command in commands(making):
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
            if done.returncode:
                lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
                pytest.skip(f"no environment {folder.name}: " + " ".join(lines[-2:]))
        with suppress(OSError):  # another process was faster
            making.rename(folder)
    except (OSError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"no environment {folder.name}: {error}")
    finally:
        shutil.rmtree(making, ignore_errors=True)
