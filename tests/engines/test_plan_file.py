"""Plans by their first bytes: whose they are, of which version, and what files that are no plans are told."""

import json
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evit_deploy.bundle.manifest import choose_profile
from evit_deploy.engines.plan_file import PlanHeader, misfit, read_header
from evit_deploy.errors import InputError, MissingRequirement
from evit_deploy.recipe.options import BatchProfile
from tests.support.plans import rtx_plan, tiny_blocks


def header(tag: bytes = b"ftrt", version: tuple[int, ...] = (10, 13, 2, 6), serialization: int = 0) -> bytes:
    """The part of a plan's header that trtexec --getPlanVersionOnly reads, and some bytes more."""
    return tag + serialization.to_bytes(4, "little") + bytes(16) + bytes(version) + bytes(100)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    return tmp_path / "engine.plan"


# ---- headers


def test_a_header_of_tensorrt(plan):
    plan.write_bytes(header())
    assert read_header(plan) == PlanHeader("tensorrt", "10.13.2.6")


def test_a_header_of_tensorrt_rtx_without_its_second_tag_does_not_say_for_which_gpus(plan):
    plan.write_bytes(header(b"vtrt", (1, 9, 0, 4)))
    assert read_header(plan) == PlanHeader("tensorrt-rtx", "1.9.0.4")


@given(st.tuples(st.integers(1, 255), *[st.integers(0, 255)] * 3), st.sampled_from([b"ftrt", b"vtrt"]))
def test_every_version_is_read_as_written(tmp_path_factory, version, tag):
    path = tmp_path_factory.mktemp("plan") / "engine.plan"
    path.write_bytes(header(tag, version))
    assert read_header(path).version == ".".join(map(str, version))


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize(
    "gpus",
    [("SM75",), ("SM80",), ("SM86",), ("SM89",), ("SM120",), ("SM121",), ("SM80", "SM86", "SM120")],
    ids="+".join,
)
def test_a_real_plan_says_its_library_and_its_gpus(plan, gpus):
    trt = pytest.importorskip("tensorrt_rtx")
    plan.write_bytes(rtx_plan(tiny_blocks(1), gpus))
    assert read_header(plan) == PlanHeader("tensorrt-rtx", trt.__version__, tuple(gpu.lower() for gpu in gpus))


@pytest.mark.tensorrt_rtx
@pytest.mark.parametrize("left", [64, 1000, -1])
def test_a_real_plan_cut_short_is_refused_with_both_lengths(plan, left):
    content = rtx_plan(tiny_blocks(1))
    plan.write_bytes(content[:left])
    seen = len(content[:left])
    with pytest.raises(InputError, match=rf"cut short \(got {seen} bytes, expected {len(content)} bytes\)"):
        read_header(plan)


# ---- files that are no plans


def ultralytics() -> bytes:
    metadata = json.dumps({"description": "a model", "task": "classify"}).encode()
    return len(metadata).to_bytes(4, "little") + metadata + header()


STRANGERS = {
    "empty": (b"", "the file is empty .*Build the engine again"),
    "cut short": (header()[:20], r"the plan is cut short \(got 20 bytes\)"),
    "one byte short": (header()[:27], r"the plan is cut short \(got 27 bytes\)"),
    "another serialization": (header(serialization=7), "unsupported version of .*serialization 7"),
    "zeros": (header(version=(0, 0, 0, 0)), "the plan is damaged"),
    "text": (b"hello, this is no plan\n", r"a text file, not a plan \(got 'hello, this is no pl'\)"),
    "long text": ("ö".encode() * 5000, "a text file, not a plan"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS .*git lfs pull"),
    "metadata in front": (ultralytics(), r"as Ultralytics writes it.*Cut it off: tail -c \+51 engine.plan"),
    "a zip": (b"PK\x03\x04" + bytes(40), r"not a TensorRT plan \(got a file that starts with b'PK\\x03\\x04'"),
    "onnx": (tiny_blocks(1).SerializeToString(), "an ONNX model, not a plan.*--target tensorrt"),
}


@pytest.mark.parametrize("kind", STRANGERS)
def test_a_file_that_is_no_plan_is_refused_with_the_reason_and_the_fix(plan, kind):
    content, message = STRANGERS[kind]
    plan.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_header(plan)
    assert str(error.value).startswith(str(plan))
    assert error.value.exit_code == 2


def test_the_advice_to_cut_metadata_off_leaves_the_plan(plan):
    content = ultralytics()
    plan.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_header(plan)
    first = int(str(error.value.fix).split("+")[1].split()[0])  # tail -c +N starts at the N-th byte, counted from 1
    plan.write_bytes(content[first - 1 :])
    assert read_header(plan).version == "10.13.2.6"


def test_the_exporter_s_own_models_are_known_for_onnx(plan, converted):
    plan.write_bytes(converted.file("model.onnx").read_bytes())
    assert onnx.load(plan).graph.node
    with pytest.raises(InputError, match="an ONNX model"):
        read_header(plan)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"the plan cannot be read \(No such file"):
        read_header(tmp_path / "none.plan")
    with pytest.raises(InputError, match=r"the plan cannot be read \(Is a directory"):
        read_header(tmp_path)


