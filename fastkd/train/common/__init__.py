"""What every room may use: errors, caches, what processes do together, what a T5 is made of."""
