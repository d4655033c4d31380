"""Datapath loader providers."""