@given(st.sampled_from([b"", b"ftrt", b"vtrt", b"ftrt" + bytes(4), b"vtrt" + bytes(4)]), st.binary(max_size=200))
def test_any_bytes_are_a_header_or_an_input_error(tmp_path_factory, start, rest):
    path = tmp_path_factory.mktemp("plan") / "engine.plan"
    path.write_bytes(start + rest)
    try:
        found = read_header(path)
    except InputError as error:
        refused = str(error)  # anything else, an IndexError for one, fails the test
        assert refused.startswith(str(path))
    else:
        assert (start + rest)[:4] in (b"ftrt", b"vtrt")
        assert len(found.version.split(".")) == 4


# ---- plans of elsewhere


def test_a_plan_of_another_version_says_both_and_the_package():
    error = misfit(Path("e.plan"), PlanHeader("tensorrt", "10.13.2.6"), version="11.4.0.106", gpu="sm90")
    assert isinstance(error, MissingRequirement)
    assert error.exit_code == 3
    assert str(error) == (
        "e.plan: the plan was built with another TensorRT, and runs on that one only (got TensorRT 11.4.0.106 here, "
        'expected 10.13.2.6). Convert again here, or: pip install "tensorrt==10.13.2.*"'
    )


def test_a_plan_for_another_gpu_says_both():
    rtx = PlanHeader("tensorrt-rtx", "1.7.1.116", ("sm80", "sm86"))
    error = misfit(Path("e.plan"), rtx, version="1.7.1.116", gpu="sm120")
    assert isinstance(error, InputError)
    assert "(got sm120 here, expected sm80 or sm86)" in str(error)
    assert "--gpu sm120" in str(error)


@pytest.mark.parametrize(
    ("found", "version", "gpu"),
    [
        (PlanHeader("tensorrt-rtx", "1.7.1.116", ("sm80",)), "1.7.1.116", "sm80"),
        (PlanHeader("tensorrt-rtx", "1.7.1.116", ("sm80",)), "1.7.1.116", None),
        (PlanHeader("tensorrt", "11.4.0.106"), "11.4.0.106", "sm90"),
        (PlanHeader("tensorrt", "11.4.0.106"), "11.4.0", "sm90"),
    ],
)
def test_a_plan_that_fits_is_not_refused(found, version, gpu):
    assert misfit(Path("e.plan"), found, version=version, gpu=gpu) is None


# ---- profiles


PROFILES = [BatchProfile(1, 1, 1), BatchProfile(1, 8, 16), BatchProfile(8, 32, 128)]


@pytest.mark.parametrize(("batch", "expected"), [(1, 0), (2, 1), (8, 1), (16, 1), (17, 2), (128, 2)])
def test_the_profile_tuned_nearest_is_taken(batch, expected):
    assert choose_profile(PROFILES, batch) == expected


def test_of_two_as_near_the_narrower_one_is_taken():
    assert choose_profile([BatchProfile(1, 8, 128), BatchProfile(4, 8, 16)], 8) == 1


@pytest.mark.parametrize("batch", [0, 129])
def test_a_batch_outside_all_profiles_is_refused_with_the_ranges(batch):
    with pytest.raises(InputError, match="1 to 1 or 1 to 16 or 8 to 128") as error:
        choose_profile(PROFILES, batch)
    assert f"--batch {batch}:{batch}:{batch}" in str(error.value)


@given(
    st.lists(st.tuples(*[st.integers(1, 300)] * 3).map(sorted).map(lambda t: BatchProfile(*t)), min_size=1, max_size=5),
    st.integers(1, 320),
)
def test_a_chosen_profile_covers_the_batch_and_no_covering_one_is_nearer(profiles, batch):
    covering = [p for p in profiles if p.minimum <= batch <= p.maximum]
    if not covering:
        with pytest.raises(InputError):
            choose_profile(profiles, batch)
        return
    chosen = profiles[choose_profile(profiles, batch)]
    assert chosen in covering

    def distance(profile: BatchProfile) -> float:
        return max(batch, profile.optimum) / min(batch, profile.optimum)

    assert distance(chosen) <= min(map(distance, covering)) + 1e-9
