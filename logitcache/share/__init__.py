"""Caches leave: to object stores and back, and to Parquet."""
