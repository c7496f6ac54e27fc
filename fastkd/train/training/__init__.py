"""The trainer: forward passes and losses, checkpoints, signals, what it shows."""
