"""Distributed continual learning of transformer language models."""

__version__ = "0.1.0"
