"""Pruning of teachers, and rounds of distillation with assistants (MiniDisc)."""
