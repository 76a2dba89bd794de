"""What can become of a request to a Triton server besides an answer.

Three things, and they ask for different deeds: the server was not there, so that nothing was computed
(:class:`ServerUnreachable`); it went away, or stayed silent, with the request in its hands (:class:`RequestLost`); or
it read the request and declined (:class:`RequestRefused`). That a model failed is a plain
:class:`~evit_deploy.errors.StageError`.

HTTP, gRPC, sockets and ``tritonclient`` each say these in their own words; here they are told apart.
"""

import re
import socket
import ssl
from typing import Any

from evit_deploy.errors import EvitDeployError, InputError, MissingRequirement, StageError

ADDRESSES = "http://HOST:8000 or grpc://HOST:8001"
_MESSAGE = 300  # characters of what the server says
_NEVER_SENT = ("failed to connect", "connection refused", "errors resolving", "name resol", "dns resolution")
_STOPPING = ("is stopping", "stopped accepting", "not at ready state", "no available versions")
_REFUSALS = ("400", "404", "413", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "RESOURCE_EXHAUSTED")
_FAILURES = ("500", "INTERNAL", "UNKNOWN")


class ServerUnreachable(MissingRequirement):
    """No server took the request: it is not there, not ready, or stopping. Nothing was computed."""


class RequestLost(StageError):  # noqa: N818 -- says what became of it, as its neighbors do
    """The request was in the server's hands when the connection broke or the time was up."""


class RequestRefused(InputError):  # noqa: N818 -- likewise
    """The server read the request and declined it."""


class InterfaceClosed(RequestRefused):
    """The server keeps this interface to those who have its key."""


def translated(error: Exception, url: str, timeout: float, *, sent: bool) -> EvitDeployError:
    """An error of ``tritonclient``, or of what lies below it, as one of ours.

    Args:
        error: The error.
        url: Address of the server.
        timeout: Seconds that were waited at most.
        sent: Whether the request was one to be computed, rather than a question about the server.
    """
    if isinstance(error, EvitDeployError):
        return error
    if isinstance(error, TimeoutError):
        return _silent(url, timeout, sent)
    if isinstance(error, ConnectionRefusedError | socket.gaierror | ssl.SSLError):
        return _unreachable(str(error), url)
    if isinstance(error, OSError) or "ConnectionClosed" in type(error).__name__:
        return _broken(str(error), url, sent)
    if not hasattr(error, "status"):  # not tritonclient's: what was answered could not even be read
        return stranger(f"{type(error).__name__}: {error}", url)
    return _answered(error, url, timeout, sent)


def _answered(error: Any, url: str, timeout: float, sent: bool) -> EvitDeployError:
    """``tritonclient``'s own error: a status of HTTP or gRPC, and words."""
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
        fix="Send it again once the server is back; whether it was computed nobody knows.",
    )  # fmt: skip


def _silent(url: str, timeout: float, sent: bool) -> EvitDeployError:
    kind = RequestLost if sent else ServerUnreachable
    return kind(f"no answer within {timeout:g} s", where=url, fix="Give it more time: --timeout.")


def stranger(said: object, url: str) -> ServerUnreachable:
    """The error for something that answers, and not as a Triton server does."""
    return ServerUnreachable(
        "what answers there is no Triton server, or speaks the other protocol", where=url, seen=_short(str(said)),
        wanted=ADDRESSES,
    )  # fmt: skip


def _short(said: str | None) -> str:
    """The server's words on one line, without the number of the request and without its advice to administrators."""
    text = re.sub(r"^\[request id: [^\]]*\] ", "", " ".join(str(said or "").split())).split(" NOTE: ")[0]
    return text if len(text) <= _MESSAGE else text[: _MESSAGE - 1] + "…"
