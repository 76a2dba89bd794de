"""One training run: schedules, teachers, averages, accumulation, several processes, memory, compiling."""

import csv
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import msgspec
import numpy as np
import pytest
import timm
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from evit_deploy.errors import RecipeError, StageError
from evit_deploy.models.checkpoint import read_checkpoint
from evit_deploy.recipe.recipe import dump_recipe
from evit_deploy.recipe.sections import ModelSection, TeacherSection, TrainSection
from evit_deploy.tokens.plan import TokenSpec, scheduled_rate
from evit_deploy.tokens.reduce import reduce_tokens_, token_plan
from evit_deploy.training.loop import EVIT, fit, train
from evit_deploy.training.schedules import keep_rate_progress, learning_rate
from evit_deploy.training.setup import setup
from evit_deploy.training.step import TrainingRun
from evit_deploy.training.tasks import Teacher, make_task
from tests.support.logs import notices
from tests.support.training import RUN, SPEC, FixedBatch, losses_of, recipe, section, tiny
from tests.support.waiting import NothingWaits

# ---- keep rate


def official_rate(base: float, start: int, length: int, per_epoch: int, step: int) -> float:
    """The official code's rate at a step: a new one at every iteration between two epochs."""
    epoch = step // per_epoch
    if epoch < start:
        return 1.0
    if epoch >= start + length:
        return base
    since = step - start * per_epoch
    return base + (1 - base) * 0.5 * (1 + math.cos(math.pi * since / (length * per_epoch)))


@pytest.mark.parametrize(("start", "length"), [(0, 0), (10, 0), (0, 3), (2, 5)])
def test_the_keep_rate_is_the_official_code_s(start, length):
    run = section(keep_rate_start=start, keep_rate_epochs=length)
    for step in range(0, 20 * 7, 3):
        wanted = official_rate(0.7, start, length, 7, step)
        assert scheduled_rate(0.7, keep_rate_progress(run, step, 7)) == pytest.approx(wanted, abs=1e-6)


# ---- steps


def test_accumulated_batches_give_the_step_of_one_large_batch():
    whole, parts = tiny(), tiny()
    fit(whole, FixedBatch(), section(steps=4))

    class Halves(FixedBatch):
        def training(self, batch_size, seed, **how):
            for images, labels in super().training(8, seed, **how):
                yield from zip(images.split(4), labels.split(4), strict=True)

    fit(parts, Halves(), section(steps=4, batch_size=4, accumulate=2))
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)  # Adam makes much of gradients that are next to 0


def test_what_is_frozen_by_a_pattern_stands_still_and_moves_again_afterwards():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    fit(model, FixedBatch(), section(steps=2, frozen=("blocks.[01].*", "cls_token")))
    for name, value in model.named_parameters():
        still = name.startswith(("blocks.0.", "blocks.1.")) or name == "cls_token"
        assert torch.equal(value, before[name]) == still, name
        assert value.requires_grad


@pytest.mark.parametrize(
    ("frozen", "message"),
    [(("blocks.9.*",), "no such parameter"), (("head.*", "*"), "all parameters would stand still")],
)
def test_a_pattern_that_names_no_parameter_or_all_is_refused(frozen, message):
    with pytest.raises(RecipeError, match=message):
        setup(recipe(finetune=section(frozen=frozen)))


def test_the_average_is_kept_in_place_of_the_weights():
    plain, averaged = tiny(), tiny()
    fit(plain, FixedBatch(), section(steps=3))
    run = TrainingRun(averaged, section(steps=3, ema=0.5))
    batches, history = FixedBatch().training(8, 0), [averaged.head.weight.detach().clone()]
    for step in range(3):
        averaged.train()
        run.advance(batches, learning_rate(run.section, step, 3), moving=False)
        history.append(averaged.head.weight.detach().clone())
    wanted = history[1]  # timm's average begins with the weights after the first step
    for weight in history[2:]:
        wanted = 0.5 * wanted + 0.5 * weight
    torch.testing.assert_close(history[-1], plain.head.weight.detach())
    run.finish()
    torch.testing.assert_close(averaged.head.weight.detach(), wanted)


