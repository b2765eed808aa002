"""Samples, transforms and views: the same pixels on every machine, in an order that the seed determines."""
