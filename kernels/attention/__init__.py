"""attention_kl and relation_kl in Triton, for GPUs: no [Lq, Lk] tensor of scores in device memory.

One program takes a block of one head's queries and goes through the keys in tiles (Dao et al., FlashAttention, 2022),
with the running softmax statistics of both models side by side. That is the forward pass; it leaves seven numbers a
row. The others recompute a tile of scores from them and have its gradient G = coefficient * dD/ds at once:

- Of relation_kl, `gradient_kernel` owns a block of queries, which are keys, too. S is symmetric, so that one pass over
  S_ij yields both G_ij and G_ji for the block's (G + G^T) x. Of forward_kl both come of the same two exponentials, by
  factors of rows that `factors_kernel` makes of the statistics.
- Of attention_kl, `scores_kernel` writes G of some heads or queries into a bounded workspace. Torch multiplies it by
  keys and queries (products.py) and sums it over what a bias is broadcast along; `diagonals_kernel` sums it along
  diagonals, for T5's bias of the distance between key and query.

No program adds to what another wrote: results do not depend on scheduling. relation_kl takes the relations of a layer
(Q, K, V) as entries of one launch.

The mathematics is that of csrc/divergence.h. Unlike there, scores are no inputs but results of fp32 arithmetic, whose
rounding outweighs what compensated sums would save. What remains of the care is that q - p is computed from
log(p / q), and that log(p / q) gets back what rounding took from the logarithms of the sums.

B batch, A heads, Lq queries, Lk keys, H = A d hidden. What varies from batch to batch is a run-time argument. Keys may
have fewer heads, each for a GROUP of neighbouring heads of queries: programs go by the queries' heads.
"""

from .host import attention_kl, relation_kl

__all__ = ["attention_kl", "relation_kl"]
