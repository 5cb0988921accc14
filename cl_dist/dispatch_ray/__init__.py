"""Stages on a Ray cluster; the only package of the library that imports Ray."""
