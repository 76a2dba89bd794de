"""A packaged model on a real Triton server under load: correct answers, refusals, a restart, and the cost of serving.

python tests/benchmarks/serving_load.py --digits runs/digits/bundle --out docs/results/serving_load.json

The server is NVIDIA's, on the CPU of this machine. Its ``onnxruntime`` backend is replaced by
``tests/support/triton_backend.py``, written in Python, and clients and server share the cores: the figures show the
overhead of serving here, not the throughput of a GPU.
"""

import argparse
import io
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import deit_small, save
from PIL import Image

from evit_deploy.bundle.bundle import Bundle, read_bundle
from evit_deploy.bundle.manifest import GOLDEN
from evit_deploy.data.images import preprocess_image, sample_photographs
from evit_deploy.data.training.digits.digits import digits_images
from evit_deploy.export.card import LOGITS, feeds
from evit_deploy.pipeline.convert import convert
from evit_deploy.recipe.options import ConvertOptions, ProfileOptions
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.serving.options import PackageOptions, TritonOptions
from evit_deploy.serving.package import package
from evit_deploy.triton.client import Answer, ask, file_sender
from evit_deploy.triton.connection import Connection
from evit_deploy.verification.golden import load_golden

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout, for tests.support
from tests.support.triton_server import TritonServer

BATCHES = (1, 1, 1, 2, 3, 5, 8, 16)
CLIENTS = 16


def packaged(bundle: Bundle, folder: Path, name: str) -> Path:
    """The bundle's model repository for ONNX Runtime, as ``evit-deploy package`` writes it."""
    place, _ = package(
        bundle.path, "triton", options=PackageOptions(platform="onnxruntime", name=name),
        triton=TritonOptions(device="cpu"), out=folder / name,
    )  # fmt: skip
    return place / "model_repository"


def expected(bundle: Bundle, inputs: np.ndarray) -> np.ndarray:
    """Answers of ONNX Runtime in this process."""
    with OnnxRuntimeRunner(bundle.file("model.onnx"), threads=1) as runner:
        return np.concatenate([runner.infer(feeds(part))[LOGITS] for part in np.array_split(inputs, len(inputs))])


def tolerance(bundle: Bundle) -> float:
    """Tolerance between correct answers: twice the error of each relative to FP64."""
    return 2 * load_golden(bundle.file(GOLDEN), bundle.manifest).limit()


def tensor_sender(model: str) -> Callable[[Connection, Any], np.ndarray]:
    """A function that sends a batch of inputs to a model and returns its logits."""
    return lambda connection, batch: connection.infer(model, feeds(batch), [LOGITS])[LOGITS]


