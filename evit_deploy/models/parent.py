"""The PyTorch model that a bundle was made from."""

from pathlib import Path

import torch

from evit_deploy.bundle import bundle as bundles
from evit_deploy.errors import CheckpointError
from evit_deploy.export.answer import normalize_
from evit_deploy.files import sha256
from evit_deploy.models.checkpoint import build_model, read_checkpoint
from evit_deploy.models.safe_weights import split_part
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
    source, part = split_part(bundle.path / parent.source)
    path = against or source
    if not path.is_file():
        return None, f"its checkpoint {path} is gone; --against says where it is"
    if sha256(path) != parent.sha256:
        return None, f"{path} is not the checkpoint it was made from"
    try:
        checkpoint = read_checkpoint(f"{path}#{part}" if part else path, parent.model)
        if checkpoint.model == manifest.model:  # a config may have lain beside it that said more than the tensors do
            own_size = {key: checkpoint.model_args[key] for key in ("img_size",) if key in checkpoint.model_args}
            checkpoint.model_args = manifest.model_args | own_size
        size = manifest.preprocess.size[0]
        model = reduce_tokens_(build_model(checkpoint, size), manifest.tokens)
        if manifest.normalized:
            normalize_(model)
    except CheckpointError as error:
        return None, str(error)
    return model, ""
