"""Whether nodes reach each other: an endpoint of each node's own, probes by ICMP and HTTP, and what they found."""

PORT = 4240
"""Where nodes and their health endpoints answer (inventory 4.2)."""
