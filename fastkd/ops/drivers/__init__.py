"""How the ops are computed: the row primitive that they share, and what is long of an op's way on a device."""
