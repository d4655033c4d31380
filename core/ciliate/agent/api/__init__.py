"""The agent's REST API on a UNIX socket: one module per subject; errors are problem documents."""
