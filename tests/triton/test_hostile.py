"""A packaged model on a real server, attacked while it answers: the short form of benchmarks/hostile_load.py."""

import os
from pathlib import Path

import numpy as np
import pytest

from evit_deploy.bundle.manifest import GOLDEN
from evit_deploy.export.card import LOGITS, feeds
from evit_deploy.triton.client import ask
from evit_deploy.triton.connection import Connection
from evit_deploy.verification.golden import load_golden
from tests.support.hostile import CHUNKED, KINDS, Target, attack, inflating_body, under_attack
from tests.support.triton_models import MODEL, NAME
from tests.support.triton_server import TritonServer

pytestmark = pytest.mark.triton

ROUNDS, REQUESTS = 12, 1000


def test_right_answers_and_no_more_memory_under_hostile_requests(packaged: Path, converted):
    closed = "model-repository,shared-memory,trace,logging"
    golden = load_golden(converted.file(GOLDEN), converted.manifest)
    which = np.random.default_rng(0).integers(0, len(golden.inputs), REQUESTS)
    requests = [(str(n), lambda n=n: golden.inputs[n : n + 1]) for n in which]
    before = ("sh", str(packaged / "closed.sh"), closed)
    with TritonServer(packaged / "model_repository", control="none", before=before) as server:
        assert server.process is not None
        target = Target(server.ports[0], server.ports[1], NAME, MODEL, golden.inputs.shape[1:])
        attack(target, 2 * len(KINDS), seed=1)  # what is allocated once
        memory, files = server.memory(), open_files(server)
        with under_attack(target, ROUNDS * len(KINDS)) as ended:
            answers = ask(
                requests, server.http, lambda c, batch: c.infer(MODEL, feeds(batch), [LOGITS])[LOGITS], in_flight=16
            )
        assert {answer.state for answer in answers} == {"answered"}
        for answer, n in zip(answers, which, strict=True):
            assert answer.output is not None
            np.testing.assert_allclose(answer.output, golden.logits[n : n + 1], rtol=0, atol=2 * golden.limit())
        assert {kind: sum(counts.values()) for kind, counts in ended.items()} == dict.fromkeys(ended, ROUNDS)
        taken = {kind: dict(counts) for kind, counts in ended.items() if {"200", "silent"} & set(counts)}
        assert taken == {}
        with Connection(server.http) as connection:
            connection.wait_ready()
        assert server.process.poll() is None
        assert server.memory() - memory < CHUNKED * ROUNDS / 2  # bodies without an end alone are twice that
        assert open_files(server) <= files + 20  # of hundreds of connections
        # This server keeps what a compressed body becomes, where 26.05 and later let it go; it answers all the same.
        inflated = attack(target, 4, kinds=[inflating_body])
        assert "200" not in inflated["inflating_body"]
        with Connection(server.http) as connection:
            logits = connection.infer(MODEL, feeds(golden.inputs[:1]))[LOGITS]
        np.testing.assert_allclose(logits, golden.logits[:1], rtol=0, atol=2 * golden.limit())


def open_files(server: TritonServer) -> int:
    assert server.process is not None
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))
