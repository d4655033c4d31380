"""Endpoints: pods as the node sees them, with their life cycle."""
