"""Tables as text: the command line prints them, and `report.md` holds them."""

import dataclasses
import numbers
import re
import unicodedata

MISSING = "–"
"""What a cell shows whose value is None or absent."""

# An underscore inside a word is no emphasis in Markdown: "fashion_mnist" stays readable as source.
_MARKDOWN_SPECIAL = re.compile(r"[\\`*<\[|]|(?<![^\W_])_|_(?![^\W_])")


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: Where a row (a mapping) keeps the value.
        title: The heading; None takes `key`.
        spec: How `format` writes the value: "" (as `str`), ".4f", ".1%", ",". Strings are left
            as they are.
    """

    key: str
    title: str | None = None
    spec: str = ""

    @property
    def heading(self):
        """The text at the head of the column."""
        return self.key if self.title is None else self.title

    def cell(self, row):
        """Returns the text of this column in `row`."""
        value = row.get(self.key)
        if value is None:
            return MISSING
        return printable(value if isinstance(value, str) else format(value, self.spec))

    def is_numeric(self, rows):
        """Whether all values present are numbers, so that the column is set to the right."""
        present = [row[self.key] for row in rows if row.get(self.key) is not None]
        return bool(present) and all(isinstance(value, numbers.Number) for value in present)


def format_table(rows, columns, *, markdown=False):
    """Returns `rows` as a table with aligned columns, numbers to the right and text to the left.

    Args:
        rows: Mappings from a column's key to its value. None or absent shows as "–".
        columns: `Column`s; a string `"key"` stands for `Column("key")`.
        markdown: Whether to write a Markdown table, with the special characters of its cells
            escaped, in place of plain text for a terminal.

    Returns:
        The lines, without a newline at the end.

    Example:
        >>> rows = [{"class": "Coat", "recall": 0.5}, {"class": "Bag", "recall": None}]
        >>> print(format_table(rows, ["class", Column("recall", "Recall", ".1%")]))
        class  Recall
        -----  ------
        Coat    50.0%
        Bag         –
    """
    columns = [Column(column) if isinstance(column, str) else column for column in columns]
    style = _markdown_line if markdown else _plain_line
    prepare = escape_markdown if markdown else str
    numeric = [column.is_numeric(rows) for column in columns]
    lines = [[prepare(printable(column.heading)) for column in columns]]
    lines += [[prepare(column.cell(row)) for column in columns] for row in rows]
    # Markdown asks for three dashes under each heading.
    widths = [max(3, *map(display_width, cells)) for cells in zip(*lines, strict=True)]
    padded = [list(map(_pad, line, widths, numeric)) for line in lines]
    rule = [_rule(width, right, markdown) for width, right in zip(widths, numeric, strict=True)]
    return "\n".join(style(line) for line in [padded[0], rule, *padded[1:]])


def escape_markdown(text):
    r"""Returns `text` such that Markdown shows it as it is, in a table too.

    Example:
        >>> print(escape_markdown("fashion_mnist|a*b"))
        fashion_mnist\|a\*b
    """
    return _MARKDOWN_SPECIAL.sub(r"\\\g<0>", text)


def printable(text):
    r"""Returns `text` with "?" for control characters, so that no name can steer a terminal.

    Those are the categories of control characters, surrogates, and separators of lines and
    paragraphs, and the marks that reverse the direction of text. Joiners (Persian, emoji), wide
    spaces and characters newer than Python's tables are part of names in their scripts.

    Example:
        >>> printable("a\x1b[31mb"), printable("\u0645\u06cc\u200c\u0634\u0648\u062f")
        ('a?[31mb', 'می\u200cشود')
    """
    return "".join("?" if _is_control(character) else character for character in text)


def _is_control(character):
    # U+202A…U+202E and U+2066…U+2069 could show a name as another one.
    reverses = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return reverses or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}


def display_width(text):
    """Returns how many columns `text` takes on a terminal: wide characters two, marks none.

    Example:
        >>> display_width("Shirt"), display_width("衬衫")
        (5, 4)
    """
    return sum(
        0
        if unicodedata.category(c) in {"Mn", "Me", "Cf"}
        else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )


def format_duration(seconds):
    """Returns a length of time as a person would say it.

    Example:
        >>> format_duration(4.21), format_duration(249), format_duration(7500)
        ('4.2 s', '4 min 9 s', '2 h 5 min')
    """
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    if round(seconds) < 3600:
        return "{} min {} s".format(*divmod(round(seconds), 60))
    return "{} h {} min".format(*divmod(round(seconds / 60), 60))


def _pad(text, width, right):
    space = " " * (width - display_width(text))
    return space + text if right else text + space


def _rule(width, right, markdown):
    return "-" * (width - 1) + ":" if markdown and right else "-" * width


def _plain_line(cells):
    return "  ".join(cells).rstrip()


def _markdown_line(cells):
    return f"| {' | '.join(cells)} |"
