"""Starter files that `logitcache init` copies."""
