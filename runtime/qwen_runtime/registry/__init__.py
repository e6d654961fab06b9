"""Artifacts in an OCI registry: one layer for each file, pulled by tag or by digest."""
