"""The root of the `ciliate` command. Sub-command NAME is the click object `command` of `ciliate.cli.NAME`."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

import click

from ciliate import __version__, interrupts

COMMANDS = {
    "bpf": "Read the datapath's maps straight from the kernel",
    "cni": "Install the CNI executable and its configuration",
    "config": "Show the configuration and where each value comes from",
    "debuginfo": "Everything that helps to understand the agent, in one document",
    "endpoint": "Endpoints of this node",
    "health": "Health of every part and endpoint",
    "identity": "Security identities",
    "ip": "Addresses in use and their owners",
    "kvstore": "The key-value store: keys, health, move to another one",
    "lab": "A test cluster on this machine: real agents, pods and packets",
    "map": "The datapath's maps: how full, what is in them",
    "metrics": "What the agent counts",
    "monitor": "Watch drops, policy verdicts and traces",
    "node": "Nodes of the cluster",
    "plugins": "Plugins: list, show, check, switch",
    "policy": "Network policies: import, get, delete, simulate",
    "service": "Services and their backends",
    "status": "Health of the agent and of each of its parts",
    "version": "Versions of this program and of the agent",
}

INTERRUPTED = 130
"""As of every program that Ctrl-C ends."""


def plugin_commands() -> dict[str, str]:
    """Commands of plugins with the distribution each comes from: by entry points named ``command-NAME``."""
    from importlib.metadata import entry_points

    prefix = "command-"
    return {
        entry.name.removeprefix(prefix): f"(plugin of {entry.dist.name if entry.dist else 'unknown'})"
        for entry in entry_points(group="ciliate.plugins")
        if entry.name.startswith(prefix)
    }


def load_plugin_command(name: str) -> click.Command:
    """Load the plugin's command; a usage error with the reason where it is broken."""
    from ciliate.plugin import PluginError, PluginManager

    try:
        command = PluginManager.load().select("command", name).provider.factory(None)  # type: ignore[arg-type]
    except PluginError as error:
        raise click.UsageError(str(error)) from error
    if not isinstance(command, click.Command):
        raise click.UsageError(f"command {name!r}: its plugin made {type(command).__name__}, expected a click command")
    return command


class LazyGroup(click.Group):
    """A group that knows its sub-commands' names and help, and imports one only to run it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every sub-command's name."""
        return sorted({**plugin_commands(), **COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the sub-command, or None where there is none of that name."""
        if cmd_name not in COMMANDS:
            return load_plugin_command(cmd_name) if cmd_name in plugin_commands() else None
        module = importlib.import_module(f"ciliate.cli.{cmd_name.replace('-', '_')}")
        command = module.command
        if not isinstance(command, click.Command):
            raise TypeError(f"{module.__name__}.command: {type(command).__name__} found, expected a click command")
        return command

    def invoke(self, ctx: click.Context) -> object:
        """Run the sub-command; the reader of its output (head, less) may have seen enough, which is well."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _leave_output()
            ctx.exit(0)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the sub-commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted({**plugin_commands(), **COMMANDS}.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but a misspelt command names the closest ones."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-") and args[0] not in plugin_commands():
            import difflib

            known = self.list_commands(ctx)
            close = difflib.get_close_matches(args[0], known, n=2)
            hint = f" Did you mean {' or '.join(close)}?" if close else f" There are: {', '.join(known)}."
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ciliate")
@click.option("--socket", "-H", "socket_path", envvar="CILIATE_SOCKET_PATH", help="The agent's API socket.")
@click.pass_context
def cli(ctx: click.Context, socket_path: str | None) -> None:
    """Container networking, identity-based policy and load balancing with eBPF."""
    ctx.obj = {"socket": socket_path}


def main() -> NoReturn:
    """Entry point: 0 well, 1 the answer is no, 2 bad usage or input, 3 the agent is away, 130 interrupted."""
    interrupts.watch()
    from ciliate.api_client import AgentUnavailable, ApiError

    try:
        _check_arguments(sys.argv[1:])
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(INTERRUPTED)
    except AgentUnavailable as error:
        print(f"ciliate: {error}", file=sys.stderr)
        sys.exit(3)
    except ApiError as error:
        for line in _problem_lines(error):
            print(line, file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        what = f"{error.filename}: " if error.filename else "output: "
        print(f"ciliate: {what}{error.strerror or error}", file=sys.stderr)
        _leave_output()
        sys.exit(1)


def _check_arguments(arguments: list[str]) -> None:
    """Nothing that we send or write can hold bytes that are no UTF-8."""
    for argument in arguments:
        try:
            argument.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"argument {argument!r}: expected UTF-8") from None


def _leave_output() -> None:
    """Let what could not be written go: the end of Python would try once more."""
    import os

    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 (pathlib would be loaded for this alone)
        os.dup2(nowhere.fileno(), 1)


def _problem_lines(error: Exception) -> list[str]:
    """What the agent said; the list of mistakes only where it says more than the text does."""
    text, items = str(error), getattr(error, "problem", {}).get("problems") or []
    lines = [f"ciliate: {text}"]
    for item in items:
        said = str(item.get("text") or item) if isinstance(item, dict) else str(item)
        if said not in text:
            lines.append(f"  {said}")
    return lines


if __name__ == "__main__":
    main()
