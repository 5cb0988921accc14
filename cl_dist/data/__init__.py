"""Tasks and their rows: settings, sources, checks, splits, encoding and sampling."""
