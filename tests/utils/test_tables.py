import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_resnet.utils.tables import (
    MISSING,
    Column,
    display_width,
    escape_markdown,
    format_duration,
    format_table,
    printable,
)

ROWS = [
    {"name": "Coat", "recall": 0.5, "count": 12345},
    {"name": "T-shirt/top", "recall": None, "count": 7},
]
COLUMNS = ["name", Column("recall", "Recall", ".3f"), Column("count", "Images", ",")]


def test_plain_table_aligns_text_left_and_numbers_right():
    assert format_table(ROWS, COLUMNS).splitlines() == [
        "name         Recall  Images",
        "-----------  ------  ------",
        "Coat          0.500  12,345",
        "T-shirt/top       –       7",
    ]


def test_markdown_table_marks_the_alignment():
    assert format_table(ROWS, COLUMNS, markdown=True).splitlines() == [
        "| name        | Recall | Images |",
        "| ----------- | -----: | -----: |",
        "| Coat        |  0.500 | 12,345 |",
        "| T-shirt/top |      – |      7 |",
    ]


def test_table_without_rows_is_its_head():
    assert format_table([], ["epoch"]).splitlines() == ["epoch", "-----"]


def test_absent_key_shows_as_missing_and_a_string_ignores_the_number_format():
    column = Column("value", spec=".2f")
    assert column.cell({}) == MISSING
    assert column.cell({"value": "high"}) == "high"
    assert column.cell({"value": 0}) == "0.00"


def test_column_of_strings_and_numbers_is_text():
    mixed = format_table([{"v": 1}, {"v": "wide text"}], ["v"]).splitlines()
    assert mixed[2] == "1"


NAMES = st.text(
    st.characters(categories=("Lu", "Ll", "Nd", "Po", "Pc", "Sm", "Lo", "Mn", "Cc")), max_size=12
)


@given(st.lists(st.tuples(NAMES, st.none() | st.integers()), max_size=6), st.booleans())
def test_a_row_is_one_line_whatever_its_text(pairs, markdown):
    rows = [{"name": name, "n": n} for name, n in pairs]
    lines = format_table(rows, ["name", "n"], markdown=markdown).split("\n")
    assert len(lines) == len(rows) + 2
    assert all(line.isprintable() for line in lines)


@given(st.lists(st.tuples(NAMES, st.integers()), min_size=1, max_size=6))
def test_markdown_lines_have_one_width_and_one_number_of_cells(pairs):
    rows = [{"name": name, "n": n} for name, n in pairs]
    lines = format_table(rows, ["name", "n"], markdown=True).split("\n")
    assert len({display_width(line) for line in lines}) == 1
    for line in lines:
        unescaped = line.replace("\\\\", "").replace("\\|", "")
        assert unescaped.count("|") == 3


def test_control_characters_do_not_reach_the_terminal():
    assert printable("a\x1b[2J\nb") == "a?[2J?b"
    assert printable("a\x85b\u2028c\u202ed\u2066e\udc80") == "a?b?c?d?e?"


@pytest.mark.parametrize(
    "name", ["می\u200cشود", "全角\u3000空白", "👩\u200d🌾", "نام\u200f", "\U0001fae8"]
)
def test_names_of_every_script_are_printed(name):
    assert printable(name) == name


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("fashion_mnist", "fashion_mnist"),
        ("_private_", r"\_private\_"),
        ("a|b", r"a\|b"),
        ("<b>", r"\<b>"),
        ("[x](y)", r"\[x](y)"),
        ("**bold** `code` \\", r"\*\*bold\*\* \`code\` " + "\\\\"),
    ],
)
def test_escape_markdown(text, escaped):
    assert escape_markdown(text) == escaped


def test_display_width_counts_columns_not_characters():
    assert display_width("衬衫") == 4
    assert display_width(unicodedata.normalize("NFD", "é")) == 1
    assert display_width("می\u200cشود") == 5


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 0 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7199, "2 h 0 min"),
        (90061, "25 h 1 min"),
    ],
)
def test_format_duration_never_shows_sixty(seconds, text):
    assert format_duration(seconds) == text
