"""Datasets and models by name."""
