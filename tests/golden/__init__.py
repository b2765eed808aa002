"""Caches of every format version, kept as they were written."""
