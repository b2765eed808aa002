"""Beside the core: each is used by name from a pipeline or the command line, and the core imports none of it."""
