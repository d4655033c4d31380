"""Every `ciliate` command that a document shows has its sub-commands and options."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from ciliate.cli.main import cli
from ciliate.config import dashed, documentation

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("README.md"))]
BLOCK = re.compile(r"```(?:console|sh|bash)\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`(ciliate [^`]+)`")


def shown(text: str) -> Iterator[str]:
    """Command lines in blocks and in sentences."""
    for block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if found := re.match(r"[#$] (ciliate .*)", line):
                yield found[1]
    yield from INLINE.findall(BLOCK.sub("", text))


def options_of(command: click.Command) -> dict[str, click.Parameter]:
    context = click.Context(command)
    return {name: item for item in command.get_params(context) for name in (*item.opts, *item.secondary_opts)}


def mistakes(line: str) -> list[str]:
    """Sub-commands and options that there are not; what is in capitals or brackets stands for something else."""
    words = shlex.split(line.replace("\\|", "|").replace("[", " ").replace("]", " "), comments=True)[1:]
    commands: list[click.Command] = [cli]
    found = []
    while words:
        word = words.pop(0)
        if word == "--":
            break
        if word.startswith("-"):
            name, equals, _ = word.partition("=")
            known = options_of(commands[0]).get(name)
            if known is None:
                found.append(f"{commands[0].name} has no option {name}")
            elif isinstance(known, click.Option) and not known.is_flag and not equals and words:
                words.pop(0)
        elif isinstance(commands[0], click.Group) and word != "|":
            group = commands[0]
            names = [name for name in word.split("|") if name]
            below = {name: group.get_command(click.Context(group), name) for name in names}
            found += [f"{group.name} has no command {name}" for name, command in below.items() if command is None]
            commands = [command for command in below.values() if command is not None] or [click.Command("?")]
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_shown_is_there(document: Path) -> None:
    assert [f"{line}: {text}" for line in shown(document.read_text()) for text in mistakes(line)] == []


def test_options_of_the_agent_that_are_shown_are_there() -> None:
    known = {dashed(field) for field in documentation()} | {"config", "config-dir"}
    lines = [line for path in DOCUMENTS for line in re.findall(r"ciliate-(?:agent|operator) --.*", path.read_text())]
    shown = {name for line in lines for name in re.findall(r"--([a-z][a-z0-9-]+)", line)}
    assert shown and shown <= known


def test_a_mistake_would_be_found() -> None:
    assert mistakes("ciliate polcy get") == ["cli has no command polcy"]
    assert mistakes("ciliate policy get --nothing") == ["get has no option --nothing"]
    assert mistakes("ciliate service list|gone") == ["command has no command gone"]
    assert mistakes("ciliate kvstore --kvstore-opt a.b=c migrate --to etcd") == []
