"""Trains one model, or several together; runs are exactly resumable."""
