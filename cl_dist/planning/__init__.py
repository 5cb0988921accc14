"""Estimates of memory, disk and time before a run starts."""
