"""Services on disk: what was committed comes back, half of something never does, damage is named."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from ciliate.atomicfile import DamagedError, SchemaError
from ciliate.service.model import BackendSpec, FrontendSpec, ServiceSpec
from ciliate.service.store import ServiceStore
from ciliate.service.table import Change, ServiceTable


def spec(port: int, *backends: str) -> ServiceSpec:
    items = [BackendSpec(ip, 8080) for ip in backends]
    return ServiceSpec(
        frontend_address=FrontendSpec("10.96.0.1", port),
        backend_addresses=items,
        source_ranges=["10.0.0.0/8"],
        name="s",
    )


def commit(store: ServiceStore, table: ServiceTable, change: Change) -> None:
    store.commit(change, (table.ids.next, table.backend_ids.next))


def test_what_was_committed_comes_back_with_its_numbers(tmp_path: Path) -> None:
    store, table = ServiceStore(tmp_path / "s.db"), ServiceTable()
    commit(store, table, table.plan([spec(80, "10.0.0.1", "10.0.0.2"), spec(81, "10.0.0.2")])[0])
    commit(store, table, table.plan([spec(80, "10.0.0.2", "10.0.0.3")], [2])[0])
    store.keep_objects({"Service/default/a": {"kind": "Service"}, "Service/default/b": {}}, ())
    store.keep_objects({}, ["Service/default/b"])
    store.checkpoint()
    store.close()
    again = ServiceTable()
    store = ServiceStore(tmp_path / "s.db")
    again.restore(*store.load())
    assert store.objects() == [{"kind": "Service"}]
    store.close()
    assert again.records == table.records
    assert again.backends == table.backends
    assert (again.ids.next, again.backend_ids.next) == (3, 4)
    assert again.spec(again.get(1)) == table.spec(table.get(1))


def test_a_failed_commit_leaves_nothing(tmp_path: Path) -> None:
    store, table = ServiceStore(tmp_path / "s.db"), ServiceTable()
    change, _ = table.plan([spec(80, "10.0.0.1")])
    broken = change._replace(backends={1: object()})  # type: ignore[dict-item]
    with pytest.raises(sqlite3.Error):
        commit(store, table, broken)
    assert store.load() == ([], {}, (1, 1))
    commit(store, table, change)
    assert len(store.load()[0]) == 1
    store.close()


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "s.db"
    path.write_bytes(b"this is no database" * 100)
    with pytest.raises(DamagedError, match=r"s\.db: cannot be read"):
        ServiceStore(path)


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE service SET record = x'c1'", "service 1"),
        ("DELETE FROM backend", r"backends \[1\] are missing"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, statement: str, words: str) -> None:
    store, table = ServiceStore(tmp_path / "s.db"), ServiceTable()
    commit(store, table, table.plan([spec(80, "10.0.0.1")])[0])
    store.close()
    with sqlite3.connect(tmp_path / "s.db") as raw:
        raw.execute(statement)
    raw.close()
    store = ServiceStore(tmp_path / "s.db")
    with pytest.raises(DamagedError, match=words):
        store.load()
    store.close()


def test_another_versions_file_is_refused(tmp_path: Path) -> None:
    ServiceStore(tmp_path / "s.db").close()
    with sqlite3.connect(tmp_path / "s.db") as raw:
        raw.execute("UPDATE meta SET value = 99 WHERE name = 'schema'")
    raw.close()
    with pytest.raises(SchemaError, match="schema 99"):
        ServiceStore(tmp_path / "s.db")
