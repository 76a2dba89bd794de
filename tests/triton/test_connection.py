"""Addresses, and what is said when no Triton server answers there; no server is needed."""

import http.server
import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from evit_deploy.environment.requirements import install_line
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.registry import RUNTIMES
from evit_deploy.triton.connection import Connection, Server, split_url
from evit_deploy.triton.failures import RequestLost, ServerUnreachable
from tests.support.triton_server import free_ports

FEEDS = {"input": np.zeros((1, 3, 4, 4), np.float32)}
both = pytest.mark.parametrize("scheme", ["http", "grpc"])


@pytest.mark.parametrize(
    ("url", "scheme", "address"),
    [
        ("http://server", "http", "server:8000"),
        ("https://server:443/prefix/", "https", "server:443/prefix"),
        ("grpc://10.0.0.1", "grpc", "10.0.0.1:8001"),
        ("grpcs://[::1]:9", "grpcs", "[::1]:9"),
    ],
)
def test_addresses(url, scheme, address):
    assert split_url(url) == (scheme, address)


@pytest.mark.parametrize("url", ["", "server:8000", "ftp://server", "http://", "http://server:port", "http://s:99999"])
def test_what_is_no_address_is_refused(url):
    with pytest.raises(InputError, match=r"--url: not (the|an) address"):
        split_url(url)
    assert RUNTIMES.get("triton").accepts(Server(url, "model"))


def test_without_the_client(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    missing = RUNTIMES.get("triton").missing()
    assert str(missing) == f"tritonclient is needed (got not installed). Run: {install_line('triton')}"
    with pytest.raises(MissingRequirement, match="tritonclient is needed"):
        Connection("http://server")


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that takes connections and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


@pytest.fixture
def web_server() -> Iterator[int]:
    """Some other web server."""
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *arguments: None})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@both
def test_nobody_listens(scheme):
    (port,) = free_ports(1)
    with Connection(f"{scheme}://127.0.0.1:{port}", timeout=5) as connection:
        for ask in (connection.wait_ready, connection.models, lambda: connection.infer("model", FEEDS)):
            with pytest.raises(ServerUnreachable, match="no server takes requests there"):
                ask()


@both
def test_no_such_host(scheme):
    with (
        Connection(f"{scheme}://no-such-host.invalid:1", timeout=5) as connection,
        pytest.raises(ServerUnreachable, match="no server takes requests there"),
    ):
        connection.wait_ready()


@both
def test_a_silent_server_costs_a_request_and_not_a_question(scheme, silent):
    with Connection(f"{scheme}://127.0.0.1:{silent}", timeout=0.5) as connection:
        with pytest.raises(ServerUnreachable):
            connection.wait_ready()
        if scheme == "http":  # over gRPC no request is sent before both have greeted one another
            with pytest.raises(RequestLost, match=r"no answer within 0.5 s"):
                connection.infer("model", FEEDS)


def test_another_web_server(web_server):
    with Connection(f"http://127.0.0.1:{web_server}", timeout=1) as connection:
        with pytest.raises(ServerUnreachable, match="did not get ready within 1 s"):
            connection.wait_ready()
        with pytest.raises(ServerUnreachable, match="no Triton server"):
            connection.models()


def test_a_connection_that_breaks_with_a_request_in_it():
    def take_and_hang_up(server: socket.socket) -> None:
        with closing(server.accept()[0]) as taken:
            taken.recv(1)

    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        threading.Thread(target=take_and_hang_up, args=[server], daemon=True).start()
        with (
            Connection(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=5) as connection,
            pytest.raises(RequestLost, match="went away with this request in its hands"),
        ):
            connection.infer("model", FEEDS)


# ---- the command line


def test_the_servers_options_want_a_server(cli, tmp_path):
    for options in (["--model-name", "a"], ["--model-version", "1"], ["--shared-memory"], ["--timeout", "3"]):
        cli("verify", tmp_path, *options).refused(2, options[0], "give --url too")
    cli("profile", tmp_path, "--runtime", "triton").refused(2, "none was named", "Give --url")
    cli("verify", tmp_path, "--url", "server:8000").refused(2, "--url", "not the address", "grpc://HOST:8001")
    cli("verify", tmp_path, "--url", "http://a", "--runtime", "onnxruntime").refused(2, "--url", "--runtime triton")
    cli("verify", tmp_path, "--url", "http://a", "--timeout", "0").refused(2, "--timeout", "above 0")


def test_no_server(cli, converted):
    (port,) = free_ports(1)
    for command in ("verify", "profile"):
        result = cli(command, converted.path, "--url", f"http://127.0.0.1:{port}")
        result.refused(3, f"127.0.0.1:{port}", "no server takes requests", "grpc://HOST:8001")


def test_a_server_is_profiled_beside_a_bundle(cli, converted):
    model = converted.path / "model.onnx"
    cli("profile", model, "--url", "http://127.0.0.1:1").refused(2, "model.onnx", "Give the bundle's folder")
