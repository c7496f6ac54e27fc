"""What a run leaves to read: metrics.json, report, comparison, model card."""
