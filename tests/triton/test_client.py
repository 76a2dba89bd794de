"""A packaged model on a real server: right answers from files and under load, refusals, reloads, a server that dies."""

import re
import subprocess
import sys
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from evit_deploy.bundle.bundle import Bundle
from evit_deploy.bundle.manifest import GOLDEN
from evit_deploy.data.images import preprocess_image
from evit_deploy.errors import InputError
from evit_deploy.export.card import LOGITS, feeds
from evit_deploy.models.parent import parent_model
from evit_deploy.triton.client import Answer, ask, classify_files, file_sender
from evit_deploy.triton.connection import Connection
from evit_deploy.triton.failures import RequestLost, RequestRefused, ServerUnreachable
from evit_deploy.verification.golden import Golden, load_golden
from tests.support.triton_models import MODEL, NAME, bomb, copied, encoded, perturbed, photographs
from tests.support.triton_server import TritonServer

pytestmark = pytest.mark.triton


@pytest.fixture(scope="module")
def golden(converted: Bundle) -> Golden:
    return load_golden(converted.file(GOLDEN), converted.manifest)


def client(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "evit_deploy.triton.client", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


# ---- files


def test_photographs_are_answered_as_by_pytorch(triton, converted, golden, tmp_path):
    model, why_not = parent_model(converted)
    assert model is not None, why_not
    paths, tensors = [], []
    for number, photograph in enumerate(photographs(8)):
        kind = ("PNG", "JPEG")[number % 2]
        paths.append(tmp_path / f"{number}.{kind.lower()}")
        paths[-1].write_bytes(encoded(photograph, kind))
        tensors.append(preprocess_image(paths[-1], converted.manifest.preprocess))
    with torch.inference_mode():
        wanted = model(torch.from_numpy(np.stack(tensors))).numpy()
    for url in (triton.http, triton.grpc):
        answers = classify_files(paths, url, NAME)
        assert [answer.name for answer in answers] == [str(path) for path in paths]
        logits = np.stack([answer.output for answer in answers if answer.output is not None])
        np.testing.assert_allclose(logits, wanted, rtol=0, atol=2 * golden.limit())


def test_the_clients_command(triton, tmp_path):
    good, cut, labels = tmp_path / "good.jpg", tmp_path / "cut.jpg", tmp_path / "labels.txt"
    good.write_bytes(encoded(photographs()[0], "JPEG"))
    cut.write_bytes(good.read_bytes()[:-2000])
    labels.write_text("".join(f"class {number}\n" for number in range(10)))
    call = ("--url", triton.http, "--model-name", NAME, "--labels", labels)
    done = client(*call, good)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(rf"{re.escape(str(good))}\tclass \d\t[01]\.\d{{3}}\n", done.stdout)
    done = client(*call, good, cut, tmp_path / "none.jpg")
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert re.search(r"refused: .*cut.jpg: .*cannot be read to its end", done.stderr)
    assert re.search(r"refused: .*none.jpg: .*No such file", done.stderr)
    assert done.stderr.endswith("1 of 3 answered, 2 refused\n")
    done = client("--url", triton.http, "--model-name", MODEL, good)
    assert (done.returncode, "takes tensors, not files" in done.stderr) == (2, True)
    done = client("--url", "http://127.0.0.1:1", "--model-name", NAME, good)
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)


# ---- load


def settled(connection: Connection, before: dict[str, Any], images: int) -> dict[str, Any]:
    """The statistics, once the last runs are counted: a server answers first and counts then."""
    end = time.monotonic() + 10
    while True:
        after = connection.statistics(MODEL)
        if after["inference_count"] - before["inference_count"] >= images or time.monotonic() > end:
            return after
        time.sleep(0.1)


def test_answers_under_load_are_right_and_put_together(triton, golden):
    generator = np.random.default_rng(0)
    which = [generator.integers(0, len(golden.inputs), generator.choice([1, 1, 2, 3, 5])) for _ in range(300)]
    requests = [(str(i), lambda numbers=numbers: golden.inputs[numbers]) for i, numbers in enumerate(which)]
    for url in (triton.http, triton.grpc):
        with Connection(triton.http) as connection:
            before = connection.statistics(MODEL)
            answers = ask(requests, url, lambda c, batch: c.infer(MODEL, feeds(batch), [LOGITS])[LOGITS], in_flight=16)
            after = settled(connection, before, sum(map(len, which)))
        assert {answer.state for answer in answers} == {"answered"}
        for answer, numbers in zip(answers, which, strict=True):
            assert answer.output is not None
            np.testing.assert_allclose(answer.output, golden.logits[numbers], rtol=0, atol=2 * golden.limit())
        images = after["inference_count"] - before["inference_count"]
        runs = after["execution_count"] - before["execution_count"]
        assert images == sum(map(len, which))
        assert runs < len(which)  # some requests shared a run


