"""Checkpoint files for tests."""

from pathlib import Path
from typing import Any

import pytest
import torch

from evit_deploy.errors import CheckpointError
from evit_deploy.models.checkpoint import read_checkpoint


def saved(folder: Path, content: Any, name: str = "weights.pth") -> Path:
    torch.save(content, folder / name)
    return folder / name


def refusal(path: Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **arguments)
    assert path.name in str(caught.value)
    return str(caught.value)
