"""A packaged model on a real Triton server under attack: correct answers, and stable memory.

python tests/benchmarks/hostile_load.py --digits runs/digits/bundle --out docs/results/hostile_load.json

The server is started as by the package, with its interfaces closed; see ``serving_load.py`` for the server, and
``tests/support/hostile.py`` for the kinds of requests.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from common import save
from serving_load import (
    CLIENTS,
    batches_of,
    expected,
    judge,
    latencies,
    memory_of,
    packaged,
    tensor_sender,
    tolerance,
)

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.data.images import preprocess_image
from evit_deploy.data.training.digits.digits import digits_images
from evit_deploy.triton.client import ask
from tests.support.hostile import INFLATED, KINDS, Target, attack, inflating_body, under_attack
from tests.support.triton_server import TritonServer

CLOSED = "model-repository,shared-memory,trace,logging"


def attacked(
    server: TritonServer, target: Target, bundle: Bundle, inputs: np.ndarray, requests: int, hostile: int
) -> dict[str, Any]:
    """Requests of concurrent clients, half over HTTP and half over gRPC, with malicious ones at the same time."""
    numbers, right = batches_of(requests, len(inputs)), expected(bundle, inputs)
    half = requests // 2
    found, walls = [], []
    files = _files(server)
    with memory_of(server) as memory:
        started = time.perf_counter()
        with under_attack(target, hostile) as ended:
            for url, part in ((server.http, numbers[:half]), (server.grpc, numbers[half:])):
                sent = [(str(i), lambda which=which: inputs[which]) for i, which in enumerate(part)]
                found += ask(sent, url, tensor_sender(target.model), in_flight=CLIENTS)
                walls.append(round(time.perf_counter() - started, 1))
        walls.append(round(time.perf_counter() - started, 1))
    assert server.process is not None
    return {
        "requests": requests, "images": sum(map(len, numbers)), "clients": CLIENTS, "hostile": hostile,
        "s until HTTP, gRPC and hostile requests were over": walls, **latencies([a.seconds for a in found]),
        **judge(found, [right[which] for which in numbers], tolerance(bundle)),
        "hostile requests that were answered": sum(counts["200"] for counts in ended.values()),
        "how they ended": {kind: dict(counts) for kind, counts in ended.items()},
        "server alive": server.process.poll() is None, "open files before": files, "open files after": _files(server),
        "memory MB": memory,
    }  # fmt: skip


def _files(server: TritonServer) -> int:
    assert server.process is not None
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def inflated(server: TritonServer, target: Target, count: int) -> dict[str, Any]:
    """Compressed bodies that expand to a large size, tested alone because the server itself leaks their memory."""
    before = server.memory() / 1e6
    ended: Counter[str] = attack(target, count, kinds=[inflating_body])["inflating_body"]
    after = server.memory() / 1e6
    kept = (after - before) / count
    return {
        "bodies": count, "MB each becomes": round(INFLATED / 1e6), "how they ended": dict(ended),
        "MB kept of each": round(kept),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, required=True, help="the bundle that recipes/digits.yaml makes")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--hostile", type=int, default=2_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bundle = read_bundle(options.digits)
    inputs = np.stack([preprocess_image(image, bundle.manifest.preprocess) for image in digits_images()[0][:500]])
    with tempfile.TemporaryDirectory() as name:
        repository = packaged(bundle, Path(name), "digits")
        before = ("sh", str(repository.with_name("closed.sh")), CLOSED)
        with TritonServer(repository, control="none", before=before) as server:
            target = Target(server.ports[0], server.ports[1], "digits", "digits_model", inputs.shape[1:])
            # One-time allocations happen in the first requests of each kind.
            attacked(server, target, bundle, inputs, options.requests // 5, options.hostile // 5)
            figures = {"digits, attacked": attacked(server, target, bundle, inputs, options.requests, options.hostile)}
            figures["compressed bodies"] = inflated(server, target, len(KINDS))
    for what, figure in figures.items():
        print(what, figure)
    save(options.out, figures)


if __name__ == "__main__":
    main()
