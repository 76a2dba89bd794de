"""Malicious requests to a Triton server, one function per kind; each returns how the server reacted.

``200`` would mean that an invalid request was accepted. Connections are dropped abruptly, bodies never end, and
announced sizes are wrong. Every kind ends by itself within a few seconds.
"""

import contextlib
import gzip
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grpc
import msgspec
import numpy as np

from tests.support.triton_models import bomb, encoded, photographs

PATIENCE = 20.0
"""Timeout for the server in seconds."""
CHUNKED, INFLATED = 16 << 20, 64 << 20
"""Size in bytes of an endless body, and of a decompressed one."""
THREADS = 8


class Target(msgspec.Struct, frozen=True):
    """The attacked server.

    Args:
        http: Port on this machine.
        grpc: Port on this machine.
        ensemble: Model that takes image files.
        model: Model that takes tensors.
        shape: Of one input, ``[3, H, W]``.
    """

    http: int
    grpc: int
    ensemble: str
    model: str
    shape: tuple[int, ...]

    @property
    def infer(self) -> str:
        """Path of the inference endpoint."""
        return f"/v2/models/{self.model}/infer"


Kind = Callable[[Target, random.Random], str]


# ---- raw HTTP


def _open(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)


def _drop(one: socket.socket) -> None:
    """Resets a connection."""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()


def _ended(one: socket.socket) -> str:
    """The status code, or how the connection ended."""
    try:
        line = one.recv(4096).split(b"\r\n")[0].split()
    except TimeoutError:
        return "silent"
    except OSError:
        return "reset"
    return line[1].decode() if len(line) > 1 and line[1].isdigit() else "closed" if not line else "no HTTP"


def _send(target: Target, *parts: bytes) -> str:
    """Sends the parts to the HTTP port, even if earlier ones failed."""
    with contextlib.closing(_open(target.http)) as one:
        with contextlib.suppress(OSError):
            for part in parts:
                one.sendall(part)
        return _ended(one)


def _post(target: Target, path: str, body: bytes, *headers: str) -> str:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return _send(target, "\r\n".join(lines).encode(), body)


def huge_header(target: Target, chance: random.Random) -> str:
    return _send(target, f"POST {target.infer} HTTP/1.1\r\nX: ".encode(), b"a" * (2 << 20), b"\r\n\r\n")


def many_headers(target: Target, chance: random.Random) -> str:
    lines = b"".join(b"X-%d: %d\r\n" % (number, number) for number in range(20_000))
    return _send(target, f"POST {target.infer} HTTP/1.1\r\n".encode(), lines, b"Content-Length: 1\r\n\r\nx")


def long_path(target: Target, chance: random.Random) -> str:
    return _send(target, b"GET /v2/models/" + b"a" * (1 << 20) + b" HTTP/1.1\r\n\r\n")


def odd_path(target: Target, chance: random.Random) -> str:
    path = chance.choice(["/../../etc/passwd", "/v2/models/%00/infer", "/v2/models/..%2f..%2f/infer", "//", "/v2/\x01"])
    return _post(target, path, b"{}")


def junk(target: Target, chance: random.Random) -> str:
    return _send(target, chance.randbytes(chance.randrange(1, 4000)), b"\r\n\r\n")


