"""A cache: what it is (manifest), where things lie (layout), how it is written, and how it is read."""
