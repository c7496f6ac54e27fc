"""What fastkd-train does: train, prune, demo."""
