"""The PyTorch model that a bundle was made from."""

from pathlib import Path

import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.errors import CheckpointError
from evit_deploy.export.answer import normalize_
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.models.files import hub
from evit_deploy.models.files.safe_weights import split_part
from evit_deploy.models.files.sources import find_source
from evit_deploy.tokens.reduce import reduce_tokens_


def parent_model(bundle: bundles.Bundle, against: Path | None = None) -> tuple[torch.nn.Module | None, str]:
    """Rebuilds the reduced PyTorch model that a bundle was made from, if its checkpoint still exists.

    Args:
        bundle: The bundle.
        against: Current path of the checkpoint.

    Returns:
        The model and an empty text; or ``None`` and the reason.
    """
    manifest, parent = bundle.manifest, bundle.manifest.parents[0]
    if against is None and parent.sha256 is None:
        return None, f"it was made from {parent.source!r}, which would have to be fetched"
    path, part = _place(bundle, against)
    if path is None or not path.exists():
        gone = path or parent.source
        return None, f"its checkpoint {gone} is gone; --against says where it is"
    try:
        source = find_source(path)
        assert source is not None  # the path exists
        if source.digest != parent.sha256:
            return None, f"{path} is not the checkpoint it was made from"
        checkpoint = read_checkpoint(f"{path}#{part}" if part else path, parent.model)
        if checkpoint.model == manifest.model:  # a config next to it may have said more than the tensors do
            own_size = {key: checkpoint.model_args[key] for key in ("img_size",) if key in checkpoint.model_args}
            checkpoint.model_args = manifest.model_args | own_size
        size = manifest.preprocess.size[0]
        model = reduce_tokens_(build_model(checkpoint, size), manifest.tokens)
        if manifest.normalized:
            normalize_(model)
    except CheckpointError as error:
        return None, str(error)
    return model, ""


def _place(bundle: bundles.Bundle, against: Path | None) -> tuple[Path | None, str]:
    """Current path of a bundle's checkpoint, and the selected part of it; hub checkpoints are in the cache."""
    source = bundle.manifest.parents[0].source
    if source.startswith(hub.PREFIX):
        name, _, part = source.partition("#")
        repository = hub.repository_of(name)
        return against or (hub.cached(repository) if repository is not None else None), part
    path, part = split_part(bundle.path / source)
    return against or path, part