def test_fp16_scales_the_loss_and_leaves_steps_out_that_overflow():
    model = tiny()
    run = TrainingRun(model, section(autocast="fp16"))
    before = run.scaler.get_scale()
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    weight = model.head.weight.detach().clone()
    done = run.advance(FixedBatch().training(8, 0), 1e-3, moving=False)
    assert before == 2.0**16
    assert math.isfinite(done.loss)
    assert not math.isfinite(done.norm)
    assert torch.equal(model.head.weight, weight)
    assert run.scaler.get_scale() == 2.0**39
    assert run.step == 1


KINDS = {
    "plain": {},
    "bf16, averaged": {"autocast": "bf16", "ema": 0.9, "clip": 1.0},
    "fp16": {"autocast": "fp16"},
    "less memory": {"channels_last": True, "checkpoint_activations": True, "accumulate": 2},
}


@pytest.mark.parametrize("changes", KINDS.values(), ids=list(KINDS))
@pytest.mark.parametrize("taught", ["", "logits", "token", "hard"])
def test_nothing_in_a_step_waits_for_the_device(changes, taught):
    """What a CPU can tell of it; on a GPU see ``test_gpu.py``."""
    student, teacher = distilled() if taught in ("token", "hard") else tiny(), None
    if taught:
        kind = "logits" if taught == "logits" else "token"
        teacher = Teacher(tiny(embed_dim=48).eval(), TeacherSection(name="x", kind=kind, hard=taught == "hard"))
        teacher.model.pretrained_cfg = dict(teacher.model.pretrained_cfg) | {"mean": (0.1, 0.2, 0.3)}
    run = TrainingRun(reduce_tokens_(student, SPEC).train(), section(**changes), teacher)
    batches = FixedBatch().training(8, 0)
    run.advance(batches, 1e-3, moving=False)
    with NothingWaits():
        done = run.advance(batches, 1e-3, moving=False)
        with pytest.raises(AssertionError, match="waits for a GPU"):  # the guard does its work
            run.optimizer.param_groups[0]["params"][0].sum().item()
    assert math.isfinite(done.loss)
    assert len(done.correct) == run.section.accumulate
    assert done.seconds >= done.waited >= 0


