"""Parties that share neither data nor weights learn from each other's logits on a public set, in rounds."""
