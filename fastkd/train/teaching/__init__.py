"""What a teacher said of the training data, on disk: it runs once, and every later epoch and student reads."""