def wrong_json(target: Target, chance: random.Random) -> str:
    good = {"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, *target.shape], "data": [0]}]}
    bodies = [
        b"", b"{", b"null", b"[]", b'"a"', b"\xff\xfe\x00", chance.randbytes(500),
        b'{"inputs": 5}', b'{"inputs": [{}]}',
        b'{"inputs": [{"name": {}, "shape": "x", "datatype": 7, "data": null}]}', b"[" * 200, b'{"a":' * 200,
        json.dumps(good).encode()[: chance.randrange(1, 80)], json.dumps(good).replace("[0]", "[1e999]").encode(),
        b'{"id": "' + b"\xf0" * 1000 + b'"}',
    ]  # fmt: skip
    return _post(target, target.infer, chance.choice(bodies))


def wrong_sizes(target: Target, chance: random.Random) -> str:
    """JSON with inconsistent shapes, types and sizes."""
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, *target.shape], "data": [0.0] * 12}
    tensor |= chance.choice([
        {}, {"shape": [-1, *target.shape]}, {"shape": [2**62, 4]}, {"shape": [2**63, 1]}, {"shape": []},
        {"shape": [0] * 90}, {"shape": [1e300]}, {"datatype": "FP64"}, {"datatype": "BYTES"}, {"datatype": "X" * 5000},
        {"name": "x" * 5000}, {"data": [["a"], {}]},
        {"parameters": {"binary_data_size": 2**63 - 1}}, {"parameters": {"binary_data_size": -1}},
        {"parameters": {"shared_memory_region": "x", "shared_memory_byte_size": 2**63 - 1}},
    ])  # fmt: skip
    return _post(target, target.infer, json.dumps({"inputs": [tensor]}).encode())


def wrong_binary(target: Target, chance: random.Random) -> str:
    """A binary tensor with wrong announced sizes."""
    size = 4 * int(np.prod(target.shape))
    announced = chance.choice([size - 1, size + 1, 0, 4 * size, 2**31])
    tensor = {"name": "input", "datatype": "FP32", "shape": [1, *target.shape]}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": announced}}]}).encode()
    length = chance.choice([len(head), len(head), len(head) + size + 9, -1, 2**63, "x"])
    return _post(target, target.infer, head + bytes(size), f"Inference-Header-Content-Length: {length}")


