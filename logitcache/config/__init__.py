"""A pipeline file in, built objects out."""
