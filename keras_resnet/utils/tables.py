"""Tables as text, for the terminal and for Markdown."""

import dataclasses
import numbers
import re
import unicodedata

MISSING = "–"
"""The text of a cell whose value is None or absent."""

# An underscore inside a word is not emphasis in Markdown: "fashion_mnist" stays as it is.
_MARKDOWN_SPECIAL = re.compile(r"[\\`*<\[|]|(?<![^\W_])_|_(?![^\W_])")


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: The key of the value in a row, which is a mapping.
        title: The heading; `key` by default.
        spec: The format specification: "" (as `str`), ".4f", ".1%", ",". Strings are not
            formatted.
    """

    key: str
    title: str | None = None
    spec: str = ""

    @property
    def heading(self):
        """The text in the first line of the column."""
        return self.key if self.title is None else self.title

    def cell(self, row):
        """Returns the text of the cell in `row`."""
        value = row.get(self.key)
        if value is None:
            return MISSING
        return printable(value if isinstance(value, str) else format(value, self.spec))

    def is_numeric(self, rows):
        """Returns whether all present values are numbers, which are aligned to the right."""
        present = [row[self.key] for row in rows if row.get(self.key) is not None]
        return bool(present) and all(isinstance(value, numbers.Number) for value in present)


def format_table(rows, columns, *, markdown=False):
    """Returns a table with aligned columns: numbers to the right, text to the left.

    Args:
        rows: Mappings from a column's key to its value. A missing value or None is shown as "–".
        columns: `Column`s; a string `"key"` stands for `Column("key")`.
        markdown: Whether to write a Markdown table, with special characters escaped, instead of
            plain text for a terminal.

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
    # Markdown needs three dashes under each heading.
    widths = [max(3, *map(display_width, cells)) for cells in zip(*lines, strict=True)]
    padded = [list(map(_pad, line, widths, numeric)) for line in lines]
    rule = [_rule(width, right, markdown) for width, right in zip(widths, numeric, strict=True)]
    return "\n".join(style(line) for line in [padded[0], rule, *padded[1:]])


def escape_markdown(text):
    r"""Returns `text` with the special characters of Markdown and its tables escaped.

    Example:
        >>> print(escape_markdown("fashion_mnist|a*b"))
        fashion_mnist\|a\*b
    """
    return _MARKDOWN_SPECIAL.sub(r"\\\g<0>", text)


def printable(text):
    r"""Returns `text` with "?" for control characters, so that a name cannot control a terminal.

    Replaced are control characters, surrogates, line and paragraph separators, and the marks that
    reverse the direction of text. Joiners (Persian, emoji), wide spaces and characters that
    Python's tables do not know are kept: names in some scripts need them.

    Example:
        >>> printable("a\x1b[31mb"), printable("\u0645\u06cc\u200c\u0634\u0648\u062f")
        ('a?[31mb', 'می\u200cشود')
    """
    return "".join("?" if _is_control(character) else character for character in text)


def _is_control(character):
    # U+202A…U+202E and U+2066…U+2069 can make a name look like another one.
    reverses = "\u202a" <= character <= "\u202e" or "\u2066" <= character <= "\u2069"
    return reverses or unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"}


def display_width(text):
    """Returns the width of `text` on a terminal: two columns for wide characters, none for marks.

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
    """Returns a duration for people to read.

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
