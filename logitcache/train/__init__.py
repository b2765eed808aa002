"""Training one net, or several together, exactly resumable; and what a run leaves behind."""
