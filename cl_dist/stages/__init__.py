"""Worker side of each stage kind: plain torch, no Ray."""
