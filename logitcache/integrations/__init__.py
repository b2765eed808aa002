"""Distillation from a cache in the training loops of other libraries.

Each module needs its library, and is imported by name, such as `logitcache.integrations.huggingface`.
"""
