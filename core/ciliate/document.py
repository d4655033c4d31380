"""One object of a manifest, with the place of everything in it. Apart from the reader, so that who is given documents
needs no YAML parser.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """One object and where it stands. ``lines`` maps field paths (``spec.ingress[0]``) to line numbers."""

    object: dict[str, Any]
    file: str = ""
    line: int = 0
    lines: dict[str, int] = {}

    def line_of(self, path: str) -> int:
        """The line of a field path; of the nearest enclosing item where the path itself has none."""
        while path:
            found = self.lines.get(path)
            if found is not None:
                return found
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.line
