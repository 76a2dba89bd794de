"""Nothing lost: runs that are killed, stopped, or meet a full disk, and go on; states that do not belong."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch

from evit_deploy import interrupts
from evit_deploy.errors import InputError, Interrupted, StageError
from evit_deploy.recipe.recipe import dump_recipe
from evit_deploy.recipe.sections import DataSection, ModelSection
from evit_deploy.tokens.reduce import reduce_tokens_
from evit_deploy.training.log import TrainingLog
from evit_deploy.training.loop import DENSE, EVIT, Stage, fit, train
from evit_deploy.training.state import StateFile, interruptible, state_path
from tests.support.logs import listening, notices
from tests.support.training import RUN, SPEC, TINY, FixedBatch, Killed, recipe, section, tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nobody stopped."""
    out = tmp_path_factory.mktemp("whole")
    train(recipe(), out, device="cpu")
    return out


def assert_same_results(out: Path, whole: Path) -> None:
    for name in (DENSE, EVIT):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(out.glob("*.state"))
    for stage in ("dense", "finetune"):  # but for its timings, the log is whole too
        rows = [[row.split(",")[:4] for row in (at / f"{stage}.csv").read_text().splitlines()] for at in (out, whole)]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("stage", ["dense", "finetune"])
@pytest.mark.parametrize("step", [1, 3, 7, 11])
def test_a_run_that_was_killed_goes_on_bit_for_bit(stage, step, whole, tmp_path, monkeypatch):
    from evit_deploy.training import step as training_run

    advance, stages = training_run.TrainingRun.advance, []

    def killing(self, *arguments, **named):
        if self.step == 0 and not (stages and stages[-1] is self):
            stages.append(self)
        if len(stages) == 1 + (stage == "finetune") and self.step == step:
            raise Killed
        return advance(self, *arguments, **named)

    monkeypatch.setattr(training_run.TrainingRun, "advance", killing)
    with pytest.raises(Killed):
        train(recipe(), tmp_path, device="cpu")
    monkeypatch.setattr(training_run.TrainingRun, "advance", advance)
    if step < 3 and stage == "dense":
        train(recipe(), tmp_path, device="cpu")  # killed before anything was saved
    else:
        told = notices()
        train(recipe(), tmp_path, resume=True, device="cpu")
        assert f"{stage}: goes on at step {step // 3 * 3 + 1} of 12" in told or step < 3
    assert_same_results(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_the_command_goes_on_after_a_signal(number, tmp_path):
    long = msgspec.structs.replace(RUN, steps=400, save_every=20)
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe(dense=long, finetune=RUN)))
    command = [
        sys.executable,
        "-m",
        "evit_deploy",
        "train",
        str(tmp_path / "tiny.yaml"),
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    state = state_path(tmp_path / "run", "dense")
    deadline = time.monotonic() + 120
    while not state.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -signal.SIGKILL), said
    stopped_at = torch.load(state, weights_only=True)["step"]
    assert 0 < stopped_at < 400
    if number == signal.SIGTERM:
        line = shlex.join(["python", "-m", "evit_deploy", *command[3:], "--resume"])
        stopped = f"dense stopped after step {stopped_at} of 400, saved as {state}"
        assert said.splitlines()[-1] == f"evit-deploy: interrupted: {stopped}. Go on with: {line}"

    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "there is an interrupted run here. Continue with --resume, or start again with --force." in refused.stderr
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"dense: goes on at step {stopped_at + 1} of 400" in done.stderr
    train(recipe(dense=long, finetune=RUN), tmp_path / "whole", device="cpu")
    assert_same_results(tmp_path / "run", tmp_path / "whole")


