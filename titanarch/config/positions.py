"""Where each key of a TOML file stands.

``tomllib`` gives the values and every syntax error, but no line numbers. The scanner here runs over text that ``tomllib``
has accepted, so it only has to find the ends of things, and never to refuse them.
"""

import re
from bisect import bisect_left

from titanarch.config.keys import KeyPath, parse_key

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SCALAR = re.compile(r"[^,\]}#\n]*")
_STRING = re.compile(
    r'''"""(?:[^"\\]+|\\.|"{1,2}(?!"))*"{3,5}'''
    r"""|'''(?:[^']+|'{1,2}(?!'))*'{3,5}"""
    r'''|"(?:[^"\\\n]|\\.)*"'''
    r"""|'[^'\n]*'""",
    re.DOTALL,
)


def key_lines(text: str) -> dict[KeyPath, int]:
    """The line, from 1, of every key, table, array item and element of an array of tables in valid TOML.

    A table's line is that of its own header where it has one, else of the first key or header that implies it.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.lines: dict[KeyPath, int] = {}
        self.newlines = [match.start() for match in re.finditer("\n", text)]
        self.n_elements: dict[KeyPath, int] = {}  # of each array of tables, so far

    def scan(self) -> dict[KeyPath, int]:
        table: KeyPath = ()
        self.skip_blank()
        while self.position < len(self.text):
            if self.text[self.position] == "[":
                table = self.header()
            else:
                self.pair(table)
            self.skip_blank()
        return self.lines

    def skip_blank(self) -> None:
        match = _BLANK.match(self.text, self.position)
        assert match is not None, "the pattern matches the empty text"
        self.position = match.end()

    def line(self) -> int:
        return bisect_left(self.newlines, self.position) + 1

    def key(self) -> tuple[str, ...]:
        parts, self.position = parse_key(self.text, self.position)
        return parts

    def header(self) -> KeyPath:
        """``[a.b]`` or ``[[a.b]]``: the path of the table that it opens."""
        line = self.line()
        brackets = 2 if self.text.startswith("[[", self.position) else 1
        self.position += brackets
        self.skip_blank()
        *parents, name = self.key()
        self.skip_blank()
        self.position += brackets
        path: KeyPath = ()
        for part in parents:
            path = self.newest((*path, part), line)
        path = (*path, name)
        if brackets == 1:
            self.lines[path] = line
            return path
        index = self.n_elements.get(path, 0)
        self.n_elements[path] = index + 1
        self.lines.setdefault(path, line)
        self.lines[(*path, index)] = line
        return (*path, index)

    def newest(self, path: KeyPath, line: int) -> KeyPath:
        """A table on the way to a header: of an array of tables, the element opened last."""
        self.lines.setdefault(path, line)
        return (*path, self.n_elements[path] - 1) if path in self.n_elements else path

    def pair(self, table: KeyPath) -> None:
        """``a.b = value`` inside ``table``."""
        line = self.line()
        path = table
        parts = self.key()
        for part in parts[:-1]:
            path = (*path, part)
            self.lines.setdefault(path, line)
        path = (*path, parts[-1])
        self.lines[path] = line
        self.skip_blank()
        self.position += 1  # the equals sign
        self.skip_blank()
        self.value(path)

    def value(self, path: KeyPath) -> None:
        opening = self.text[self.position]
        if opening == "[":
            self.array(path)
        elif opening == "{":
            self.inline_table(path)
        else:
            match = (_STRING if opening in "\"'" else _SCALAR).match(self.text, self.position)
            assert match is not None, f"tomllib accepted the value on line {self.line()}"
            self.position = match.end()

    def array(self, path: KeyPath) -> None:
        index = 0
        self.position += 1
        self.skip_blank()
        while self.text[self.position] != "]":
            self.lines[(*path, index)] = self.line()
            self.value((*path, index))
            index += 1
            self.skip_separator()
        self.position += 1

    def inline_table(self, path: KeyPath) -> None:
        self.position += 1
        self.skip_blank()
        while self.text[self.position] != "}":
            self.pair(path)
            self.skip_separator()
        self.position += 1

    def skip_separator(self) -> None:
        self.skip_blank()
        if self.text[self.position] == ",":
            self.position += 1
            self.skip_blank()
