"""Datasets, teachers and students by name."""
