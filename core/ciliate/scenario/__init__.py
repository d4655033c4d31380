"""Scenario files: a cluster in manifests, and the flows that must be allowed or denied in it (DESIGN section 6)."""