def test_a_full_disk_is_told_and_the_run_goes_on(tmp_path, monkeypatch):
    def full(self, content):
        raise StageError("could not be written (No space left on device)", where=self.path)

    monkeypatch.setattr(StateFile, "write", full)
    told = notices()
    losses = fit(
        tiny(), FixedBatch(), section(save_every=2), stage=Stage("dense", StateFile(tmp_path / "s", recipe(), "dense"))
    )
    assert len(losses) == 8
    assert sum("the state could not be saved; training continues without it" in text for text in told) == 5
    assert "No space left on device" in told[-1]


@pytest.mark.parametrize("autocast", ["none", "fp16"])
def test_one_bad_batch_is_survived(tmp_path, autocast):
    model, told = reduce_tokens_(tiny(), SPEC), notices()

    class Once(FixedBatch):
        def training(self, batch_size, seed, **how):
            for number, (images, labels) in enumerate(super().training(batch_size, seed, **how)):
                yield images * (float("nan") if number == 5 else 1), labels

    log = TrainingLog(tmp_path, "finetune", every=2)
    losses = fit(model, Once(), section(steps=8, save_every=2, autocast=autocast), stage=Stage("finetune", log=log))
    log.write()
    assert [row.split(",")[0] for row in log.path.read_text().splitlines()] == ["step", "2", "4", "6", "8"]
    assert len(losses) == 8
    assert told[-1] == "finetune: step 6 was not finite; went back to step 5, once"
    assert all(torch.isfinite(torch.tensor(losses)))


@pytest.mark.parametrize("step", [2, 3, 5])
def test_what_was_saved_is_good_wherever_a_bad_batch_comes(step, tmp_path, monkeypatch):
    """At a save, before it, and after it: results are read late, but before anything is written."""
    written = []
    monkeypatch.setattr(StateFile, "write", lambda self, state: written.append(state))
    with pytest.raises(StageError, match=f"step {step // 3 * 3 + 1}: the loss is no longer finite"):
        fit(tiny(), FixedBatch(poison=step), section(steps=9, save_every=3, ema=0.5),
            stage=Stage("dense", StateFile(tmp_path / "s", recipe(), "dense")))  # fmt: skip
    assert [state["step"] for state in written] == [3] * (step >= 3)
    for state in written:
        assert len(state["losses"]) == state["step"]
        for part in ("model", "average"):
            assert all(value.isfinite().all() for value in state[part].values())


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"seed": 1}, "seed 1, expected seed 0"),
        ({"dense": msgspec.structs.replace(RUN, learning_rate=2e-3)}, "dense.learning_rate 0.002"),
        ({"model": ModelSection(name="deit_tiny_patch16_224", image_size=16, args=TINY)}, "model."),
    ],
)
def test_a_state_of_another_recipe_is_refused(changes, where, tmp_path):
    state = StateFile(state_path(tmp_path, "dense"), recipe(), "dense")
    state.write({"step": 3})
    with pytest.raises(InputError, match="the interrupted run had different settings") as error:
        train(recipe(**changes), tmp_path, resume=True, device="cpu")
    assert where in str(error.value)
    assert state.path.exists()


def test_what_does_not_matter_may_differ(tmp_path):
    state = StateFile(state_path(tmp_path, "dense"), recipe(), "dense")
    state.write({"step": 3})
    other = recipe(
        dense=msgspec.structs.replace(RUN, save_every=99, threads=2), data=DataSection(name="digits", workers=9)
    )
    found = StateFile(state.path, other, "dense").read()
    assert found is not None
    assert found["step"] == 3


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 junk", b"\x80\x04cos\nsystem\n"])
def test_a_damaged_state_is_refused_and_runs_no_code(content, tmp_path):
    state_path(tmp_path, "dense").write_bytes(content)
    with pytest.raises(InputError, match=r"state cannot be read .* Start again with --force"):
        train(recipe(), tmp_path, resume=True, device="cpu")


def test_resume_where_nothing_was_saved_yet_begins_anew(whole, tmp_path):
    told, out = notices(), tmp_path / "killed early"
    train(recipe(), out, resume=True, device="cpu")
    assert told[0] == f"{out}: nothing was saved yet to continue from; the run starts from the beginning"
    assert_same_results(out, whole)


