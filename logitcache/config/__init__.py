"""Reads pipeline files, and builds what they describe."""
