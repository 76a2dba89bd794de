"""Names that others chose, as text on a terminal."""

import unicodedata

import pytest

from evit_deploy.report.lines import printable, printable_lines, shown_in

ESCAPE = "\x1b"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{ESCAPE}[2J{ESCAPE}]0;title\a", r"\x1b[2J\x1b]0;title\x07"),
        ("\x9b31m", r"\x9b31m"),
        ("a\nverified: b", r"a\nverified: b"),
        ("a\r\tb\x7f\0", r"a\r\tb\x7f\x00"),
        ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("a\u200bb\ufeff\U000e0041", r"a\u200bb\ufeff\U000e0041"),
        ("caf\udce9 \ud800", r"caf\xe9 \ud800"),
        ("tench, Tinca tinca", "tench, Tinca tinca"),
        ("猫　café\u00a0² 🦊", "猫　café\u00a0² 🦊"),
        ("C:\\new\\table", "C:\\new\\table"),
    ],
)
def test_what_is_invisible_is_shown_as_an_escape(text, shown):
    assert printable(text) == shown


def test_nothing_that_a_terminal_obeys_is_left():
    said = printable("".join(map(chr, range(0x110000))))
    assert not {unicodedata.category(letter) for letter in said} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert said.encode("utf-8")


def test_lines_of_ours_stay():
    assert printable_lines(f"one\n two{ESCAPE}\n") == "one\n two\\x1b\n"


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "▁▄█ 3 ± 1 猫"), ("ascii", "_=# 3 ~ 1 猫"), (None, "_=# 3 ~ 1 猫"), ("xyz", "_=# 3 ~ 1 猫")],
)
def test_curves_and_signs_have_a_form_in_ascii(encoding, shown):
    assert shown_in("▁▄█ 3 ± 1 猫", encoding) == shown


def test_a_text_without_them_is_left_alone():
    assert shown_in("plain", "ascii") == "plain"
    assert shown_in("café", "latin-1") == "café"
