"""Load test of a server with several concurrent clients."""

import time
from collections.abc import Mapping

import numpy as np

from evit_deploy.errors import StageError
from evit_deploy.report.report import LoadRow
from evit_deploy.triton.client import Answer, answer_of, ask
from evit_deploy.triton.connection import Connection, Server

CLIENTS = 16
LARGEST = 5000
"""Maximum number of requests."""


def measure_load(served: Server, feeds: Mapping[str, np.ndarray], duration: float, clients: int = CLIENTS) -> LoadRow:
    """Sends requests from concurrent clients, each with one request at a time; never uses shared memory.

    Args:
        served: The model.
        feeds: Content of every request: one array for each input.
        duration: Approximate seconds; each client sends at least two requests.
        clients: Number of clients.

    Raises:
        StageError: A request was not answered.
        MissingRequirement: The server is unreachable.
    """
    with Connection(served.url, served.timeout) as connection:
        answer = answer_of(connection.describe(served.model, served.version))

    def send(connection: Connection, content: Mapping[str, np.ndarray]) -> np.ndarray:
        return connection.infer(served.model, content, [answer], served.version)[answer]

    def run(count: int) -> tuple[list[Answer], float]:
        started = time.perf_counter()
        requests = [(served.model, lambda: feeds)] * count
        answers = ask(requests, served.url, send, in_flight=clients, timeout=served.timeout)
        wall = time.perf_counter() - started
        failed = next((answer for answer in answers if answer.state != "answered"), None)
        if failed is not None:
            raise StageError(f"a request was {failed.state} under load: {failed.reason}", where=served.url)
        return answers, wall

    _, first = run(2 * clients)  # to estimate how many requests fill the duration
    count = min(max(2 * clients, int(2 * clients * duration / first)), LARGEST)
    with Connection(served.url, served.timeout) as connection:
        before = connection.statistics(served.model)
        answers, wall = run(count)
        after = connection.statistics(served.model)
    batch = len(next(iter(feeds.values())))
    runs = after["execution_count"] - before["execution_count"]
    p50, p99 = (1e3 * float(value) for value in np.percentile([answer.seconds for answer in answers], (50, 99)))
    return LoadRow(
        model=served.model, batch=batch, clients=clients, requests=count, images_per_second=batch * count / wall,
        p50=p50, p99=p99, images_a_run=batch * count / max(runs, 1),
    )  # fmt: skip
