"""Configuration: precedence, every wrong value at once, unknown keys, documentation."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from ciliate.config import AgentConfig, ConfigError, changed, documentation, load_config
from ciliate.daemonize import UsageError, allow_open_files, parse_arguments
from ciliate.duration import parse_duration


def sources(tmp_path: Path) -> tuple[Path, Path]:
    file, directory = tmp_path / "ciliate.yaml", tmp_path / "config"
    file.write_text("cluster-name: file\nmtu: 1400\nkvstore: etcd\nplugins:\n  embedded: {history: 5}\n")
    directory.mkdir()
    (directory / "cluster-name").write_text("directory\n")
    (directory / "mtu").write_text("1401\n")
    (directory / "..data").write_text("machinery of the mount")
    return file, directory


@pytest.mark.parametrize(
    ("flags", "environ", "use", "expected"),
    [
        ({"mtu": "1403"}, {"CILIATE_MTU": "1402"}, "both", (1403, "flag")),
        ({}, {"CILIATE_MTU": "1402"}, "both", (1402, "environment")),
        ({}, {}, "both", (1401, "directory")),
        ({}, {}, "file", (1400, "file")),
        ({}, {}, "none", (0, "default")),
    ],
)
def test_precedence(tmp_path: Path, flags: dict, environ: dict, use: str, expected: tuple[int, str]) -> None:
    file, directory = sources(tmp_path)
    result = load_config(flags, environ, directory if use == "both" else None, file if use != "none" else None)
    assert result.config.mtu == expected[0]
    assert result.origins["mtu"].startswith(expected[1])
    assert result.warnings == []


def test_all_wrong_values_are_told_at_once() -> None:
    flags = {
        "mtu": "70000",
        "enable-policy": "sometimes",
        "enable-ipv4": "perhaps",
        "ipv4-range": "fd00::/64",
        "identity-change-grace-period": "soon",
        "nodename": "x",
    }
    with pytest.raises(ConfigError) as caught:
        load_config(flags)
    assert {problem.field for problem in caught.value.problems} == set(flags)
    text = str(caught.value)
    for part in (
        *("mtu: '70000' given (from flag), expected a whole number from 0 to 65520", "did you mean node-name"),
        *("expected true or false", "5s, 1m30s", "expected one of default, always, never", "nodename: 'x' given"),
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "field", "expected"),
    [
        ({"node-name": "a/b"}, "node-name", "letters, digits"),
        ({"node-name": "x" * 254}, "node-name", "up to 253"),
        ({"cluster-name": ""}, "cluster-name", "expected a name"),
        ({"instance": "../x"}, "instance", "letters, digits"),
        ({"state-dir": "/a\0b"}, "state-dir", "control characters"),
        ({"mtu": "abc"}, "mtu", "a whole number from 0 to 65520"),
        ({"mtu": "9" * 5000}, "mtu", "a whole number"),
        ({"tunnel": "xx"}, "tunnel", "one of disabled, vxlan, geneve"),
        ({"kvstore-opt": '{"a"'}, "kvstore-opt", "a JSON object"),
        ({"kvstore-lease-ttl": "0"}, "kvstore-lease-ttl", "a duration like 5s or 1m30s from 1"),
        ({"kvstore-lease-ttl": "9" * 400}, "kvstore-lease-ttl", "at most 10 years"),
        ({"operator-api-serve-addr": "here"}, "operator-api-serve-addr", "ADDRESS:PORT"),
        ({"ipv4-range": "127.0.0.0/8"}, "ipv4-range", "not loopback"),
        ({"ipv6-range": "fe80::/64"}, "ipv6-range", "link-local"),
        ({"ipv4-range": "0.0.0.0/0"}, "ipv4-range", "everything"),
        ({"plugins": "x"}, "plugins", "a mapping of options"),
        ({"mtu": "1400", "m_tu": "1"}, "m_tu", "no such option"),
        ({"enable-ipv4": "true", "enable_ipv4": "false"}, "enable_ipv4", "enable-ipv4 is the same option"),
        ({"enable-ipv4": "false", "enable-ipv6": "false"}, "enable-ipv6", "one family"),
        ({"tunnel": "vxlan", "auto-direct-node-routes": "true"}, "auto-direct-node-routes", "tunnel is vxlan"),
        ({"socket-path": "/a", "cni-socket-path": "/a"}, "cni-socket-path", "another path"),
    ],
)
def test_a_wrong_value_names_its_option_and_what_was_expected(flags: dict[str, str], field: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(flags)
    assert [problem.field for problem in caught.value.problems] == [field]
    assert expected in caught.value.problems[0].expected


def test_options_that_change_while_the_agent_runs() -> None:
    config, mutable = load_config().config, ("enable_policy", "monitor_aggregation")
    assert changed(config, {"enable-policy": "always"}, mutable).enable_policy == "always"
    wrong = {"enable-policy": "always", "enable_policy": "never", "monitor-aggregation": 1, "mtu": 1400}
    with pytest.raises(ConfigError) as caught:
        changed(config, wrong, mutable)
    assert [problem.field for problem in caught.value.problems] == ["enable_policy", "mtu", "monitor-aggregation"]


def test_variables_that_are_nearly_options_warn() -> None:
    environ = {"CILIATE_CLUSTERNAME": "x", "CILIATE_CNI_SOCKET": "/x", "CILIATE_PORT_80_TCP": "tcp://10.0.0.1"}
    (warning,) = load_config({}, environ).warnings
    assert "did you mean CILIATE_CLUSTER_NAME" in warning


def test_unknown_keys_of_files_warn_with_the_closest(tmp_path: Path) -> None:
    file, directory = sources(tmp_path)
    (directory / "clustername").write_text("x")
    result = load_config({}, {}, directory, file)
    assert any("'clustername'" in warning and "cluster-name" in warning for warning in result.warnings)


def test_a_plugin_gets_its_own_section(tmp_path: Path) -> None:
    class Options(msgspec.Struct, forbid_unknown_fields=True):
        history: int = 7

    file, _ = sources(tmp_path)
    config = load_config({}, {}, None, file).config
    assert config.plugin_options("embedded", Options).history == 5
    assert config.plugin_options("other", Options).history == 7
    file.write_text("plugins: {embedded: {histroy: 5}}")
    with pytest.raises(ConfigError, match=r"plugins\.embedded"):
        load_config({}, {}, None, file).config.plugin_options("embedded", Options)


@pytest.mark.parametrize(
    "content", ["[1]", "{", "a: [", "1: x", "mtu: 1\nmtu: 2", "mtu: 1\n---\nmtu: 2", "mtu: \xff\0"]
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "ciliate.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match="config"):
        load_config({}, {}, None, file)


def test_every_field_is_documented() -> None:
    result = load_config()
    docs = documentation()
    assert set(docs) == set(result.origins)
    assert all(doc.text and doc.reader for doc in docs.values())


@pytest.mark.parametrize(
    ("text", "seconds"), [("5s", 5), ("1m30s", 90), ("12h", 43200), ("250ms", 0.25), ("3", 3), (7, 7), ("0", 0)]
)
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "five", "5 apples", "-3s", "s5", "²s", None, True, float("nan"), float("inf")])
def test_no_durations(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration"):
        parse_duration(text)


def test_arguments() -> None:
    flags, file, directory = parse_arguments(["--mtu=1400", "--debug", "--config", "/a", "--config-dir=/b"])
    assert (flags, file, directory) == ({"mtu": "1400", "debug": "true"}, Path("/a"), Path("/b"))
    with pytest.raises(UsageError, match="'mtu'"):
        parse_arguments(["mtu"])
    with pytest.raises(UsageError, match="--config: expected a path"):
        parse_arguments(["--config", "--mtu=1"])


def test_open_files_are_as_many_as_may_be() -> None:
    before = soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), most))
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_document_has_the_table_of_every_option() -> None:
    from click.testing import CliRunner

    from ciliate.cli.config import command

    table = CliRunner().invoke(command, ["describe", "-o", "markdown"], catch_exceptions=False).output
    document = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
    assert document.endswith(table), "write it anew: ciliate config describe -o markdown"


def test_every_option_with_a_choice_tells_its_values() -> None:
    choices = 0
    for field, hint in get_type_hints(AgentConfig).items():
        if get_origin(hint) is not Literal or len(get_args(hint)) < 2:
            continue
        choices += 1
        assert documentation()[field].text.endswith(f"; one of {', '.join(get_args(hint))}"), field
    assert choices > 5
