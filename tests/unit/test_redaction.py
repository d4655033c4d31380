"""Whatever form a secret is given in, nothing that is shown or logged of the options has it. Tier unit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from ciliate.agent.daemon import Agent
from ciliate.cli.main import main
from ciliate.config import AgentConfig, ConfigError, load_config
from ciliate.daemonize import UsageError, parse_arguments
from ciliate.plugin import PluginManager
from ciliate.redaction import hide_secrets
from ciliate_kvstore.etcdv3.settings import Options, settings_of

SECRET = ("hun", "ter2")
"""Both halves; what parts them is what texts of options part at."""
FORMS = {
    "json": '{"etcd.password":"hun,ter2"}',
    "json with spaces": '{ "etcd.qps" : 5, "etcd.password" : "hun,ter2" }',
    "json with a quote": json.dumps({"etcd.password": 'hun"ter2'}),
    "json escaped": '{"etcd.pass\\u0077ord":"hun,ter2"}',
    "json nested": '{"etcd.auth": {"password": "hun,ter2"}}',
    "json list": '{"etcd.passwords": ["hun", "ter2"]}',
    "json cut off": '{"etcd.password":"hun,ter2"',
    "json of another kind": '[{"password":"hun,ter2"}]',
    "pairs": "etcd.password=hunter2,etcd.qps=5",
    "pairs with a comma": "etcd.qps=5,etcd.password=hun,ter2",
    "pairs with an equals sign": "etcd.password=hun=ter2,etcd.qps=x",
    "pairs with both": "etcd.password=hun,ter2=x,etcd.qps=5",
    "pairs with spaces": "etcd.qps=5, etcd.password = hun ter2",
    "pairs in capitals": "ETCD.PASSWORD=hun,ter2",
    "pairs with a typing error": "etcd.pasword=hun,ter2",
    "pairs without a provider": "password=hun,ter2",
    "another secret": "vault.secret_token=hun,ter2",
}


def leaks(text: Any) -> list[str]:
    return [part for part in SECRET if part in str(text)]


def refused(**options: Any) -> str:
    """What an agent says that does not start, or nothing."""
    try:
        load_config({key.replace("_", "-"): value for key, value in options.items()}, {})
    except ConfigError as error:
        return f"{error} {[msgspec.to_builtins(item) for item in error.problems]}"
    return ""


def test_no_form_is_shown(tmp_path: Path) -> None:
    shown = []
    for name, text in FORMS.items():
        agent = Agent(AgentConfig(state_dir=str(tmp_path), kvstore_opt=text), PluginManager.load())
        shown += [name for part in (agent.configuration(), hide_secrets({"kvstore_opt": text})) if leaks(part)]
    assert shown == []


def test_errors_quote_no_secret(tmp_path: Path) -> None:
    said = []
    for name, text in FORMS.items():
        said += [name for part in (refused(kvstore_opt=text), refused(kvstore_opts=text)) if leaks(part)]
        with pytest.raises(UsageError) as wrong:
            parse_arguments([f"kvstore-opt={text}"])
        said += [name] if leaks(wrong.value) else []
        try:
            settings_of(AgentConfig(kvstore_opt=text).plugin_options("etcd", Options))
        except (ConfigError, ValueError) as error:
            said += [name] if leaks(error) else []
    assert said == []


@pytest.mark.parametrize(
    "section",
    [
        {"password": "hunter2", "qps": "fast"},
        {"password": ["hun", "ter2"]},
        {"pasword": "hunter2", "qps": "fast"},
        {"address": ["x"], "username": "u", "password": "hunter2", "timeout": {}},
    ],
)
def test_errors_of_a_plugins_section_quote_no_secret(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        settings_of(AgentConfig(plugins={"etcd": section}).plugin_options("etcd", Options))
    assert "plugins.etcd" in str(error.value)
    assert not leaks(error.value) and not leaks(error.value.problems)


def test_errors_of_a_clients_file_quote_no_secret(tmp_path: Path) -> None:
    file = tmp_path / "etcd.yaml"
    file.write_text('username: u\npassword: "hun\\ter2 "x\n')
    with pytest.raises(ConfigError) as error:
        settings_of(Options(config=str(file)))
    assert "etcd.yaml" in str(error.value) and not leaks(error.value)


def test_commands_show_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ciliate.interrupts.watch", lambda: None)
    said = []
    for name, text in FORMS.items():
        monkeypatch.setattr("sys.argv", ["ciliate", "config", "show", "--set", f"kvstore-opt={text}", "-o", "json"])
        with pytest.raises(SystemExit):
            main()
        found = capsys.readouterr()
        said += [name] if leaks(found.out + found.err) else []
    assert said == []


def test_what_is_no_secret_is_shown() -> None:
    plain = {
        "kvstore_opt": "etcd.address=10.0.0.1:2379,etcd.key_file=/etc/key.pem,etcd.qps=5",
        "plugins": {"etcd": {"address": ["a:1"], "key_file": "/k", "password_file": "/p"}},
        "labels": "k8s:app=a",
        "enable_policy": "default",
    }
    assert hide_secrets(plain) == plain
    assert hide_secrets({"kvstore_opt": "etcd.password=x,etcd.qps=5"}) == {
        "kvstore_opt": "etcd.password=(hidden),etcd.qps=5"
    }
    assert "etcd.qps" in str(hide_secrets({"kvstore_opt": '{"etcd.password": "x", "etcd.qps": 5}'}))
