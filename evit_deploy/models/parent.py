"""The PyTorch model that a bundle was made from."""

from pathlib import Path

import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.errors import CheckpointError
from evit_deploy.models import hub
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.models.sources import find_source
from evit_deploy.tokens.reduce import reduce_tokens_


def parent_model(bundle: bundles.Bundle, against: Path | None = None) -> tuple[torch.nn.Module | None, str]:
    """The reduced PyTorch model that a bundle was made from, if its checkpoint is still there.

    Args:
        bundle: The bundle.
        against: Where the checkpoint is now.

    Returns:
        The model and an empty text; or ``None`` and why not.
    """
    manifest, parent = bundle.manifest, bundle.manifest.parents[0]
    if against is None and parent.sha256 is None:
        return None, f"it was made from {parent.source!r}, which would have to be fetched"
    repository = hub.repository_of(parent.source) if parent.source.startswith(hub.PREFIX) else None
    path = against or (hub.cached(repository) if repository is not None else bundle.path / parent.source)
    if path is None or not path.exists():
        gone = parent.source if repository is not None else path
        return None, f"its checkpoint {gone} is gone; --against says where it is"
    try:
        source = find_source(path)
        assert source is not None  # the path exists
        if source.digest != parent.sha256:
            return None, f"{path} is not the checkpoint it was made from"
        checkpoint = read_checkpoint(path, parent.model)
        size = manifest.preprocess.size[0]
        model = reduce_tokens_(build_model(checkpoint, size), manifest.tokens)
    except CheckpointError as error:
        return None, str(error)
    return model, ""