def endless_body(target: Target, chance: random.Random) -> str:
    """Endless chunks, then a reset."""
    one = _open(target.http)
    chunk = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
    with contextlib.suppress(OSError):
        one.sendall(f"POST {target.infer} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        for _ in range(CHUNKED >> 16):
            one.sendall(chunk)
    _drop(one)
    return "given up"


def slow_sender(target: Target, chance: random.Random) -> str:
    """A long announced body, sent byte by byte, then a reset."""
    one = _open(target.http)
    with contextlib.suppress(OSError):
        one.sendall(f"POST {target.infer} HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n".encode())
        for _ in range(10):
            one.sendall(b"{")
            time.sleep(0.1)
    _drop(one)
    return "given up"


def many_connections(target: Target, chance: random.Random) -> str:
    """A hundred connections to both ports that stay open without a complete request."""
    opened = []
    with contextlib.suppress(OSError):
        for number in range(100):
            opened.append(_open((target.http, target.grpc)[number % 2]))
            opened[-1].sendall(b"POST /v2/mo")
    time.sleep(0.5)
    for one in opened:
        _drop(one)
    return "given up"


def inflating_body(target: Target, chance: random.Random) -> str:
    return _post(target, target.infer, _inflating(), "Content-Encoding: gzip")


_INFLATING: list[bytes] = []


def _inflating() -> bytes:
    if not _INFLATING:
        _INFLATING.append(gzip.compress(bytes(INFLATED)))
    return _INFLATING[0]


def closed_interface(target: Target, chance: random.Random) -> str:
    path = chance.choice([
        f"/v2/repository/models/{target.model}/unload", "/v2/repository/index", "/v2/systemsharedmemory/unregister",
        "/v2/systemsharedmemory/region/x/register", "/v2/trace/setting", "/v2/logging",
    ])  # fmt: skip
    return _post(target, path, b"{}")


# ---- images


def bad_image(target: Target, chance: random.Random) -> str:
    """Files that are not images, are truncated or damaged, or decode to a very large image."""
    kind = chance.choice(["JPEG", "PNG"])
    good = encoded(photographs(2)[chance.randrange(2)], kind)
    content = chance.choice([
        b"", good[: chance.randrange(1, len(good) // 2)], good[:2] + chance.randbytes(3000),
        b"GIF89a" + bytes(99), _bomb(),
    ])  # fmt: skip
    length = struct.pack("<I", len(content)) + content
    tensor = {"name": "IMAGE", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": len(length)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    path = f"/v2/models/{target.ensemble}/infer"
    return _post(target, path, head + length, f"Inference-Header-Content-Length: {len(head)}")


_BOMBS: list[bytes] = []


def _bomb() -> bytes:
    if not _BOMBS:
        _BOMBS.append(bomb())
    return _BOMBS[0]


# ---- gRPC


def grpc_junk(target: Target, chance: random.Random) -> str:
    """Bytes that are not HTTP/2, or become invalid after its preface."""
    frame = struct.pack(">I", chance.randrange(1 << 24))[1:] + bytes([chance.randrange(256) for _ in range(6)])
    begins = [b"", b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)]
    one = _open(target.grpc)
    with contextlib.suppress(OSError):
        one.sendall(chance.choice(begins) + frame + chance.randbytes(chance.randrange(3000)))
        time.sleep(0.05)
    _drop(one)
    return "given up"


def grpc_message(target: Target, chance: random.Random) -> str:
    """Calls with invalid messages, and calls of unknown methods."""
    from tritonclient.grpc import service_pb2

    request = service_pb2.ModelInferRequest(model_name=target.model)
    tensor = request.inputs.add(name="input", datatype="FP32", shape=[1, *target.shape])
    request.raw_input_contents.append(bytes(4 * int(np.prod(target.shape)) - chance.randrange(1, 9)))
    short = request.SerializeToString()
    tensor.shape[0] = chance.choice([-1, 0, 2**62])
    bodies = [short, request.SerializeToString(), short[: len(short) // 2], chance.randbytes(2000), b"", b"\x00" * 100]
    method = chance.choice(["ModelInfer", "ModelInfer", "ModelInfer", "RepositoryModelUnload", "NoSuchCall"])
    with grpc.insecure_channel(f"127.0.0.1:{target.grpc}") as channel:
        call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
        try:
            call(chance.choice(bodies), timeout=PATIENCE)
        except grpc.RpcError as error:
            return error.code().name  # type: ignore[attr-defined]  # an RpcError of a call has it
    return "200"


#: All except :func:`inflating_body`, whose memory Triton before 26.05 leaks (server#8764).
KINDS: tuple[Kind, ...] = (
    huge_header, many_headers, long_path, odd_path, junk, wrong_json, wrong_sizes, wrong_binary, endless_body,
    slow_sender, many_connections, closed_interface, bad_image, grpc_junk, grpc_message,
)  # fmt: skip


def attack(target: Target, count: int, seed: int = 0, kinds: Sequence[Kind] = KINDS) -> dict[str, Counter[str]]:
    """Sends malicious requests of all kinds in turn, from several threads.

    Returns:
        Kind -> outcome -> number of requests.
    """
    found: dict[str, Counter[str]] = {kind.__name__: Counter() for kind in kinds}

    def one(number: int) -> tuple[str, str]:
        kind = kinds[number % len(kinds)]
        try:
            return kind.__name__, kind(target, random.Random(seed * 1_000_003 + number))
        except OSError as error:  # no connection
            return kind.__name__, type(error).__name__

    with ThreadPoolExecutor(THREADS) as pool:
        for kind, ended in pool.map(one, range(count)):
            found[kind][ended] += 1
    return found


@contextlib.contextmanager
def under_attack(target: Target, count: int) -> Iterator[dict[str, Counter[str]]]:
    """Sends malicious requests in the background; the yielded result is filled in at the end."""
    found: dict[str, Counter[str]] = {}
    attacker = threading.Thread(target=lambda: found.update(attack(target, count)))
    attacker.start()
    try:
        yield found
    finally:
        attacker.join()
