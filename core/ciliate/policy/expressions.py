"""Regular expressions of layer-7 rules: the part that every proxy's engine shares, and what they mean in Python.

The seed system reads them by RE2 at import, and refuses what RE2 lacks.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from functools import lru_cache

MAX_REPEAT = 1000
"""RE2's own limit."""
_GROUPS = re.compile(r"\(\?(?:[imsU]*(?:-[imsU]+)?[:)]|P<[A-Za-z_])")
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_POSIX = {
    "alnum": "0-9A-Za-z",
    "alpha": "A-Za-z",
    "ascii": r"\x00-\x7f",
    "blank": r"\t ",
    "cntrl": r"\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": r"\t\n\v\f\r ",
    "upper": "A-Z",
    "word": "0-9A-Za-z_",
    "xdigit": "0-9A-Fa-f",
}


def compile_expression(text: str) -> re.Pattern[str]:
    """Compile a rule's expression; re.error where it is not one."""
    with warnings.catch_warnings():
        # brackets within brackets are legal here; Python only announces another meaning for some day
        warnings.simplefilter("ignore", FutureWarning)
        return _compiled(text)


@lru_cache(maxsize=4096)
def _compiled(text: str) -> re.Pattern[str]:
    return re.compile(_python(text))


def mistake(text: str) -> str:
    """What keeps a text from being an expression, empty where it is one."""
    try:
        compile_expression(text)
    except (re.error, OverflowError, RecursionError) as error:
        return str(error)
    return next(_foreign(text), "")


def _tokens(text: str) -> Iterator[tuple[str, int, bool]]:
    """What stands at which place, and whether within brackets: an escape is one token, a POSIX class too."""
    place, within, first = 0, False, 0
    while place < len(text):
        token = text[place : place + 2] if text[place] == "\\" else text[place]
        if within and token == "[" and (end := text.find(":]", place)) > 0 and text[place + 1] == ":":
            token = text[place : end + 2]
        yield token, place, within
        if not within and token == "[":
            within = True
            first = place + (2 if text[place + 1 : place + 2] == "^" else 1)
        elif within and token == "]" and place > first:
            within = False
        place += len(token)


def _python(text: str) -> str:
    """The same in Python's words, which have no names for classes within brackets."""
    if "[:" not in text:
        return text
    return "".join(
        _POSIX.get(token[2:-2], token) if within and token.startswith("[:") else token
        for token, _, within in _tokens(text)
    )


def _foreign(text: str) -> Iterator[str]:
    """What only Python has; proxies would refuse it or read it otherwise."""
    repeated = False
    for token, place, within in _tokens(text):
        if within:
            continue
        again, repeated = repeated, False
        if token[0] == "\\":
            if token[1:] in "123456789" and token[1:]:
                yield f"back-reference {token} at position {place}"
            elif token[1:] in ("Z", "N", "u", "U"):
                yield f"{token} at position {place}, which is not of RE2"
        elif token == "(" and text.startswith("(?", place) and not _GROUPS.match(text, place):
            yield f"group {text[place : place + 4]} at position {place}, which is not of RE2"
        elif token in "*+?":
            if again and token == "+":
                yield f"repeated repetition at position {place}"
            repeated = True
        elif token == "{" and (count := _COUNT.match(text, place)) is not None:
            repeated = True
            if any(int(number) > MAX_REPEAT for number in count.groups() if number):
                yield f"more than {MAX_REPEAT} repetitions at position {place}"
        elif token == "}":
            repeated = bool(_COUNT.match(text, text.rfind("{", 0, place)))
