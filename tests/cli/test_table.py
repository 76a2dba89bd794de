"""`table` as a user runs it."""

import pytest

COUNTED = [4.60, 3.99, 3.44, 3.00, 2.61, 2.28]


def test_a_table(cli):
    result = cli("table", "2a")
    assert result.code == 0
    assert result.out.startswith("Table 2a: EViT-DeiT-S without fusion. EViT: Not All Patches")
    assert "Throughput here is missing: --throughput measures it." in result.out
    rows = [line.split() for line in result.out.splitlines() if line.startswith(("DeiT-S", "0."))]
    assert [float(row[-1]) for row in rows] == COUNTED


def test_json_and_markdown(cli):
    document = cli("table", "table2a", "--json").document
    assert [round(row["gmacs"], 2) for row in document["rows"]] == COUNTED
    assert document["rows"][1]["row"]["published"] == {
        "top1": 79.9, "top5": 94.9, "images_per_second": 3201.0, "gmacs": 4.3,
    }  # fmt: skip
    text = cli("table", "2a", "--markdown").out
    assert "| 0.5 | 78.4 | – | 94.1 | – | 5325 | – | 1.82x | – | 2.5 | 2.28 |" in text


@pytest.mark.parametrize(
    ("arguments", "hints"),
    [
        (["2"], ["no such table", "Did you mean 2a or 2b"]),
        (["two"], ["no such table", "expected 1, 2a"]),
        ([], ["NUMBER"]),
        (["1", "--weights", "x"], ["expected NAME=FILE"]),
        (["1", "--weights", "=x"], ["expected NAME=FILE"]),
        (["1", "--weights", "x=y", "--data", "."], ["no row of the table uses these weights", "DeiT-S"]),
        (["1", "--weights", "DeiT-S=y", "--weights", "DeiT-S=z", "--data", "."], ["twice"]),
        (["1", "--weights", "DeiT-S=y"], ["Give --data"]),
        (["1", "--data", "."], ["Give --weights"]),
        (["1", "--weights", "DeiT-S=absent.pth", "--data", "absent"], ["absent", "no such folder"]),
        (["1", "--json", "--markdown"], ["give one of them"]),
        (["1", "--throughput", "--runtime", "tensorrt"], ["need no engine"]),
        (["1", "--throughput", "--duration", "nan"], ["--duration"]),
        (["1", "--throughput", "--batch", "0"], ["--batch"]),
    ],
)
def test_refusals(cli, arguments, hints):
    result = cli("table", *arguments)
    if "--json" in arguments:
        assert result.code == 2
        assert all(hint in result.err for hint in hints)
        return
    result.refused(2, *hints)
