"""What a model is worth: held-out loss, answers and their figures, cost."""
