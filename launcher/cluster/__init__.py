"""Runs on clusters: manifests, jobs, preflight checks."""
