"""Failures of requests to a Triton server.

There are three kinds, which callers handle differently: the server was unreachable, so nothing was computed
(:class:`ServerUnreachable`); the connection broke or timed out after the request was sent (:class:`RequestLost`); or
the server read the request and refused it (:class:`RequestRefused`). A failure of the model itself is a plain
:class:`~evit_deploy.errors.StageError`.

HTTP, gRPC, sockets and ``tritonclient`` each raise different errors for these; :func:`translated` classifies them.
"""

import re
import socket
import ssl
from typing import Any

from evit_deploy.errors import EvitDeployError, InputError, MissingRequirement, StageError

ADDRESSES = "http://HOST:8000 or grpc://HOST:8001"
_MESSAGE = 300  # maximum characters of a server's message
_NEVER_SENT = ("failed to connect", "connection refused", "errors resolving", "name resol", "dns resolution")
_STOPPING = ("is stopping", "stopped accepting", "not at ready state", "no available versions")
_REFUSALS = ("400", "404", "413", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED")
_FAILURES = ("500", "INTERNAL", "UNKNOWN")


class ServerUnreachable(MissingRequirement):
    """The server is unreachable, not ready, or stopping. Nothing was computed."""


class RequestLost(StageError):  # noqa: N818 -- named after the outcome
    """The connection broke or timed out after the request was sent; it may have been computed."""


class RequestRefused(InputError):  # noqa: N818 -- likewise
    """The server read the request and refused it."""


class InterfaceClosed(RequestRefused):
    """The interface is open only to clients with the server's key."""


def translated(error: Exception, url: str, timeout: float, *, sent: bool) -> EvitDeployError:
    """Translates an error of ``tritonclient``, or of a library that it uses, to one of evit-deploy.

    Args:
        error: The error.
        url: Address of the server.
        timeout: The timeout in seconds.
        sent: Whether the call sent a request to be computed, rather than a query about the server.
    """
    if isinstance(error, EvitDeployError):
        return error
    if isinstance(error, TimeoutError):
        return _silent(url, timeout, sent)
    if isinstance(error, ConnectionRefusedError | socket.gaierror | ssl.SSLError):
        return _unreachable(str(error), url)
    if isinstance(error, OSError) or "ConnectionClosed" in type(error).__name__:
        return _broken(str(error), url, sent)
    if not hasattr(error, "status"):  # not from tritonclient: the response could not be parsed
        return stranger(f"{type(error).__name__}: {error}", url)
    return _answered(error, url, timeout, sent)


def _answered(error: Any, url: str, timeout: float, sent: bool) -> EvitDeployError:
    """Translates an error of ``tritonclient`` by its HTTP or gRPC status and its message."""
    status, said = str(error.status() or "").removeprefix("StatusCode."), _short(error.message())
    lower = said.lower()
    if "is restricted, expecting header" in lower:
        return InterfaceClosed(
            "the server keeps this interface closed", where=url, seen=said,
            fix="What was packaged with --shared-memory takes shared memory; nothing else is opened by an option.",
        )  # fmt: skip
    if status == "503" or any(words in lower for words in _STOPPING):
        return ServerUnreachable(
            f"the server does not take it now: {said.rstrip('.')}", where=url,
            fix="Wait until the model is loaded; the server's log says what becomes of it.",
        )  # fmt: skip
    if status == "UNAVAILABLE":
        never = any(words in lower for words in _NEVER_SENT)
        return _unreachable(said, url) if never else _broken(said, url, sent)
    if status in ("DEADLINE_EXCEEDED", "499"):
        return _silent(url, timeout, sent)
    if "decoding the response" in lower or "empty response" in lower:
        return stranger(said, url)
    if status in _REFUSALS:
        return RequestRefused(f"the server refuses it: {said}", where=url)
    if status in _FAILURES or not status:
        return StageError(f"the server failed: {said}", where=url)
    return stranger(f"{status} {said}", url)


def _unreachable(reason: str, url: str) -> ServerUnreachable:
    return ServerUnreachable(
        f"no server takes requests there: {_short(reason).rstrip('.')}", where=url,
        fix=f"Start it, or give its address: {ADDRESSES}.",
    )  # fmt: skip


def _broken(reason: str, url: str, sent: bool) -> EvitDeployError:
    if not sent:
        return _unreachable(reason, url)
    return RequestLost(
        f"the server went away with this request in its hands: {_short(reason).rstrip('.')}", where=url,
        fix="Send it again once the server is back; it may or may not have been computed.",
    )  # fmt: skip


def _silent(url: str, timeout: float, sent: bool) -> EvitDeployError:
    kind = RequestLost if sent else ServerUnreachable
    return kind(f"no answer within {timeout:g} s", where=url, fix="Give it more time: --timeout.")


def stranger(said: object, url: str) -> ServerUnreachable:
    """Returns the error for a response that is not from a Triton server, or not in this protocol."""
    return ServerUnreachable(
        "what answers there is no Triton server, or speaks the other protocol", where=url, seen=_short(str(said)),
        wanted=ADDRESSES,
    )  # fmt: skip


def _short(said: str | None) -> str:
    """Shortens a server's message to one line, without the request's number and the advice to administrators."""
    text = re.sub(r"^\[request id: [^\]]*\] ", "", " ".join(str(said or "").split())).split(" NOTE: ")[0]
    return text if len(text) <= _MESSAGE else text[: _MESSAGE - 1] + "…"