def batches_of(count: int, images: int) -> list[np.ndarray]:
    """Image indices of each request, with batch sizes drawn from :data:`BATCHES`."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, images, generator.choice(BATCHES)) for _ in range(count)]


def judge(answers: Sequence[Answer], wanted: Sequence[np.ndarray], limit: float) -> dict[str, Any]:
    """Number of requests by outcome, and of wrong answers."""
    errors = [
        float(np.abs(answer.output - right).max()) if answer.output.shape == right.shape else float("inf")
        for answer, right in zip(answers, wanted, strict=True)
        if answer.output is not None
    ]
    counts = {state: sum(a.state == state for a in answers) for state in ("answered", "refused", "lost", "unsent")}
    return counts | {"wrong": sum(not error <= limit for error in errors), "worst error": max(errors, default=None)}


def latencies(seconds: Sequence[float]) -> dict[str, float]:
    """Median and tail, milliseconds."""
    p50, p99 = 1e3 * np.percentile(seconds, (50, 99))
    return {"p50 ms": round(float(p50), 3), "p99 ms": round(float(p99), 3)}


@contextmanager
def memory_of(server: TritonServer) -> Iterator[dict[str, float]]:
    """Samples the server's memory in megabytes, twice a second; the yielded result is filled in at the end."""
    sizes, found, over = [server.memory() / 1e6], {}, threading.Event()

    def look() -> None:
        while not over.wait(0.5):
            sizes.append(server.memory() / 1e6)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield found
    finally:
        over.set()
        watcher.join()
        half = sizes[len(sizes) // 2]
        figures = {"at the start": sizes[0], "halfway": half, "at the end": sizes[-1], "at most": max(sizes)}
        found |= {when: round(size, 1) for when, size in figures.items()}


def load(server: TritonServer, bundle: Bundle, model: str, inputs: np.ndarray, count: int, url: str) -> dict[str, Any]:
    """Many requests of mixed batch sizes from concurrent clients."""
    numbers, right = batches_of(count, len(inputs)), expected(bundle, inputs)
    requests = [(str(i), lambda which=which: inputs[which]) for i, which in enumerate(numbers)]
    with Connection(server.http) as connection, memory_of(server) as memory:
        before = _runs(connection, model)
        started = time.perf_counter()
        answers = ask(requests, url, tensor_sender(model), in_flight=CLIENTS)
        wall = time.perf_counter() - started
        runs = {size: total - before.get(size, 0) for size, total in _runs(connection, model).items()}
    images = sum(map(len, numbers))
    return {
        "requests": count, "images": images, "clients": CLIENTS, "wall s": round(wall, 2),
        "images/s": round(images / wall, 1), **latencies([a.seconds for a in answers]),
        **judge(answers, [right[which] for which in numbers], tolerance(bundle)),
        "images a request": round(images / count, 2), "images a run": round(images / sum(runs.values()), 2),
        "runs by batch size": {str(size): total for size, total in sorted(runs.items()) if total}, "memory MB": memory,
    }  # fmt: skip


def _runs(connection: Connection, model: str) -> dict[int, int]:
    rows = connection.statistics(model)["batch_stats"]
    return {row["batch_size"]: row["compute_infer"]["count"] for row in rows}


def overhead(server: TritonServer, bundle: Bundle, model: str, rounds: int) -> list[dict[str, Any]]:
    """Single requests, alternating with ONNX Runtime in this process on one thread, as in the server's backend."""
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest)
    rows = []
    with (
        OnnxRuntimeRunner(bundle.file("model.onnx"), threads=1) as runner,
        Connection(server.http) as http,
        Connection(server.grpc) as grpc,
    ):
        for batch in (1, 8):
            images = feeds(np.resize(golden.inputs, (batch, *golden.inputs.shape[1:])))
            ways: dict[str, Callable[[], Any]] = {
                "ONNX Runtime in process": lambda images=images: runner.infer(images),
                "Triton over HTTP": lambda images=images: http.infer(model, images, [LOGITS]),
                "Triton over gRPC": lambda images=images: grpc.infer(model, images, [LOGITS]),
            }
            times: dict[str, list[float]] = {way: [] for way in ways}
            order = np.random.default_rng(0)
            for turn in range(rounds + 3):
                for way in order.permutation(list(ways)):
                    started = time.perf_counter()
                    ways[way]()
                    if turn >= 3:  # the first calls allocate
                        times[way].append(time.perf_counter() - started)
            rows += [{"batch": batch, "way": way, **latencies(seconds)} for way, seconds in times.items()]
    return rows


def photographs(count: int) -> list[bytes]:
    """JPEG files of different sizes, crops of scikit-learn's two photographs."""
    generator, files = np.random.default_rng(0), []
    for number in range(count):
        photograph = sample_photographs()[number % 2]
        side = generator.integers(150, 420)
        left, top = (int(generator.integers(0, extent - side + 1)) for extent in photograph.size)
        content = io.BytesIO()
        photograph.crop((left, top, left + side, top + side)).save(content, "JPEG", quality=90)
        files.append(content.getvalue())
    return files


def files_load(server: TritonServer, bundle: Bundle, name: str, files: Sequence[bytes]) -> dict[str, Any]:
    """Photographs as files through the ensemble, compared with evit-deploy's preprocessing and ONNX Runtime."""
    opened = [Image.open(io.BytesIO(file)) for file in files]
    right = expected(bundle, np.stack([preprocess_image(image, bundle.manifest.preprocess) for image in opened]))
    with Connection(server.http) as connection:
        send = file_sender(connection.describe(name))
    requests = [(str(i), lambda file=file: file) for i, file in enumerate(files)]
    started = time.perf_counter()
    answers = ask(requests, server.http, send, in_flight=4)
    wall = time.perf_counter() - started
    return {
        "photographs": len(files), "wall s": round(wall, 2), **latencies([a.seconds for a in answers]),
        **judge(answers, list(right), tolerance(bundle)),
        "top-1 as in process": sum(
            int(a.output.argmax() == r.argmax()) for a, r in zip(answers, right, strict=True) if a.output is not None
        ),
    }  # fmt: skip


def bomb() -> bytes:
    """A PNG file of 100 megapixels in about ten kilobytes."""
    content = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(content, "PNG")
    return content.getvalue()


