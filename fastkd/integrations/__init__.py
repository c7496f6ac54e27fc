"""fastkd's losses where people already train: a module for each package, which nothing else in fastkd imports."""
