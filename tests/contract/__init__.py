"""What every implementation of a protocol keeps, and what caches promise."""
