"""Durable files for many at once: whoever waits at the same time shares what is costly.

A file costs one flush of its own, and all files of one directory that are written together cost one flush of the
directory. One thread does all of it, so that files of one path are written in the order in which they were asked for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ciliate import atomicfile


class _Job(NamedTuple):
    path: Path
    data: bytes | None  # None removes
    done: asyncio.Future[None]


class DurableWriter:
    """Writes and removes whole files. One per directory or part; belongs to one event loop."""

    def __init__(self) -> None:
        self._waiting: list[_Job] = []
        self._busy = False
        self._worker: ThreadPoolExecutor | None = None

    def write(self, path: Path, data: bytes) -> asyncio.Future[None]:
        """Replace ``path`` by ``data``; durable when the future is done. OSError leaves the old file alone."""
        return self._submit(path, data)

    def remove(self, path: Path) -> asyncio.Future[None]:
        """Remove ``path`` durably; nothing happens where it is gone already."""
        return self._submit(path, None)

    def _submit(self, path: Path, data: bytes | None) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Job(path, data, done))
        if not self._busy:
            self._next()
        return done

    def _next(self) -> None:
        jobs, self._waiting = self._waiting, []
        self._busy = bool(jobs)
        if jobs:
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="durable")
            work = asyncio.get_running_loop().run_in_executor(self._worker, _perform, jobs)
            work.add_done_callback(lambda finished: self._finished(jobs, finished))

    def _finished(self, jobs: Sequence[_Job], work: asyncio.Future[list[OSError | None]]) -> None:
        # those who were cancelled meanwhile wait no more; their files are written all the same
        for job, error in zip(jobs, work.result(), strict=True):
            if job.done.done():
                continue
            if error is None:
                job.done.set_result(None)
            else:
                job.done.set_exception(error)
        self._next()

    def close(self) -> None:
        """End the thread once what was asked for is done; the next file begins another."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown()


def _perform(jobs: Sequence[_Job]) -> list[OSError | None]:
    errors: list[OSError | None] = [_change(job) for job in jobs]
    for directory in {job.path.parent for job in jobs}:
        try:
            atomicfile.sync_directory(directory)
        except OSError as error:
            errors = [
                known or (error if job.path.parent == directory else None)
                for job, known in zip(jobs, errors, strict=True)
            ]
    return errors


def _change(job: _Job) -> OSError | None:
    try:
        if job.data is None:
            job.path.unlink(missing_ok=True)
        else:
            atomicfile.replace(job.path, job.data)
    except OSError as error:
        return error
    return None
