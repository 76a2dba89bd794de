"""What ``conftest.py`` adds: with ``--require`` no job passes by skipping, and what is left out is said."""

import importlib.metadata
from pathlib import Path

import pytest

CONFTEST = (Path(__file__).parent / "conftest.py").read_text().replace('pytest_plugins = ["pytester"]', "")

TESTS = """
import pytest

@pytest.mark.gpu
def test_needs_a_gpu():
    pytest.skip("no CUDA device")

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="too old a driver")
def test_needs_a_driver():
    pass

@pytest.mark.gpu
@pytest.mark.xfail(reason="known")
def test_known_to_fail():
    assert False

@pytest.mark.slow
def test_slow():
    pytest.skip("no time")

def test_plain():
    pass
"""


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makeini("[pytest]\nmarkers =\n    gpu: needs a CUDA device\n    slow: takes long\n")
    pytester.makeconftest(CONFTEST)
    return pytester


def test_without_it_skips_are_skips(project):
    project.makepyfile(TESTS)
    project.runpytest_inprocess().assert_outcomes(passed=1, skipped=3, xfailed=1)


def test_with_it_skips_of_these_markers_fail_with_their_reason(project):
    project.makepyfile(TESTS)
    result = project.runpytest_inprocess("--require", "gpu")
    result.assert_outcomes(passed=1, skipped=1, failed=1, errors=1, xfailed=1)  # skipif skips before the call
    result.stdout.fnmatch_lines_random(
        ["*is required (gpu) and was skipped: *no CUDA device", "*is required (gpu) and was skipped: *too old a driver"]
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED


def test_it_takes_several_markers(project):
    project.makepyfile(TESTS)
    project.runpytest_inprocess("--require", "gpu,slow").assert_outcomes(passed=1, failed=2, errors=1, xfailed=1)


def test_with_it_a_file_skipped_while_imported_fails_too(project):
    project.makepyfile("import pytest\npytest.importorskip('no_such_package')\n")
    assert project.runpytest_inprocess("--require", "gpu").ret != pytest.ExitCode.OK
    result = project.runpytest_inprocess("--require", "gpu")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines_random(["*skipped as a whole under --require gpu: *no_such_package*"])


def test_an_unknown_marker_is_a_usage_error(project):
    project.makepyfile(TESTS)
    result = project.runpytest_inprocess("--require", "gqu")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines_random(["*--require: no such marker: gqu*"])


@pytest.mark.parametrize("processes", ["0", "1"])
def test_it_is_said_how_many_are_deselected_and_how_to_run_them(project, processes):
    project.makepyfile(TESTS)
    result = project.runpytest("-m", "not (gpu or slow)", "-n", processes)
    result.stdout.fnmatch_lines_random(["4 deselected by -m 'not (gpu or slow)'; pytest -m '' runs all"])


def test_nothing_is_said_where_none_is(project):
    project.makepyfile(TESTS)
    assert "deselected by" not in str(project.runpytest("-m", "").stdout)


def test_the_header_names_the_versions(project):
    project.makepyfile(TESTS)
    torch = importlib.metadata.version("torch")
    project.runpytest_inprocess().stdout.fnmatch_lines_random([f"torch {torch}, timm *, onnx *, onnxr*"])