def ask_after(step: int, monkeypatch, stage: int = 0) -> None:
    """Sends SIGINT to this process in a step of one of the runs."""
    from evit_deploy.training import step as training_run

    advance, runs = training_run.TrainingRun.advance, []

    def asking(self, *arguments, **named):
        if self not in runs:
            runs.append(self)
        if runs.index(self) == stage and self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self, *arguments, **named)

    monkeypatch.setattr(training_run.TrainingRun, "advance", asking)


@pytest.mark.parametrize(("number", "stage"), [(0, "dense"), (1, "finetune")])
def test_who_interrupts_a_run_hears_the_step_and_the_file(number, stage, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        ask_after(5, patch, number)
        with pytest.raises(Interrupted) as error:
            train(recipe(), tmp_path, device="cpu")
    assert str(error.value) == f"{stage} stopped after step 5 of 12, saved as {state_path(tmp_path, stage)}"
    told = notices()
    train(recipe(), tmp_path, resume=True, device="cpu")
    assert f"{stage}: goes on at step 6 of 12" in told
    assert_same_results(tmp_path, whole)


def test_who_interrupts_while_the_disk_is_full_hears_what_was_saved_last(tmp_path, monkeypatch):
    write = StateFile.write

    def once(self, content):
        if self.path.exists():
            raise StageError("could not be written (No space left on device)", where=self.path)
        write(self, content)

    monkeypatch.setattr(StateFile, "write", once)
    ask_after(5, monkeypatch)
    with pytest.raises(Interrupted, match=r"stopped after step 5 of 12, and what was saved last is .*dense\.state"):
        train(recipe(), tmp_path, device="cpu")
    assert torch.load(state_path(tmp_path, "dense"), weights_only=True)["step"] == 3


def test_who_interrupts_without_a_file_hears_nothing_of_one(monkeypatch):
    ask_after(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as error:
        fit(tiny(), FixedBatch(), section())
    assert not isinstance(error.value, Interrupted)


def test_who_interrupts_between_the_steps_hears_what_was_saved_last(tmp_path, monkeypatch):
    def comparing(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["evit_deploy.training.loop"], "compare", comparing)
    with pytest.raises(Interrupted, match=r"what was saved last is .*finetune\.state"):
        train(recipe(), tmp_path, device="cpu")
    monkeypatch.setattr(sys.modules["evit_deploy.training.loop"], "setup", comparing)
    with pytest.raises(KeyboardInterrupt) as error:
        train(recipe(), tmp_path / "nothing yet", device="cpu")
    assert not isinstance(error.value, Interrupted)


def test_signals_that_come_together_are_one_request(monkeypatch):
    """Ctrl-C reaches a process from the terminal, and as SIGTERM from what started it."""
    with interruptible() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
        monkeypatch.setattr(interrupts, "TOGETHER", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


class SecondOfTwo:
    """A process whose own random numbers are not in the state, which is the first one's."""

    num_processes, process_index, is_main_process = 2, 1, True


def test_every_process_goes_on_with_the_random_numbers_it_would_have_had(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["evit_deploy.training.loop"], "PartialState", SecondOfTwo)

    def losses(stop_at=None):
        def progress(text):
            if stop_at and f"step {stop_at} of" in text:
                raise RuntimeError("the machine stopped")

        torch.manual_seed(0)
        model = tiny(drop_path_rate=0.5)
        state = StateFile(tmp_path / "finetune.state", recipe(), "finetune") if stop_at is not None else None
        with listening(progress):
            return fit(model, FixedBatch(), section(steps=6, save_every=3), stage=Stage("finetune", state))

    whole = losses()
    with pytest.raises(RuntimeError, match="the machine stopped"):
        losses(stop_at=5)
    assert losses(stop_at=0) == whole
    assert len(set(whole)) == 6
