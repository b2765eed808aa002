"""Train from a cache in the training loops of other tools."""
