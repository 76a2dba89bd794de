"""Files with the identity of a plugin library."""

from pathlib import Path

from evit_deploy.tokens.operators.library import ABI

LINE = b"\x7fELF evit-deploy library: kind=%s version=0.1.0 abi=%d architectures=%s tensorrt=%s;\0"


def library(
    path: Path, kind: str = "registers", *, abi: int = ABI, tensorrt: str = "11.1.0", more: bytes = b"",
    architectures: str = "80-real,120",
) -> Path:  # fmt: skip
    """A file with a library's identity string; it cannot be loaded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(LINE % (kind.encode(), abi, architectures.encode(), tensorrt.encode()) + more)
    return path
