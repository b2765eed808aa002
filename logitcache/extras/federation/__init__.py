"""Federated distillation: parties exchange logits on a public dataset, never data or weights."""
