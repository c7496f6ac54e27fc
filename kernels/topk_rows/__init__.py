"""The row primitive of teachers known by their top, in Triton: what csrc/cpu/topk_rows.cpp is for CPUs.

Its contract is fastkd/ops/drivers/topk_rows.py. One program takes one row, of which K columns, and the label's, are set
aside; the others are the rest. Two passes go over the row in blocks of columns:

- the first makes the rest's maximum and sum of exponentials, every thread of its own columns: an element costs one
  exponential, a sum and a comparison, and the row one reduction. Which columns are set aside is asked only in blocks
  that have some, of a histogram of their ids: no search per element, and nothing that must be subtracted again;
- the second writes one factor times each exponential in every column, and after that what is set aside over it.

Between them the K + 1 categories, few beside the row, are computed with in fp64, where a tail of mass 1e-12 keeps its
digits: no sum of all columns is ever taken that a tail would be a small part of. A row is read twice, the second time
mostly from the second-level cache, and written once.

R rows, V columns, K ids. stats [R, 3]: the rest's maximum, and its sums at the temperature and, for labels, at 1.
"""

from .host import topk_rows, topk_shard_gradient, topk_shard_stats

__all__ = ["topk_rows", "topk_shard_gradient", "topk_shard_stats"]