def malformed(channels: tuple[int, ...], largest: int) -> dict[str, tuple[bool, Any]]:
    """Requests that a server must refuse: kind -> whether it is a file, and its content."""
    good = photographs(1)[0]
    inputs = np.zeros((1, *channels), np.float32)
    return {
        "wrong shape": (False, inputs[..., :-1]),
        "wrong type": (False, inputs.astype(np.float64)),
        "too large a batch": (False, np.repeat(inputs, largest + 1, axis=0)),
        "no image": (True, b"GET / HTTP/1.1\r\n\r\n" * 20),
        "empty file": (True, b""),
        "truncated JPEG": (True, good[: len(good) // 2]),
        "100 megapixels": (True, bomb()),
    }


def refusals(server: TritonServer, bundle: Bundle, name: str, model: str, count: int) -> dict[str, Any]:
    """Malformed requests of every kind in turn, each followed by a valid one."""
    golden = load_golden(bundle.file(GOLDEN), bundle.manifest)
    right, good = expected(bundle, golden.inputs[:1]), golden.inputs[:1]
    said: dict[str, dict[str, int]] = {}
    states = {"refused": 0, "other": 0}
    good_answers = 0
    with Connection(server.http) as connection:
        kinds = malformed(golden.inputs.shape[1:], connection.describe(model).max_batch)
        files = file_sender(connection.describe(name))
    with memory_of(server) as memory:
        for number in range(count):
            kind, (is_file, content) = list(kinds.items())[number % len(kinds)]
            send = files if is_file else tensor_sender(model)
            (bad,) = ask([(kind, lambda content=content: content)], server.http, send, in_flight=1)
            (after,) = ask([("good", lambda: good)], server.http, tensor_sender(model), in_flight=1)
            states["refused" if bad.state == "refused" else "other"] += 1
            reason = bad.reason.removeprefix(f"{server.http}: ")
            said.setdefault(kind, {}).setdefault(reason, 0)
            said[kind][reason] += 1
            good_answers += after.output is not None and float(np.abs(after.output - right).max()) <= tolerance(bundle)
    return {
        "malformed": count, **states, "good requests after them answered right": good_answers, "messages": said,
        "memory MB": memory,
    }  # fmt: skip


def restart(server: TritonServer, bundle: Bundle, model: str, inputs: np.ndarray, count: int) -> dict[str, Any]:
    """Kills the server under load and restarts it; returns the lost requests."""
    numbers, right = batches_of(count, len(inputs)), expected(bundle, inputs)
    halfway, sent = threading.Event(), iter(range(count))

    def content(which: np.ndarray) -> np.ndarray:
        if next(sent) == count // 2:
            halfway.set()
        return inputs[which]

    requests = [(str(i), lambda which=which: content(which)) for i, which in enumerate(numbers)]
    found: list[Answer] = []
    client = threading.Thread(
        target=lambda: found.extend(ask(requests, server.http, tensor_sender(model), in_flight=CLIENTS))
    )
    client.start()
    halfway.wait()
    server.kill()
    server.start()
    client.join()
    result = judge(found, [right[which] for which in numbers], tolerance(bundle))
    return {"requests": count, "in flight at most": CLIENTS, **result}


def deit_bundle(folder: Path) -> Bundle:
    """A seeded DeiT-S, reduced."""
    torch.save({"model": deit_small().state_dict()}, folder / "deit_s.pth")
    made, _ = convert(
        folder / "deit_s.pth",
        keep_rate=0.7,
        options=ConvertOptions(targets=("onnx",)),
        measure=ProfileOptions(batch_sizes=(1,), duration=0.1),
    )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", type=Path, required=True, help="the bundle that recipes/digits.yaml makes")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--photographs", type=int, default=100)
    parser.add_argument("--malformed", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digits = read_bundle(options.digits)
        pictures = [preprocess_image(image, digits.manifest.preprocess) for image in digits_images()[0][:500]]
        inputs = np.stack(pictures)
        with TritonServer(packaged(digits, folder, "digits")) as server:
            figures["digits, one at a time"] = overhead(server, digits, "digits_model", options.rounds)
            # One-time allocations happen in the first requests of each kind.
            load(server, digits, "digits_model", inputs, options.requests // 10, server.http)
            half = options.requests // 2
            for way, url in (("HTTP", server.http), ("gRPC", server.grpc)):
                figures[f"digits over {way}"] = load(server, digits, "digits_model", inputs, half, url)
            refusals(server, digits, "digits", "digits_model", options.malformed // 10)
            figures["malformed"] = refusals(server, digits, "digits", "digits_model", options.malformed)
            figures["restart"] = restart(server, digits, "digits_model", inputs, options.requests // 5)
        deit = deit_bundle(folder)
        with TritonServer(packaged(deit, folder, "deit_s")) as server:
            figures["DeiT-S, photographs"] = files_load(server, deit, "deit_s", photographs(options.photographs))
            figures["DeiT-S, one at a time"] = overhead(server, deit, "deit_s_model", max(options.rounds // 10, 10))
    for what, figure in figures.items():
        print(what, figure)
    save(options.out, figures)


if __name__ == "__main__":
    main()
