"""A lab of a test module's own, with the pods that its manifests say; and the command `ciliate` towards its agent."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ciliate.lab.changes import populate
from ciliate.lab.lab import Lab
from ciliate.lab.placement import ONE_NODE, Shape
from ciliate.manifest import Document

PATIENCE = 60.0
"""Seconds that one command may take."""


@contextmanager
def new_lab(
    name: str, documents: Iterable[Document] = (), options: Mapping[str, str] | None = None, shape: Shape = ONE_NODE
) -> Iterator[Lab]:
    """A lab with the pods and policies of ``documents``, gone afterwards: what it leaves behind is a failure."""
    root = Path(f"/run/ciliate-test-{os.getpid()}-{uuid.uuid4().hex[:6]}")
    lab = Lab.create(f"{name}-{uuid.uuid4().hex[:8]}", root, options=options, shape=shape)
    try:
        if wanted := list(documents):
            populate(lab, wanted)
        yield lab
    finally:
        problems = lab.destroy()
        root.rmdir()
        assert problems == []


def ciliate(lab: Lab, *arguments: str, node: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a person would, towards the agent of a node: without ``node`` that of the only one."""
    socket = lab.directory.node(node).api_socket if node else lab.directory.api_socket
    command = [sys.executable, "-m", "ciliate.cli.main", "-H", str(socket), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
