"""Keys of a configuration: their text (``data.sources[0].path``) and their path (``("data", "sources", 0, "path")``)."""

import re
import sys

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KeyPath = tuple[str | int, ...]
"""Names of tables and keys, and the indices of array items."""

_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
_BARE = re.compile(r"[A-Za-z0-9_-]+")
_INDEX = re.compile(r"\[(\d+)\]")
_DOT = re.compile(r"[ \t]*\.[ \t]*")


def parse_key(text: str, start: int = 0) -> tuple[tuple[str, ...], int]:
    """The names of the TOML key that begins at ``text[start]``, and where it ends. ValueError where there is none."""
    parts: list[str] = []
    position = start
    while True:
        match = _PART.match(text, position)
        if match is None:
            raise ValueError(f"no TOML key at character {position + 1} of {text!r}")
        parts.append(_name(match.group()))
        dot = _DOT.match(text, match.end())
        if dot is None:
            return tuple(parts), match.end()
        position = dot.end()


def split_key(key: str) -> KeyPath:
    """The path of a key's text; the empty text is the whole configuration. ValueError where it is no key."""
    path: list[str | int] = []
    position = 0
    while position < len(key):
        parts, position = parse_key(key, position)
        path.extend(parts)
        while (index := _INDEX.match(key, position)) is not None:
            path.append(int(index.group(1)))
            position = index.end()
        if position < len(key) and not (key[position] == "." and position + 1 < len(key)):
            raise ValueError(f"{key!r} is no key: stray {key[position:]!r}")
        position += 1
    return tuple(path)


def join_key(path: KeyPath) -> str:
    """The text of a key's path, quoted where TOML demands it."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f"{'.' if text else ''}{quote_key(part)}"
    return text


def quote_key(name: str) -> str:
    """One name as TOML writes it: bare where it can be."""
    return name if _BARE.fullmatch(name) else quote_string(name)


def quote_string(text: str) -> str:
    """A TOML basic string."""
    return '"' + "".join(map(_escaped, text)) + '"'


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}


def _escaped(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    return f"\\u{ord(character):04x}" if ord(character) < 32 or ord(character) == 127 else character


def _name(part: str) -> str:
    if part[0] == "'":
        return part[1:-1]
    return str(tomllib.loads(f"key = {part}")["key"]) if part[0] == '"' else part
