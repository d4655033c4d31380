"""`ciliate version`: of this program, and of the agent where one answers."""

from __future__ import annotations

import click

from ciliate import __version__
from ciliate.api_client import AgentUnavailable
from ciliate.cli.common import client, emit, output_option


@click.command()
@output_option
def command(output: str) -> None:
    """Show the versions of this program, of the agent and of the kernel."""
    found = {"client": __version__, "agent": "no agent answers", "kernel": ""}
    try:
        about = client().request("GET", "/v1/healthz?detail=true")
    except AgentUnavailable:
        pass
    else:
        found |= {"agent": about["version"], "kernel": about["kernel"]}
    emit(found, output, lambda data: "\n".join(f"{key:<8}{value}" for key, value in data.items() if value))