# ---- requests that cannot be answered


def test_what_cannot_be_answered_is_refused_with_a_reason_and_the_next_request_works(triton, golden):
    photograph = photographs()[0]
    good, jpeg = golden.inputs[:1], encoded(photograph, "JPEG")
    with Connection(triton.http) as connection:
        ensemble = connection.describe(NAME)
    send = file_sender(ensemble)
    refused = [
        (feeds(good[..., :-1]), r"unexpected shape for input 'input' .*Expected \[-1,3,96,96\], got \[1,3,96,95\]"),
        (feeds(good[0]), "unexpected shape"),
        (feeds(good.astype(np.float64)), "data-type is 'FP64', but model 'tiny_model' expects 'FP32'"),
        (feeds(np.repeat(good, 33, axis=0)), "batch-size must be <= 32"),
        ({"pixels": good}, "unexpected inference input 'pixels'"),
        (b"", "the image is empty"),
        (b"GIF89a" + bytes(100), "not a JPEG or PNG image"),
        (encoded(photograph, "BMP"), "not a JPEG or PNG image"),
        (jpeg[: len(jpeg) // 2], "cannot be read to its end"),
        (encoded(photograph)[:5000], "cannot be read to its end"),
        (bomb(), r"too large \(10000 x 10000 pixels"),
    ]
    for url in (triton.http, triton.grpc):
        with Connection(url) as connection:
            for content, reason in refused:
                give = send if isinstance(content, bytes) else lambda to, content: to.infer(MODEL, content)
                with pytest.raises(RequestRefused, match=reason):
                    give(connection, content)
                np.testing.assert_allclose(
                    connection.infer(MODEL, feeds(good))[LOGITS], golden.logits[:1], rtol=0, atol=golden.limit()
                )
                assert send(connection, jpeg).shape == (10,)


def test_one_bad_image_does_not_cost_the_others_in_the_batch_of_the_server(triton):
    good, cut = encoded(photographs()[0], "JPEG"), encoded(photographs()[1], "JPEG")[:-3000]
    with Connection(triton.http) as connection:
        send = file_sender(connection.describe(NAME))
    files = [("good", lambda: good) if number % 4 else ("cut", lambda: cut) for number in range(40)]
    answers = ask(files, triton.http, send, in_flight=8)
    assert [answer.state for answer in answers] == ["answered" if name == "good" else "refused" for name, _ in files]


# ---- reloads


def test_reload_and_unload(packaged, tmp_path, golden):
    repository = copied(packaged, tmp_path / "models")
    images = feeds(golden.inputs)
    with TritonServer(repository) as server, Connection(server.http) as connection:
        first = connection.infer(MODEL, images)[LOGITS]
        np.testing.assert_allclose(first, golden.logits, rtol=0, atol=golden.limit())
        perturbed(repository / MODEL / "1" / "model.onnx", repository / MODEL / "2" / "model.onnx")
        connection._client.load_model(MODEL)
        assert connection.describe(MODEL).versions == ("2",)  # version_policy: the latest
        second = connection.infer(MODEL, images)[LOGITS]
        assert np.abs(second - first).max() > 100 * golden.limit()
        with pytest.raises(InputError, match="does not serve this version"):
            connection.describe(MODEL, "1")
        connection._client.unload_model(MODEL)
        deadline = time.monotonic() + 20
        while not connection.models()[MODEL] and time.monotonic() < deadline:
            time.sleep(0.1)
        with pytest.raises(ServerUnreachable, match=r"does not take it now: .*no available versions"):
            connection.infer(MODEL, images)
        connection._client.load_model(MODEL)
        np.testing.assert_array_equal(connection.infer(MODEL, images)[LOGITS], second)


# ---- a server that dies


@pytest.mark.parametrize("way", ["http", "grpc"])
def test_a_server_that_is_killed_costs_what_was_in_its_hands_and_nothing_else(packaged, tmp_path, golden, way):
    in_flight, count = 4, 24
    repository = copied(packaged, tmp_path / "models", slow_ms=150)
    with TritonServer(repository) as server:
        url = {"http": server.http, "grpc": server.grpc}[way]
        sent: list[int] = []
        under_way = threading.Event()

        def content(number: int) -> np.ndarray:
            sent.append(number)
            if len(sent) == count // 2:
                under_way.set()
            return golden.inputs[number % len(golden.inputs)][None]

        requests = [(str(number), lambda number=number: content(number)) for number in range(count)]
        found: list[Answer] = []

        def send(connection: Connection, image: np.ndarray) -> np.ndarray:
            return connection.infer(MODEL, feeds(image))[LOGITS]

        worker = threading.Thread(target=lambda: found.extend(ask(requests, url, send, in_flight=in_flight)))
        worker.start()
        under_way.wait(60)
        time.sleep(0.05)
        server.kill()
        server.start()
        worker.join(90)
    states = [answer.state for answer in found]
    assert len(states) == count
    assert 1 <= states.count("lost") <= in_flight
    assert states.count("answered") == count - states.count("lost")
    for number, answer in enumerate(found):
        if answer.output is not None:
            right = golden.logits[number % len(golden.inputs)]
            np.testing.assert_allclose(answer.output[0], right, rtol=0, atol=2 * golden.limit())
        else:
            assert "went away with this request in its hands" in answer.reason


@pytest.mark.parametrize(("way", "cut_off"), [("http", 2), ("grpc", 0)])
def test_a_server_that_is_ended_in_good_order(packaged, tmp_path, golden, way, cut_off):
    """Over gRPC nothing is lost; open HTTP connections Triton goes on to serve, and cuts them off in the end."""
    repository = copied(packaged, tmp_path / "models", slow_ms=100)
    with TritonServer(repository) as server:
        url = {"http": server.http, "grpc": server.grpc}[way]
        requests = [(str(number), lambda: golden.inputs[:1]) for number in range(100)]
        found: list[Answer] = []

        def send(connection: Connection, image: np.ndarray) -> np.ndarray:
            return connection.infer(MODEL, feeds(image))[LOGITS]

        worker = threading.Thread(target=lambda: found.extend(ask(requests, url, send, in_flight=2)))
        worker.start()
        with Connection(server.http) as connection:
            while not connection.statistics(MODEL)["execution_count"] > 8:
                time.sleep(0.05)
        server.stop()
        assert not found  # in mid-load
        server.start()
        worker.join(90)
    states = [answer.state for answer in found]
    assert states.count("lost") <= cut_off
    assert states.count("answered") == 100 - states.count("lost")


def test_the_clients_command_names_what_was_lost(packaged, tmp_path):
    repository = copied(packaged, tmp_path / "models", slow_ms=400)
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path in paths:
        path.write_bytes(encoded(photographs()[0].resize((60, 60))))
    with TritonServer(repository) as server:
        line = [sys.executable, "-m", "evit_deploy.triton.client", "--url", server.http, "--model-name", NAME]
        more = ["--in-flight", "2", "--timeout", "4", *map(str, paths)]
        with subprocess.Popen([*line, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            with Connection(server.http) as connection:
                while not connection.statistics(MODEL)["execution_count"] > 3:  # 3 are warm-ups
                    time.sleep(0.05)
            server.kill()  # and nobody starts it again
            out, err = process.communicate(timeout=60)
    assert process.returncode == RequestLost.exit_code
    lost = re.findall(r"^lost: (\S+):", err, re.MULTILINE)
    unsent = re.findall(r"^unsent: (\S+):", err, re.MULTILINE)
    answered = [row.split("\t")[0] for row in out.splitlines()]
    assert 1 <= len(lost) <= 2
    assert sorted(answered + lost + unsent) == [str(path) for path in paths]
    assert len(answered) >= 1
    assert err.endswith(f"{len(answered)} of 8 answered, {len(lost)} lost, {len(unsent)} unsent\n")


def test_no_answer_in_time(packaged, tmp_path, golden):
    repository = copied(packaged, tmp_path / "models", slow_ms=1000)
    with TritonServer(repository) as server:
        for url in (server.http, server.grpc):
            with Connection(url, timeout=0.5) as connection:
                with pytest.raises(RequestLost, match=r"no answer within 0.5 s"):
                    connection.infer(MODEL, feeds(golden.inputs[:1]))
                wait = connection.start(MODEL, feeds(golden.inputs[:1]))
                with pytest.raises(RequestLost, match=r"no answer within 0.5 s"):
                    wait()
        with Connection(server.http, timeout=30) as connection:
            assert connection.infer(MODEL, feeds(golden.inputs[:1]))[LOGITS].shape == (1, 10)
