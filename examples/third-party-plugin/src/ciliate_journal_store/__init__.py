"""Store `journal`: one file of JSON lines; a write is appended and synced before it is acknowledged."""

from ciliate.plugin import KvstoreProvider, hookimpl


@hookimpl
def ciliate_register_kvstore():
    """One provider; what is heavy is imported when it is chosen."""

    def create(context):
        from ciliate_journal_store.journal import JournalStore

        return JournalStore(context.state_dir / "kvstore.jsonl")

    return KvstoreProvider(name="journal", summary="A file of JSON lines; one process at a time", factory=create)
