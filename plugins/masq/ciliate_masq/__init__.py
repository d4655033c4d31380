"""Masquerade providers."""
