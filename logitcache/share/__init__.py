"""Copies caches to object stores and back."""
