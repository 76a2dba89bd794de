"""Verifies that a Triton ensemble with image file inputs returns the same answers as its model with tensors."""

import io

import numpy as np

from evit_deploy.bundle.manifest import Manifest
from evit_deploy.data.images import preprocess_image, sample_photographs
from evit_deploy.export.card import INPUT, feeds
from evit_deploy.report.report import Check, Report
from evit_deploy.runtimes.triton import TritonRunner
from evit_deploy.triton.client import file_sender
from evit_deploy.triton.connection import Connection
from evit_deploy.triton.find import Found
from evit_deploy.verification.golden import Golden


def verify_ensemble(found: Found, manifest: Manifest, golden: Golden) -> Report:
    """Compares an ensemble's answers to two photographs with its model's answers to preprocessed tensors.

    The photographs are sent as files; evit-deploy preprocesses the tensors. The same model computes both answers, so
    only the preprocessing can differ. The limit is :meth:`Golden.limit`.

    Args:
        found: An ensemble, and its step that accepts tensors.
        manifest: Manifest of the bundle.
        golden: Its golden answers.
    """
    assert found.ensemble is not None
    photographs = sample_photographs()
    tensors = np.stack([preprocess_image(photograph, manifest.preprocess) for photograph in photographs])
    if tensors.shape[1:] != manifest.inputs[0].shape[1:]:
        note = f"The ensemble {found.ensemble} was not sent any file: the model does not take three colors."
        return Report(notes=(note,))
    with TritonRunner(found.served) as runner, Connection(found.served.url, found.served.timeout) as connection:
        expected = np.concatenate([runner.infer(feeds(tensor[None]))[manifest.answer] for tensor in tensors])
        model = connection.describe(found.ensemble)
        send, answers = file_sender(model), []
        for photograph in photographs:
            content = io.BytesIO()
            photograph.save(content, "PNG")
            answers.append(send(connection, content.getvalue()))
    with np.errstate(invalid="ignore"):
        error = float(np.nan_to_num(np.abs(np.stack(answers) - expected), nan=np.inf).max())
    if model.inputs[0].dtype == "uint8":  # DALI decodes and resizes differently than training, so nothing is checked
        moved = f"the largest difference of {manifest.answer} of photographs is {error:.2e}"
        note = f"The ensemble {found.ensemble} reads files in DALI's way: {moved}."
        return Report(notes=(note,))
    held = error <= golden.limit()
    reason = "" if held else f"its preprocessing makes another {INPUT} of a file than evit-deploy does"
    name = f"triton, ensemble {found.ensemble}: photographs as files"
    return Report(checks=(Check(name, error, golden.limit(), held, reason),))
