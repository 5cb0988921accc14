"""Stored files: their contents and integrity."""
