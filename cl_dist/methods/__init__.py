"""The methods: settings, plans and capabilities; no module here imports torch."""

from cl_dist.methods.registry import METHODS, capabilities_of, get_method, installed, method_config

__all__ = ["METHODS", "capabilities_of", "get_method", "installed", "method_config"]
