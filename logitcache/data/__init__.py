"""Samples, transforms and views: the same pixels for everyone who asks, in an order that the seed gives."""
