"""Finds a bundle's model on a running server, and checks that it matches."""

import msgspec

from evit_deploy.bundle.manifest import Manifest, TensorSpec
from evit_deploy.errors import InputError
from evit_deploy.triton.connection import Connection, ServedModel, Server
from evit_deploy.triton.failures import InterfaceClosed


class Found(msgspec.Struct, frozen=True):
    """A bundle's model on a server.

    Args:
        served: The model with the bundle's tensors.
        ensemble: Name of the ensemble around it for image files; ``None`` if the model itself was named.
    """

    served: Server
    ensemble: str | None = None


def find_model(served: Server, manifest: Manifest) -> Found:
    """Finds a bundle's model on a server.

    Args:
        served: The server. Without a model name, its only model with the bundle's tensors is used. For the name of an
            ensemble, the step with these tensors is used.
        manifest: The bundle's manifest.

    Raises:
        InputError: There is no model of that name or version, the named model has other tensors, or without a name
            none or several have the bundle's tensors.
        MissingRequirement: The server is unreachable or not ready, or the model is not ready.
    """
    with Connection(served.url, served.timeout) as connection:
        connection.wait_ready()
        if not served.model:
            return Found(msgspec.structs.replace(served, model=_only_fitting(connection, served, manifest)))
        model = connection.describe(served.model, served.version)
        if not model.steps:
            _refuse_misfit(model, served, manifest)
            return Found(served)
        # The requested version is that of the ensemble, not of its steps.
        steps = [connection.describe(name) for name in model.steps]
    fitting = next((step for step in steps if not misfits(step, manifest)), None)
    if fitting is None:
        last = steps[-1]
        raise InputError(
            f"no step of the ensemble {model.name!r} takes this bundle's tensors: {last.name}: "
            + "; ".join(misfits(last, manifest)),
            where=served.url, fix="Give the ensemble that this bundle was packaged into.",
        )  # fmt: skip
    return Found(msgspec.structs.replace(served, model=fitting.name, version=""), model.name)


def _only_fitting(connection: Connection, served: Server, manifest: Manifest) -> str:
    try:
        ready = [name for name, reason in connection.models().items() if not reason]
    except InterfaceClosed:
        raise InputError(
            "this server does not list its models", where=served.url, fix="Choose one with --model-name."
        ) from None
    fitting = [name for name in ready if not misfits(connection.describe(name), manifest)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InputError(
            "several models on this server take this bundle's tensors", where=served.url, seen=", ".join(fitting),
            fix="Choose one with --model-name.",
        )  # fmt: skip
    raise InputError(
        "no model on this server takes this bundle's tensors", where=served.url,
        seen=", ".join(ready) or "no model that is ready", wanted=_tensor(manifest.inputs[0]),
    )  # fmt: skip


def _refuse_misfit(model: ServedModel, served: Server, manifest: Manifest) -> None:
    reasons = misfits(model, manifest)
    if reasons:
        raise InputError(
            f"the model {model.name!r} is not this bundle's: {'; '.join(reasons)}", where=served.url,
            fix="Choose one with --model-name.",
        )  # fmt: skip


def misfits(model: ServedModel, manifest: Manifest) -> list[str]:
    """Returns why a served model cannot be the bundle's; empty if its tensors are the same."""
    reasons = []
    for kind, there, wanted in (
        ("input", model.inputs, manifest.inputs),
        ("output", model.outputs, manifest.outputs[:1]),
    ):
        found = {spec.name: spec for spec in there}
        for spec in wanted:
            other = found.get(spec.name)
            if other is None:
                names = ", ".join(map(_tensor, there))
                reasons.append(f"it has no {kind} {spec.name!r}, only {names}")
            elif (other.dtype, other.shape[1:]) != (spec.dtype, spec.shape[1:]) or len(other.shape) != len(spec.shape):
                reasons.append(f"its {kind} is {_tensor(other)}, the bundle's {_tensor(spec)}")
        if kind == "input" and not reasons and len(found) > len(manifest.inputs):
            reasons.append(f"it has more inputs: {', '.join(sorted(found))}")
    return reasons


def _tensor(spec: TensorSpec) -> str:
    dtype = "bytes" if spec.dtype == "object" else spec.dtype
    return f"{spec.name} {dtype} [{', '.join('?' if n is None else str(n) for n in spec.shape)}]"
