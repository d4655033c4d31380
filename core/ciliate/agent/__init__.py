"""The agent: composition root, REST API, duties of one node."""