@pytest.mark.parametrize("autocast", ["none", "bf16", "fp16"])
def test_a_step_that_is_not_finite_changes_nothing_before_it_is_read(autocast):
    run = TrainingRun(tiny().train(), section(autocast=autocast, accumulate=2))
    good, bad = FixedBatch().training(8, 0), FixedBatch(poison=0).training(8, 0)
    assert run.advance(good, 1e-3, moving=False).finite
    before = run.state()
    done = run.advance(iter([next(good), next(bad)]), 1e-3, moving=False)
    state = run.state()
    for key, value in before["model"].items():
        assert torch.equal(state["model"][key], value), key
    for number, moments in before["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(state["optimizer"]["state"][number][key], value), key
    assert not done.finite
    assert math.isnan(done.loss)
    assert run.step == 2  # it is for the reader to go back
    assert run.advance(good, 1e-3, moving=False).finite


def test_a_teacher_takes_images_as_it_was_trained():
    images, student, teacher = FixedBatch().images, tiny(), tiny(embed_dim=48)
    student.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    for cfg, changed in (
        ({"mean": (0.5,) * 3, "std": (0.5,) * 3}, False),
        ({"mean": (0.4,) * 3, "std": (0.2,) * 3}, True),
    ):
        teacher.pretrained_cfg = cfg
        how = TeacherSection(name="x", kind="logits", weight=1.0)
        task = make_task(student, section(), Teacher(teacher, how))
        shown = task.teacher.normalize_input(images, task.student_mean, task.student_std)
        assert (shown is not images) is changed
        torch.testing.assert_close(shown * cfg["std"][0] + cfg["mean"][0], images * 0.5 + 0.5)


def test_out_of_memory_says_what_would_fit(monkeypatch):
    run = TrainingRun(tiny(), section(accumulate=2))
    backward = run._backward

    def small_machine(images, targets, *, last):
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return backward(images, targets, last=last)

    monkeypatch.setattr(run, "_backward", small_machine)
    wanted = r"batch of 8 images: out of memory \(expected 2 fit\)\. Set batch_size=2 and accumulate=8"
    with pytest.raises(StageError, match=wanted):
        run.advance(FixedBatch().training(8, 0), 1e-3, moving=False)


def test_a_whole_run_compiles_at_most_four_times():
    torch._dynamo.reset()
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        compiled.append(len(inputs))
        return graph

    model = reduce_tokens_(tiny(img_size=32), SPEC)

    class Images(FixedBatch):
        def __init__(self) -> None:
            super().__init__()
            self.images = torch.randn(8, 3, 32, 32)

    import evit_deploy.training.step as module

    original = torch.compile
    try:
        module.torch.compile = lambda m, **how: original(m, **how, backend=backend)
        fit(model, Images(), section(steps=24, keep_rate_start=1, keep_rate_epochs=5, compile=True))
    finally:
        module.torch.compile = original
        torch._dynamo.reset()
    assert 1 <= len(compiled) <= 4


def test_more_programs_than_pytorch_s_own_limit_are_made(monkeypatch):
    """It counts those of all models of a class in the process; here the limit is one."""
    compiling, programs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        programs.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda m, **how: compiling(m, **how, backend=backend))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1):
        for rate in (0.5, 0.7):  # models of one plan share a program
            model = reduce_tokens_(tiny(), TokenSpec(keep_rate=rate, locations=(1,)))
            losses = fit(model, FixedBatch(), section(steps=1, compile=True))
            assert math.isfinite(losses[0])
    torch._dynamo.reset()
    assert len(programs) == 2


needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++")


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(600)
def test_a_compiled_run_learns_what_an_eager_one_does():
    """Inductor, with all that goes along: BF16, accumulated batches, an average, a teacher, a keep rate that moves."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    weights, losses = [], []
    run = section(steps=8, accumulate=2, autocast="bf16", ema=0.5, clip=1.0, keep_rate_epochs=1)
    for compiled in (False, True):
        model = reduce_tokens_(tiny(depth=2), TokenSpec(keep_rate=0.5, locations=(1,)))
        master = tiny(embed_dim=48).eval().requires_grad_(False)
        teacher = Teacher(master, TeacherSection(name="x", temperature=2.0))
        losses.append(fit(model, FixedBatch(), msgspec.structs.replace(run, compile=compiled), teacher=teacher))
        weights.append(model.state_dict())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    assert graphs == 1  # the keep rate stands still from the fourth step on
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)  # BF16 may be rounded elsewhere
    assert losses[1][-1] < losses[1][0]
    assert list(weights[0]) == list(weights[1])  # no key knows of the compiler
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=3e-2)


def test_gradients_reach_every_token_also_those_that_are_dropped():
    model = reduce_tokens_(tiny(), SPEC)
    x = torch.randn(2, 3, 16, 16, requires_grad=True)
    model.train()
    model(x).sum().backward()
    assert x.grad is not None
    patches = x.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().amax(dim=(1, 4, 5))
    assert bool((patches > 0).all())


@pytest.mark.parametrize("change", ["checkpoint_activations", "channels_last"])
def test_what_saves_memory_or_time_does_not_change_the_result(change):
    plain, other = (reduce_tokens_(tiny(), SPEC) for _ in range(2))
    fit(plain, FixedBatch(), section(steps=3))
    fit(other, FixedBatch(), section(steps=3, **{change: True}))
    for one, two in zip(plain.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# ---- teachers


def distilled():
    torch.manual_seed(0)
    small = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": 16, "num_classes": 4}
    return timm.create_model("deit_tiny_distilled_patch16_224", **small)


@pytest.mark.parametrize(("kind", "hard"), [("logits", False), ("token", False), ("token", True)])
def test_the_loss_of_a_student_is_the_formula_s(kind, hard):
    student, master = distilled() if kind == "token" else tiny(), tiny(embed_dim=48).eval()
    how = TeacherSection(name="x", kind=kind, hard=hard, weight=0.3, temperature=2.0)
    images, labels = FixedBatch().images, FixedBatch().labels
    student.train()
    torch.manual_seed(5)
    loss = make_task(student, section(), Teacher(master, how))(images, labels)["loss"]
    torch.manual_seed(5)
    answers = student(images)
    own, followed = answers if kind == "token" else (answers, answers)
    truth = torch.nn.functional.cross_entropy(own, labels)
    with torch.no_grad():
        wanted = master(images)
    if hard:
        follow = torch.nn.functional.cross_entropy(followed, wanted.argmax(1))
    else:
        p, q = (wanted / 2).softmax(1), (followed / 2).log_softmax(1)
        follow = 4 * (p * (p.log() - q)).sum(1).mean()
    torch.testing.assert_close(loss, 0.7 * truth + 0.3 * follow)


def test_a_teacher_in_a_recipe(tmp_path):
    first = train(recipe(), tmp_path / "teacher", device="cpu")
    plain = train(recipe(dense=None, model=ModelSection(checkpoint=str(first.dense))), tmp_path / "plain", device="cpu")
    taught = recipe(
        dense=None, model=ModelSection(checkpoint=str(first.dense)), teacher=TeacherSection(checkpoint=str(first.dense))
    )
    result = train(taught, tmp_path / "student", device="cpu")
    one, other = (read_checkpoint(found.checkpoint).weights for found in (plain, result))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    how = TeacherSection(checkpoint=str(first.dense), kind="token")
    with pytest.raises(RecipeError, match="the student has no distillation token"):
        train(msgspec.structs.replace(taught, teacher=how), tmp_path / "no", device="cpu")


def test_from_scratch_there_is_no_dense_model(tmp_path):
    model = msgspec.structs.replace(recipe().model, pretrained=False)
    result = train(recipe(dense=None, model=model), tmp_path, device="cpu")
    assert result.dense is None
    assert [row.name for row in result.report.accuracy] == ["evit 0.5, fine-tuned"]
    assert read_checkpoint(result.checkpoint).tokens == SPEC


def test_tensorboard_shows_what_the_csv_file_has(tmp_path):
    long = msgspec.structs.replace(RUN, steps=30, save_every=10)
    train(recipe(dense=None, model=msgspec.structs.replace(recipe().model, pretrained=False), finetune=long),
          tmp_path, device="cpu")  # fmt: skip
    with (tmp_path / "finetune.csv").open() as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "finetune")).Reload()
    assert set(events.Tags()["scalars"]) == set(rows[0]) - {"step"}
    for name in events.Tags()["scalars"]:
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        wanted = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        assert shown == [(step, pytest.approx(value, rel=1e-5)) for step, value in wanted]
    assert [row["step"] for row in rows] == ["10", "20", "30"]


# ---- several processes


LAUNCHERS = {
    "one": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--main_process_port", "0"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_two_processes_stop_at_one_step_and_say_so_once(number, tmp_path):
    long = msgspec.structs.replace(RUN, steps=5000, save_every=20)
    (tmp_path / "tiny.yaml").write_text(dump_recipe(recipe(dense=long)))
    arguments = ["-m", "evit_deploy", "train", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS["torchrun"], *arguments], stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    state = tmp_path / "run" / "dense.state"
    deadline = time.monotonic() + 200
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if number == signal.SIGINT:  # as a terminal sends it: to the launcher and to its processes
        os.killpg(process.pid, number)
    else:  # as a scheduler sends it: to the launcher, which hands it on
        process.send_signal(number)
    _, said = process.communicate(timeout=90)
    lines = [line for line in said.splitlines() if line.startswith("evit-deploy: ")]
    step = torch.load(state, weights_only=True)["step"]
    stopped = f"dense stopped after step {step} of 5000, saved as {state}"
    assert lines == [f"evit-deploy: interrupted: {stopped}. Go on by starting it in the same way with --resume."], said
    assert process.returncode != 0


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path):
    run = msgspec.structs.replace(RUN, steps=30, batch_size=32, ema=None)
    arguments = {**recipe().model.args, "drop_path_rate": 0.0}
    still = msgspec.structs.replace(recipe().model, args=arguments, pretrained=False)
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for name, launcher in LAUNCHERS.items():
        section = msgspec.structs.replace(run, batch_size=32 if name == "one" else 16)
        file, out = tmp_path / f"{name}.yaml", tmp_path / name
        file.write_text(dump_recipe(recipe(dense=None, model=still, finetune=section)))
        command = [sys.executable, *launcher, "-m", "evit_deploy", "train", str(file), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "32 images a step" in done.stderr
        assert ("2 processes" in done.stderr) is (name != "one")
    one = read_checkpoint(tmp_path / "one" / EVIT).weights
    for name in ("torchrun", "accelerate"):
        np.testing.assert_allclose(losses_of(tmp_path / name), losses_of(tmp_path / "one"), rtol=0, atol=1e-5)
        for key, two in read_checkpoint(tmp_path / name / EVIT).weights.items():
            torch.testing.assert_close(one[key], two, rtol=0, atol=2e-3)  # key biases have no gradient but noise


def test_another_number_of_processes_is_told():
    told = notices()
    run = section(steps=1, processes=8, learning_rate_batch=512)
    fit(tiny(), FixedBatch(), run)
    assert told[0] == "finetune: 1 steps (0.333 epochs), 8 images a step, learning rate 4.688e-05 = 0.003 × 8 / 512"
    assert "written for 8 processes, 64 images a step; with 1 it is 8. For as many set accumulate=8" in told[1]


@pytest.mark.parametrize(("lowest", "said"), [(1e-4, True), (4e-5, False)])
def test_a_lowest_rate_that_a_small_step_scales_is_told(lowest, said):
    told = notices()
    run = section(steps=4, learning_rate_batch=512, min_learning_rate=lowest)
    fit(tiny(), FixedBatch(), run)
    text = (
        "finetune: min_learning_rate 0.0001 is above the highest rate of a step of 8 images, 4.688e-05; it is scaled "
    )
    assert (f"{text}like that one, to 1.563e-06" in told) is said
    rates = [learning_rate(run, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(3e-3 * 8 / 512)
    assert rates[99] == pytest.approx(1e-4 * 8 / 512 if said else 4e-5, rel=0.02)
    assert rates == sorted(rates, reverse=True)


def test_a_rate_on_the_way_is_evaluated_at_that_rate():
    told = notices()
    model = reduce_tokens_(tiny(), TokenSpec(keep_rate=0.5, locations=(1,)))
    fit(model, FixedBatch(), section(steps=9, keep_rate_epochs=3, evaluate_every=1))
    on_the_way = [text for text in told if "top-1" in text]
    assert [text.split(" epochs")[0] for text in on_the_way] == ["finetune: after 1", "finetune: after 2"]
    assert token_plan(model).blocks[-1].tokens_out == 10


def test_train_section_refuses(tmp_path):
    with pytest.raises(RecipeError, match="training from scratch needs a name and no checkpoint"):
        ModelSection(checkpoint="x.pth", pretrained=False)
    with pytest.raises(RecipeError, match="no teacher given"):
        TeacherSection()
    assert TrainSection(steps=1, learning_rate=1e-3, batch_size=4, accumulate=3).images_per_step(2) == 24
