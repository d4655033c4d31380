"""What can go wrong in a lab."""

from __future__ import annotations


class LabError(Exception):
    """A lab cannot do what was asked; the text says what failed and why."""
