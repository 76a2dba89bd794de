"""A connection to a running Triton Inference Server, over HTTP or gRPC.

Errors are those of :mod:`evit_deploy.triton.failures`. ``tritonclient`` is imported only when a connection is opened,
so this module can be imported without it.
"""

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec
import numpy as np

from evit_deploy.bundle.manifest import TensorSpec
from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import EvitDeployError, InputError, MissingRequirement, did_you_mean
from evit_deploy.triton.failures import (
    InterfaceClosed,
    RequestRefused,
    ServerUnreachable,
    stranger,
    translated,
)

PORTS = {"http": 8000, "https": 8000, "grpc": 8001, "grpcs": 8001}
TIMEOUT = 60.0
POLL = 0.1

IN_FLIGHT = 16


class ServedModel(msgspec.Struct, frozen=True):
    """A server's description of one of its models.

    Args:
        name: Name on the server.
        versions: Served versions, as the server writes them.
        inputs: Inputs; dtype ``object`` for bytes. The batch is the first dimension unless ``max_batch`` is 0.
        outputs: Outputs.
        max_batch: Largest batch; 0 for a model without batching.
        preferred: Batch sizes that the server tries to form.
        steps: Names of the models in an ensemble.
    """

    name: str
    versions: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch: int
    preferred: tuple[int, ...] = ()
    steps: tuple[str, ...] = ()


class Server(msgspec.Struct, frozen=True):
    """A model on a running server, the artifact of :class:`TritonRunner`.

    Args:
        url: ``http://HOST:PORT`` or ``grpc://HOST:PORT``.
        model: Name of the model; :func:`evit_deploy.triton.find.find_model` can find it.
        version: Its version; empty for the server's choice.
        shared_memory: Whether to pass tensors through system shared memory, for a server on this machine. If that is
            not possible it is an error; there is no fallback.
        timeout: Seconds to wait for the server to be ready, and for each answer.
    """

    url: str
    model: str = ""
    version: str = ""
    shared_memory: bool = False
    timeout: float = TIMEOUT


def client_missing() -> MissingRequirement | None:
    """Returns the error to raise if ``tritonclient`` is not installed, else ``None``."""
    if importlib.util.find_spec("tritonclient") is None:
        return MissingRequirement("tritonclient is needed", seen="not installed", fix=f"Run: {install_line('triton')}")
    return None


def split_url(url: str) -> tuple[str, str]:
    """Splits ``grpc://host`` into ``("grpc", "host:8001")``.

    Raises:
        InputError: Not the address of a Triton server.
    """
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError as error:  # such as a port that is not a number
        raise InputError(f"not an address ({error})", where="--url", seen=repr(url)) from None
    if parts.scheme not in PORTS or not host:
        raise InputError(
            "not the address of a Triton server", where="--url", seen=repr(url),
            wanted="http://HOST:8000 or grpc://HOST:8001",
        )  # fmt: skip
    host = f"[{host}]" if ":" in host else host
    base = parts.path.rstrip("/") if parts.scheme.startswith("http") else ""
    return parts.scheme, f"{host}:{port or PORTS[parts.scheme]}{base}"


