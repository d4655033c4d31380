"""Services: what clients speak to, the backends behind it, and how the kernel learns of both (docs/services.md)."""
