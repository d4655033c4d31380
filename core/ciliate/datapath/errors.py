"""Errors of the datapath."""

from __future__ import annotations


class DatapathError(OSError):
    """The kernel, the compiler or libbpf refused something; the text says what, why and, where known, the remedy."""
