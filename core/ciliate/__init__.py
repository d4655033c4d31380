"""Ciliate: container networking, identity-based policy and load balancing with eBPF."""

__version__ = "0.1.0"
