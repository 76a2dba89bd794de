"""The record of a search survives interruptions and several writers."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from evit_deploy.errors import InputError
from evit_deploy.tuning.answers import Nearness
from evit_deploy.tuning.findings import Finding, Findings, Shape
from evit_deploy.tuning.schedules import Schedule


def finding(number: int, goal: str = "budget") -> Finding:
    schedule = Schedule((number,), (100 - number,))
    return Finding(goal, Shape((number,), (1.0,)), schedule, Nearness(number / 100, 0.01, None, 16))


def test_findings_come_back_as_they_were(tmp_path):
    findings = Findings(tmp_path / "f")
    assert findings.all() == []
    for number in range(3):
        findings.add(finding(number))
    findings.add(finding(1, "other"))
    assert Findings(tmp_path / "f").all() == [finding(0), finding(1), finding(2), finding(1, "other")]
    assert findings.of("other") == [finding(1, "other")]
    assert findings.nearness(Schedule((2,), (98,))) == finding(2).nearness
    assert findings.nearness(Schedule((9,), (98,))) is None


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_line_that_was_cut_off_is_no_finding_and_the_next_one_is(tmp_path, cut):
    findings = Findings(tmp_path / "f")
    findings.add(finding(0))
    findings.add(finding(1))
    whole = (tmp_path / "f").read_bytes()
    (tmp_path / "f").write_bytes(whole[:-cut])
    left = Findings(tmp_path / "f").all()
    assert left == ([finding(0), finding(1)] if cut == 1 else [finding(0)])
    findings.add(finding(2))
    assert Findings(tmp_path / "f").all() == [*left, finding(2)]


def test_several_writers_lose_nothing(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: Findings(tmp_path / "f").add(finding(number)), range(64)))
    assert {one.schedule for one in Findings(tmp_path / "f").all()} == {finding(n).schedule for n in range(64)}


def test_what_is_no_record_is_refused(tmp_path):
    (tmp_path / "f").write_bytes(b'{"something": {"else": {}}}\n')
    with pytest.raises(InputError, match="not a record of a search"):
        Findings(tmp_path / "f")
