"""A whole search of a small model, as a user runs it; it is resumed, helped by a second process, and converted."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest

from evit_deploy.bundle.bundle import read_bundle
from evit_deploy.errors import InputError
from evit_deploy.recipe.options import TuneOptions
from evit_deploy.recipe.recipe import load_comparison
from evit_deploy.tuning.findings import Findings
from evit_deploy.tuning.results.choice import AS_DEFAULT
from evit_deploy.tuning.results.front import Tuning
from evit_deploy.tuning.results.outputs import FINDINGS, RESULTS, STAIRCASE
from evit_deploy.tuning.staircase import Staircase
from evit_deploy.tuning.tune import tune
from tests.support.command_line import CLI, Result, listen
from tests.support.tuning import device

pytestmark = pytest.mark.slow

COUNTS = (37, 32, 28, 24, 20, 16, 12, 8)
QUICK = {"threads": 1, "duration": 3.0, "trials": 8, "sample": 16}


def flags(**options) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def known_device(out: Path) -> None:
    """A folder that knows its device already: a block costs as much as it has tokens."""
    block = tuple(count / 1e5 for count in COUNTS)
    known = msgspec.structs.replace(
        device(), counts=COUNTS, block=block, low=block, high=block, outside=1e-5, location=1e-6
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / STAIRCASE).write_bytes(msgspec.json.encode(known))


@pytest.fixture(scope="module")
def found(checkpoint_file, pictures, tmp_path_factory) -> tuple[Tuning, Path]:
    out = tmp_path_factory.mktemp("tuned") / "out"
    known_device(out)
    options = TuneOptions(min_speedup=1.05, calibration=str(pictures), data=str(pictures), **QUICK)
    return tune(checkpoint_file, options=options, out=out, resume=True, bundle=True), out


def test_the_finalists_are_measured_whole_beside_the_dense_model(found):
    tuning, _ = found
    assert tuning.finalists[0].name == "dense"
    assert "default-0.7" in [row.name for row in tuning.finalists]
    for row in tuning.finalists:
        assert row.measured.p50 > 0
        assert row.confirmed.images == 32
        assert row.answers.top1 is not None
    assert all(row.measured.speedup_low <= row.measured.speedup <= row.measured.speedup_high
               for row in tuning.finalists[1:])  # fmt: skip
    assert tuning.finalists[0].confirmed.cosine == pytest.approx(1)


def test_the_winner_agrees_no_less_than_a_default_schedule_that_is_as_fast(found):
    tuning, _ = found
    rows = {row.name: row for row in tuning.finalists}
    winner, default = rows[tuning.winner], rows["default-0.7"]
    if default.measured.speedup >= 1.05:
        assert winner.agreeing >= default.agreeing
    assert tuning.met == any(row.measured.speedup >= 1.05 for row in tuning.finalists[1:])


def test_files_say_what_was_found(found):
    tuning, out = found
    assert all((out / name).is_file() for name in (*RESULTS, FINDINGS, STAIRCASE))
    assert msgspec.json.decode((out / "tune.json").read_bytes(), type=Tuning) == tuning
    assert tuning.looked_at == len({one.schedule for one in Findings(out / FINDINGS).all()})
    assert any(one.goal == AS_DEFAULT for one in Findings(out / FINDINGS).all())
    entry = load_comparison(out / "recipe.yaml").compare[0]
    assert entry.tokens == next(row.tokens for row in tuning.finalists if row.name == tuning.winner)


def test_the_winner_s_bundle_has_its_schedule_and_is_proven(found):
    tuning, out = found
    bundle = read_bundle(out / "bundle")
    winner = next(row for row in tuning.finalists if row.name == tuning.winner)
    assert [row.tokens_out for row in bundle.manifest.plan.locations] == list(winner.schedule.counts)
    assert [row.block for row in bundle.manifest.plan.locations] == list(winner.schedule.locations)
    assert bundle.manifest.results["passed"] is True


def test_a_device_is_measured_and_a_budget_that_none_can_meet_gives_the_nearest(
    cli, checkpoint_file, pictures, tmp_path
):
    out = tmp_path / "out"
    asked = flags(min_speedup=1000, calibration=pictures, **(QUICK | {"duration": 15, "trials": 4}))
    result = cli("tune", checkpoint_file, *asked, "--out", out)
    assert result.code == 1, result.err
    assert "No schedule that was measured is at least 1000x as fast as the dense model" in result.err
    assert "default-0.7" in result.out
    document = json.loads((out / "tune.json").read_text())
    assert document["met"] is False
    staircase = msgspec.json.decode((out / STAIRCASE).read_bytes(), type=Staircase)
    assert staircase.counts[0] == 37
    assert all(seconds > 0 for seconds in staircase.block)


def test_a_search_that_ctrl_c_stops_goes_on_with_resume(checkpoint_file, pictures, tmp_path):
    out = tmp_path / "out"
    known_device(out)
    # 4,000 schedules take minutes: it is stopped in between, however fast the machine is.
    asked = ["tune", checkpoint_file, *flags(min_speedup=1.3, calibration=pictures, **(QUICK | {"trials": 4000}))]
    line = [*CLI, *map(str, asked), "--out", str(out), "-v", "--resume"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    with process:
        assert process.stderr is not None
        for text in process.stderr:
            if "] trying schedules" in text and (out / FINDINGS).exists():
                process.send_signal(signal.SIGINT)
                break
        _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "schedules were tried. Go on with: " in err
    assert "--resume" in err
    before = Findings(out / FINDINGS).all()
    assert before
    resumed = tune(
        checkpoint_file, options=TuneOptions(min_speedup=1.3, calibration=str(pictures), **QUICK), out=out, resume=True
    )
    assert Findings(out / FINDINGS).all()[: len(before)] == before
    assert resumed.looked_at >= len({one.schedule for one in before})


def test_two_processes_search_together(checkpoint_file, pictures, tmp_path):
    out = tmp_path / "out"
    known_device(out)
    asked = ["tune", checkpoint_file, *flags(min_speedup=1.3, calibration=pictures, **QUICK), "--out", out, "--resume"]
    lines = [[*CLI, *map(str, asked), "--seed", str(seed)] for seed in (0, 1)]
    both = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for line in lines]
    done = [Result(one.wait(timeout=240), *one.communicate()) for one in both]
    assert [result.code in (0, 1) for result in done] == [True, True], [result.err for result in done]
    findings = Findings(out / FINDINGS).all()
    assert len(findings) <= QUICK["trials"] + 1 + 2 * len({one.goal for one in findings})


def test_a_budget_that_the_dense_model_meets_is_refused(checkpoint_file, pictures, tmp_path):
    known_device(tmp_path / "out")
    options = TuneOptions(max_latency="10s", calibration=str(pictures), **QUICK)
    with pytest.raises(InputError, match="the dense model is as fast as that already"):
        tune(checkpoint_file, options=options, out=tmp_path / "out", resume=True)


def test_a_staircase_that_is_none_is_refused(checkpoint_file, pictures, tmp_path):
    shutil.copy(next(pictures.rglob("*.png")), tmp_path / STAIRCASE)
    options = TuneOptions(min_speedup=1.5, calibration=str(pictures), **QUICK)
    with pytest.raises(InputError, match="not a staircase"):
        tune(checkpoint_file, options=options, out=tmp_path, resume=True)


def test_a_method_whose_weights_are_not_there_leaves_nothing(checkpoint_file, pictures, tmp_path):
    options = TuneOptions(min_speedup=1.5, calibration=str(pictures), **QUICK)
    with pytest.raises(InputError, match="decides by its own layers"):
        tune(checkpoint_file, options=options, out=tmp_path / "out", tokens={"method": "dynamicvit"})
    assert not (tmp_path / "out").exists()
