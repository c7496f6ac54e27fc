"""The distillation methods and the losses of their terms."""
