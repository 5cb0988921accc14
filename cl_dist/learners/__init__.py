"""Learners: the part of a method that runs in a worker, in torch."""
