"""The scanner's lines against those of documents whose writer kept count."""

import random
import sys
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from titanarch.config.keys import KeyPath
from titanarch.config.positions import key_lines

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SCALARS = (
    "1",
    "0xDEAD_BEEF",
    "-1e-5",
    "inf",
    "true",
    "1979-05-27 07:32:00Z",
    '""',
    "''",
    '"a # ] } \\" \\\\"',
    "'# [x] = \\'",
    '""""""',
    "''''''",
    '"""\n[not.a.header]\nkey = 1 # "" \\""" \\\n  x\n"""',
    "'''\nkey = 'x' ''y''\n[[no]]'''",
    '"""two quotes at the end"""""',
    "'''one'''' ",
)
NAMES = ("a", "b-c", "1", "x y", "d.e", "#", "[", "ü", '"', "")


def paths(value: Any, path: KeyPath = ()) -> set[KeyPath]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return {found for key, item in items for found in [(*path, key), *paths(item, (*path, key))]}


class Writer:
    """Writes a random document, counting lines as it goes."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.text = ""
        self.lines: dict[KeyPath, int] = {}

    def put(self, text: str) -> None:
        self.text += text

    def line(self) -> int:
        return self.text.count("\n") + 1

    def key(self, name: str) -> str:
        if name.replace("-", "").isalnum() and name.isascii() and self.rng.random() < 0.6:
            return name
        return f"'{name}'" if self.rng.random() < 0.5 else '"' + name.replace('"', '\\"') + '"'

    def dotted(self, path: KeyPath) -> str:
        return self.rng.choice([".", " . "]).join(self.key(part) for part in path if isinstance(part, str))

    def gap(self) -> None:
        self.put(self.rng.choice(["", "", "\n", '# [x] y = """ \n', " \t", "\r\n"]))

    def names(self, most: int) -> list[str]:
        return self.rng.sample(NAMES, self.rng.randint(0, most))

    def pair(self, path: KeyPath, name: str, depth: int, inline: bool = False) -> None:
        """``name = value``, or ``name.more = value``."""
        parts = [name, *(self.names(2) if self.rng.random() < 0.2 else [])]
        for end in range(1, len(parts)):
            self.lines.setdefault((*path, *parts[:end]), self.line())
        path = (*path, *parts)
        self.lines[path] = self.line()
        self.put(self.dotted(tuple(parts)) + self.rng.choice(["=", " = "]))
        self.value(path, depth, inline)

    def value(self, path: KeyPath, depth: int, inline: bool) -> None:
        choice = self.rng.random() if depth else 1.0
        if choice < 0.2:
            self.put("[")
            for index in range(self.rng.randint(0, 3)):
                self.put(", " if index else "")
                if not inline:
                    self.gap()
                self.lines[(*path, index)] = self.line()
                self.value((*path, index), depth - 1, inline)
            self.put(self.rng.choice(["]", ",\n# ]\n]"]) if self.text[-1] not in "[, " and not inline else "]")
        elif choice < 0.4:
            self.put("{ ")
            for index, name in enumerate(self.names(3)):
                self.put(", " if index else "")
                self.pair(path, name, depth - 1, inline=True)
            self.put(" }")
        else:
            self.put(self.rng.choice(SCALARS))

    def table(self, path: KeyPath, depth: int) -> None:
        """Pairs, then tables and arrays of tables."""
        names = self.names(len(NAMES) if depth == 2 else 5)
        cut = self.rng.randint(0, len(names))
        for name in names[:cut]:
            self.put(self.rng.choice(["", "  "]))
            self.pair(path, name, 2)
            self.put(self.rng.choice(["\n", "\r\n", " # = [\n"]))
            self.gap()
        for name in names[cut:] if depth else []:
            self.put("\n")
            if self.rng.random() < 0.4:
                for index in range(self.rng.randint(1, 3)):
                    self.header((*path, name), f"[[{self.dotted((*path, name))}]]")
                    self.lines[(*path, name, index)] = self.lines.pop(("last",))
                    self.table((*path, name, index), depth - 1)
            else:
                below = (*path, name, *self.names(2)) if self.rng.random() < 0.3 else (*path, name)
                self.header(below, f"[ {self.dotted(below)} ]")
                self.lines[below] = self.lines.pop(("last",))
                self.table(below, depth - 1)

    def header(self, path: KeyPath, text: str) -> None:
        for end in range(1, len(path) + 1):
            self.lines.setdefault(path[:end], self.line())
        self.lines[("last",)] = self.line()
        self.put(text + self.rng.choice(["\n", " # [x]\n"]))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32))
def test_lines_are_those_the_writer_counted(seed: int) -> None:
    writer = Writer(random.Random(seed))
    writer.table((), 2)
    assert paths(tomllib.loads(writer.text)) == set(writer.lines)
    assert key_lines(writer.text) == writer.lines


HARD: tuple[tuple[str, tuple[KeyPath, ...]], ...] = (
    ("# a = 1", ()),
    ('a.b.c = """', (("a",), ("a", "b"), ("a", "b", "c"))),
    ("x = 1", ()),
    ('"""', ()),
    ("a.d = [ # comment ]", (("a", "d"),)),
    ("  1, [2,", (("a", "d", 0), ("a", "d", 1), ("a", "d", 1, 0))),
    ("  '''3", (("a", "d", 1, 1),)),
    ("  '''], # 4", ()),
    ('  { e = "}" , f.g = [', (("a", "d", 2), ("a", "d", 2, "e"), ("a", "d", 2, "f"), ("a", "d", 2, "f", "g"))),
    ("   5 ] },", (("a", "d", 2, "f", "g", 0),)),
    ("]", ()),
    ("[t.u.v]", (("t",), ("t", "u", "v"))),  # [t.u] has a header of its own further down
    ("w = 1", (("t", "u", "v", "w"),)),
    ("[[t.list]]", (("t", "list"), ("t", "list", 0))),
    ("[[t.list.inner]]", (("t", "list", 0, "inner"), ("t", "list", 0, "inner", 0))),
    ("x = 1", (("t", "list", 0, "inner", 0, "x"),)),
    ("[[t.list.inner]]", (("t", "list", 0, "inner", 1),)),
    ("[t.list.inner.deep]", (("t", "list", 0, "inner", 1, "deep"),)),
    ("y = 1", (("t", "list", 0, "inner", 1, "deep", "y"),)),
    ("[[t.list]]", (("t", "list", 1),)),
    ("[[t.list.inner]]", (("t", "list", 1, "inner"), ("t", "list", 1, "inner", 0))),
    ("[t.u]", (("t", "u"),)),
    ("z = 1979-05-27 07:32:00 # [no]", (("t", "u", "z"),)),
    ("[\"quoted.key\" . 'x']", (("quoted.key",), ("quoted.key", "x"))),
    ("\"\\u0061\" = ''", (("quoted.key", "x", "a"),)),
)


def test_lines_of_a_hard_file() -> None:
    text = "\n".join(line for line, _ in HARD)
    expected = {path: number for number, (_, found) in enumerate(HARD, 1) for path in found}
    assert paths(tomllib.loads(text)) == set(expected)
    assert key_lines(text) == expected
    assert key_lines(text.replace("\n", "\r\n")) == expected


def test_a_file_without_keys_has_no_lines() -> None:
    assert key_lines("# nothing\r\n\n") == {}
    assert key_lines("") == {}