class Connection:
    """An open connection; use it as a context manager.

    An HTTP connection can be used only in the thread that opened it; a gRPC connection can be shared.

    Args:
        url: ``http://HOST:PORT``, ``https://``, ``grpc://`` or ``grpcs://``.
        timeout: Seconds to wait for any answer.
        in_flight: Maximum number of concurrent requests of :meth:`start`.

    Raises:
        InputError: Not the address of a Triton server.
        MissingRequirement: ``tritonclient`` is not installed.
    """

    def __init__(self, url: str, timeout: float = TIMEOUT, in_flight: int = 1) -> None:
        self.url, self.timeout = url, timeout
        scheme, address = split_url(url)
        missing = client_missing()
        if missing is not None:
            raise missing
        self._http, self._encrypted = scheme.startswith("http"), scheme in ("https", "grpcs")
        if self._http:
            import tritonclient.http as module

            self._client: Any = module.InferenceServerClient(
                address, ssl=self._encrypted, concurrency=in_flight, connection_timeout=timeout, network_timeout=timeout
            )
        else:
            import tritonclient.grpc as module

            self._client = module.InferenceServerClient(address, ssl=self._encrypted)
        self._module: Any = module

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(Exception):  # the server may have closed the connection already
            self._client.close()

    # ---- server and models

    def wait_ready(self) -> None:
        """Waits until the server is ready, at most ``timeout`` seconds.

        Raises:
            ServerUnreachable: No server listens there, or it does not become ready.
        """
        end = time.monotonic() + self.timeout
        while not self._ask(self._client.is_server_ready):
            if time.monotonic() > end:
                raise ServerUnreachable(
                    f"the server did not get ready within {self.timeout:g} s", where=self.url,
                    fix="Its log says which model does not load; /v2/repository/index lists them.",
                )  # fmt: skip
            time.sleep(POLL)

    def models(self) -> dict[str, str]:
        """Returns the models in the server's repository: name -> why it is not ready, empty if it is.

        Raises:
            InterfaceClosed: The server does not list its models; packaged servers do not.
        """
        index = self._json(self._client.get_model_repository_index)
        rows = index if isinstance(index, list) else index.get("models", [])
        states: dict[str, str] = {}
        for row in rows:
            ready = row.get("state") == "READY"
            reason = "" if ready else f"{row.get('state', 'not loaded')} {row.get('reason', '')}".strip()
            states[row["name"]] = "" if ready or states.get(row["name"]) == "" else reason
        return states

    def describe(self, name: str, version: str = "") -> ServedModel:
        """Returns the server's description of a model.

        Args:
            name: Name of the model.
            version: Its version; empty for the server's choice.

        Raises:
            InputError: The server has no such model or version; the message has the nearest name.
            MissingRequirement: The model is not loaded.
        """
        try:
            metadata = self._json(self._client.get_model_metadata, name, version)
            config = self._json(self._client.get_model_config, name, version)
        except (RequestRefused, ServerUnreachable) as error:
            self._explain(name)
            if not version:
                raise
            served = self._json(self._client.get_model_metadata, name).get("versions", [])
            raise InputError(
                f"the server does not serve this version of {name!r}", where=self.url, seen=version,
                wanted=" or ".join(served), fix="Its version_policy says which are loaded.",
            ) from error  # fmt: skip
        config = config.get("config", config)
        return ServedModel(
            name,
            tuple(metadata.get("versions", ())),
            tuple(_spec(tensor) for tensor in metadata["inputs"]),
            tuple(_spec(tensor) for tensor in metadata["outputs"]),
            int(config.get("max_batch_size", 0)),
            tuple(int(size) for size in config.get("dynamic_batching", {}).get("preferred_batch_size", ())),
            tuple(step["model_name"] for step in config.get("ensemble_scheduling", {}).get("step", ())),
        )

    def _explain(self, name: str) -> None:
        """Raises a more precise error for a model that cannot be described, if the server lists its models."""
        try:
            states = self.models()
        except InterfaceClosed:
            return
        if name not in states:
            raise InputError(
                "the server has no such model", where=self.url, seen=repr(name),
                wanted="one of " + ", ".join(sorted(states)) if states else "a repository with models",
                fix=did_you_mean(name, states),
            ) from None  # fmt: skip
        if states[name]:
            raise MissingRequirement(
                f"the model {name!r} is not ready", where=self.url, seen=states[name], fix="The server's log says why."
            ) from None

    def statistics(self, name: str) -> dict[str, Any]:
        """Returns the server's statistics of a model since it was loaded; every number is an ``int``."""
        found = self._json(self._client.get_inference_statistics, name)
        return _whole(found["model_stats"][0])

    # ---- requests

    def infer(
        self, name: str, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] = (), version: str = ""
    ) -> dict[str, np.ndarray]:
        """Sends one request and waits for its answer.

        Args:
            name: The model.
            feeds: One array for each input, including the batch dimension; bytes as arrays of dtype ``object``.
            outputs: Names of the outputs to return; all if empty.
            version: The model's version; empty for the server's choice.

        Returns:
            One array for each output, owned by the caller.

        Raises:
            ServerUnreachable: The request could not be sent.
            RequestLost: The request was sent, but there was no answer.
            RequestRefused: The server refused the request.
            StageError: The model failed.
        """
        return _arrays(self.request(name, self.inputs_of(feeds), [self.output(output) for output in outputs], version))

    def request(self, name: str, inputs: list[Any], outputs: Sequence[Any] = (), version: str = "") -> Any:
        """:meth:`infer` with ``tritonclient``'s inputs, outputs and result, which may be in shared memory."""
        limit = {} if self._http else {"client_timeout": self.timeout}
        return self._ask(self._client.infer, name, inputs, version, list(outputs) or None, sent=True, **limit)

    def start(
        self, name: str, feeds: Mapping[str, np.ndarray], outputs: Sequence[str] = (), version: str = ""
    ) -> Callable[[], dict[str, np.ndarray]]:
        """Sends one request without waiting.

        Args:
            name: See :meth:`infer`.
            feeds: See :meth:`infer`; do not change the arrays before the answer has arrived.
            outputs: See :meth:`infer`.
            version: See :meth:`infer`.

        Returns:
            A function that waits for the answer and returns it, or raises like :meth:`infer`.
        """
        inputs, wanted = self.inputs_of(feeds), [self.output(output) for output in outputs] or None
        if self._http:
            pending = self._ask(self._client.async_infer, name, inputs, version, wanted, sent=True)
            wait = pending.get_result
        else:
            future: Future[Any] = Future()

            def done(result: Any, error: Any) -> None:
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(result)

            limit = {"client_timeout": self.timeout}
            self._ask(self._client.async_infer, name, inputs, done, version, wanted, sent=True, **limit)
            wait = future.result

        return lambda: _arrays(self._ask(wait, sent=True))

    def inputs_of(self, feeds: Mapping[str, np.ndarray]) -> list[Any]:
        """Converts arrays to ``tritonclient``'s inputs."""
        inputs = []
        for name, array in feeds.items():
            tensor = self.input(name, array.shape, array.dtype)
            tensor.set_data_from_numpy(np.ascontiguousarray(array))
            inputs.append(tensor)
        return inputs

    def input(self, name: str, shape: Sequence[int], dtype: Any) -> Any:
        """Returns a ``tritonclient`` input without data."""
        from tritonclient.utils import np_to_triton_dtype

        return self._module.InferInput(name, list(shape), np_to_triton_dtype(np.dtype(dtype)))

    def output(self, name: str) -> Any:
        """Returns a ``tritonclient`` request for an output."""
        return self._module.InferRequestedOutput(name)

    def share(self, region: str, key: str, size: int) -> None:
        """Registers a region of system shared memory with the server.

        Args:
            region: Its name in requests.
            key: Its name in the system.
            size: Size in bytes.
        """
        self._ask(self._client.register_system_shared_memory, region, key, size)

    def unshare(self, region: str) -> None:
        """Unregisters a region; ignores errors, since a server that has stopped needs no unregistering."""
        with suppress(EvitDeployError):
            self._ask(self._client.unregister_system_shared_memory, region)

    # ---- failures

    def _json(self, function: Callable[..., Any], *arguments: str) -> Any:
        found = self._ask(function, *arguments, **({} if self._http else {"as_json": True}))
        if not isinstance(found, dict | list):
            raise stranger(found, self.url)
        return found

    def _ask(self, function: Callable[..., Any], *arguments: Any, sent: bool = False, **options: Any) -> Any:
        """Calls the client and translates errors; ``sent`` is whether the call sends a request to be computed."""
        if not self._http and not sent:
            options.setdefault("client_timeout", self.timeout)
        try:
            return function(*arguments, **options)
        except Exception as error:  # sockets, gevent, geventhttpclient, gRPC and rapidjson each raise their own
            raise translated(error, self.url, self.timeout, sent=sent) from None


def _spec(tensor: Mapping[str, Any]) -> TensorSpec:
    from tritonclient.utils import triton_to_np_dtype

    dtype = triton_to_np_dtype(tensor["datatype"])
    name = "object" if dtype is np.object_ else np.dtype(dtype).name if dtype else tensor["datatype"].lower()
    return TensorSpec(tensor["name"], name, tuple(None if int(n) < 0 else int(n) for n in tensor["shape"]))


def _arrays(result: Any) -> dict[str, np.ndarray]:
    response = result.get_response()
    outputs = response["outputs"] if isinstance(response, dict) else response.outputs
    names = [output["name"] if isinstance(output, dict) else output.name for output in outputs]
    return {name: np.array(result.as_numpy(name)) for name in names}  # copies: tritonclient's arrays are read-only


def _whole(value: Any) -> Any:
    """Converts numbers in JSON to ``int``: JSON created from protobufs has 64-bit integers as text."""
    if isinstance(value, dict):
        return {key: _whole(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_whole(entry) for entry in value]
    return int(value) if isinstance(value, str) and value.isdecimal() else value
