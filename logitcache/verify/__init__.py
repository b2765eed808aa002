"""Whether a cache is intact, whether it matches the data, views and teacher, and how blocks are repaired."""
