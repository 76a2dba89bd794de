"""A client that sends image files to a packaged ensemble and reports the outcome for every file.

::

    python -m evit_deploy.triton.client --url http://host:8000 --model-name deit_s photos/*.jpg

If the server goes away, the client reports the requests in flight as lost, waits for the server to come back, and
continues with the other files. Lost files are not sent again, since they may have been computed.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import click
import msgspec
import numpy as np

from evit_deploy.data.labels import read_labels
from evit_deploy.errors import EvitDeployError, InputError
from evit_deploy.report.lines import printable
from evit_deploy.triton.connection import TIMEOUT, Connection, ServedModel
from evit_deploy.triton.failures import RequestLost, ServerUnreachable

LOGITS, EMBEDDING = "logits", "embedding"
PAUSE = 0.2
"""Seconds between checks whether the server is back."""


class Answer(msgspec.Struct, frozen=True):
    """Outcome of one request.

    Args:
        name: Name of the request, such as the file name.
        state: ``answered``; ``refused`` by the server, with a reason; ``lost``, sent but without an answer;
            ``unsent``, because no server was available in time.
        output: Logits ``[classes]`` or an embedding ``[width]``; ``None`` unless answered.
        reason: Why it was not answered.
        seconds: Time from sending to the answer.
    """

    name: str
    state: Literal["answered", "refused", "lost", "unsent"]
    output: np.ndarray | None = None
    reason: str = ""
    seconds: float = 0.0


def ask(
    requests: Sequence[tuple[str, Callable[[], Any]]],
    url: str,
    send: Callable[[Connection, Any], np.ndarray],
    *,
    in_flight: int = 4,
    timeout: float = TIMEOUT,
) -> list[Answer]:
    """Sends requests over several connections at a time, and continues after a restart of the server.

    Args:
        requests: (name, callable returning the payload) pairs; an InputError raised by the callable marks the request
            as refused.
        url: The server's address.
        send: Sends one payload and returns the answer.
        in_flight: Number of connections, each with one request at a time.
        timeout: Seconds to wait for an answer, and for a server to come back.

    Returns:
        One answer for each request, in order.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(requests)):
        waiting.put(number)
    answers: dict[int, Answer] = {}
    given_up = threading.Event()

    def work() -> None:
        with Connection(url, timeout) as connection, suppress(queue.Empty):
            while True:
                number = waiting.get_nowait()
                answers[number] = _ask_once(connection, *requests[number], send, given_up)
                if answers[number].state == "lost":  # the server may still be shutting down
                    _wait_back(connection, given_up)

    with ThreadPoolExecutor(in_flight) as pool:
        workers = [pool.submit(work) for _ in range(min(in_flight, len(requests)))]
        try:
            for worker in workers:
                worker.result()
        finally:
            given_up.set()  # after an interrupt, stop the workers that wait for a server
    return [answers[number] for number in range(len(requests))]


def _ask_once(
    connection: Connection,
    name: str,
    content: Callable[[], Any],
    send: Callable[[Connection, Any], np.ndarray],
    given_up: threading.Event,
) -> Answer:
    """Sends one request at most once; waits while the server is unreachable, because nothing was sent then."""
    end, made = time.monotonic() + connection.timeout, None
    while True:
        started = time.perf_counter()
        try:
            made = content() if made is None else made
            output = send(connection, made)
            return Answer(name, "answered", output, seconds=time.perf_counter() - started)
        except ServerUnreachable as error:
            if given_up.is_set() or time.monotonic() > end:
                given_up.set()  # for all workers: waiting in turn would take many times the limit
                return Answer(name, "unsent", reason=str(error))
            time.sleep(PAUSE)
        except RequestLost as error:
            return Answer(name, "lost", reason=str(error), seconds=time.perf_counter() - started)
        except EvitDeployError as error:
            return Answer(name, "refused", reason=str(error), seconds=time.perf_counter() - started)


def _wait_back(connection: Connection, given_up: threading.Event) -> None:
    end = time.monotonic() + connection.timeout
    while not given_up.is_set():
        try:
            return connection.wait_ready()
        except ServerUnreachable:
            if time.monotonic() > end:
                given_up.set()
            time.sleep(PAUSE)
    return None


def classify_files(
    paths: Sequence[Path], url: str, model: str, *, in_flight: int = 4, timeout: float = TIMEOUT
) -> list[Answer]:
    """Sends image files to an ensemble.

    Args:
        paths: JPEG or PNG files.
        url: The server's address.
        model: The ensemble's name.
        in_flight: Number of files to send at a time.
        timeout: Seconds to wait for the server to be ready, for each answer, and for it to come back.

    Returns:
        One answer for each file, in order.

    Raises:
        InputError: No such model, or one that does not accept files.
        MissingRequirement: The server is unreachable.
    """
    served = _ensemble(url, model, timeout)
    requests = [(str(path), _reader(path)) for path in paths]
    return ask(requests, url, file_sender(served), in_flight=in_flight, timeout=timeout)


