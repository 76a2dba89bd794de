"""Files that look like plugin libraries to whoever reads their identity."""

from pathlib import Path

LINE = b"\x7fELF evit-deploy library: kind=%s version=0.1.0 abi=%d architectures=80-real,120 tensorrt=%s;\0"


def library(path: Path, kind: str = "registers", abi: int = 1, tensorrt: str = "11.1.0", more: bytes = b"") -> Path:
    """A file that says of itself what a library says; it cannot be loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(LINE % (kind.encode(), abi, tensorrt.encode()) + more)
    return path
