"""Duties that one instance does for the whole cluster."""