def _ensemble(url: str, model: str, timeout: float) -> ServedModel:
    with Connection(url, timeout) as connection:
        connection.wait_ready()
        served = connection.describe(model)
    if served.inputs[0].dtype not in ("object", "uint8"):
        raise InputError(f"the model {model!r} takes tensors, not files", where=url, fix="Give the ensemble's name.")
    return served


def file_sender(served: ServedModel) -> Callable[[Connection, Any], np.ndarray]:
    """Returns a function that sends the bytes of one file to an ensemble and returns its answer, a vector."""
    image, name = served.inputs[0], answer_of(served)

    def send(connection: Connection, content: bytes) -> np.ndarray:
        one = np.frombuffer(content, np.uint8) if image.dtype == "uint8" else np.array([content], object)
        feeds = {image.name: one.reshape((1,) * (len(image.shape) - 1) + one.shape)}
        return connection.infer(served.name, feeds, [name])[name].reshape(-1)

    return send


def answer_of(served: ServedModel) -> str:
    """Name of the output: ``embedding`` for a model without classes, else ``logits``."""
    return EMBEDDING if any(spec.name == EMBEDDING for spec in served.outputs) else LOGITS


def _reader(path: Path) -> Callable[[], bytes]:
    def read() -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", where=path) from None

    return read


@contextmanager
def _reported() -> Iterator[None]:
    """Prints errors of evit-deploy in one sentence and exits with their code."""
    try:
        yield
    except EvitDeployError as error:
        print(f"triton_client: {printable(error)}", file=sys.stderr)
        sys.exit(error.exit_code)


def _check_use(model: str, embeds: bool, labels: Path | None, out: Path | None) -> None:
    if embeds and labels is not None:
        raise InputError(f"the model {model!r} has no classes, and so no labels", where="--labels", fix="Leave it out.")
    if not embeds and out is not None:
        raise InputError(f"the model {model!r} gives classes, not embeddings", where="--out", fix="Leave it out.")


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="IMAGE...")
@click.option("--url", required=True, help="http://HOST:8000 or grpc://HOST:8001.")
@click.option("--model-name", required=True, help="The ensemble.")
@click.option("--labels", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Class names, one a line.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File for embeddings, .npy.")
@click.option("--in-flight", type=click.IntRange(1), default=4, show_default=True, help="Files under way at a time.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), default=TIMEOUT, show_default=True, help="Seconds.")
def main(
    paths: tuple[Path, ...],
    url: str,
    model_name: str,
    labels: Path | None,
    out: Path | None,
    in_flight: int,
    timeout: float,
) -> None:
    """Send image files to an ensemble, and print a line for each: file, class, probability.

    For a model without classes: file, width of its embedding, norm. --out saves the embeddings, one row per line.

    Exit code 0: all answered. 2: some were refused. 3: no server. 4: some were lost.
    """
    with _reported():
        names = read_labels(labels) if labels else None
        embeds = answer_of(_ensemble(url, model_name, timeout)) == EMBEDDING
        _check_use(model_name, embeds, labels, out)
        answers = classify_files(paths, url, model_name, in_flight=in_flight, timeout=timeout)
    for answer in answers:
        if answer.output is None:
            print(printable(f"{answer.state}: {answer.name}: {answer.reason}"), file=sys.stderr)
        elif embeds:
            print(f"{printable(answer.name)}\t{len(answer.output)}\t{np.linalg.norm(answer.output):.3f}")
        else:
            best = int(answer.output.argmax())
            shares = np.exp(answer.output - answer.output.max())
            label = names[best] if names and best < len(names) else str(best)
            print(f"{printable(answer.name)}\t{printable(label)}\t{shares[best] / shares.sum():.3f}")
    if out is not None:
        rows = [answer.output for answer in answers if answer.output is not None]
        with out.open("wb") as file:  # given a name, numpy would append .npy to it
            np.save(file, np.stack(rows) if rows else np.empty((0, 0), np.float32))
    left = {state: sum(answer.state == state for answer in answers) for state in ("lost", "unsent", "refused")}
    if any(left.values()):
        rest = ", ".join(f"{count} {state}" for state, count in left.items() if count)
        print(f"{len(answers) - sum(left.values())} of {len(answers)} answered, {rest}", file=sys.stderr)
        codes = {"lost": RequestLost, "unsent": ServerUnreachable, "refused": InputError}
        sys.exit(next(codes[state].exit_code for state, count in left.items() if count))


if __name__ == "__main__":
    main()
