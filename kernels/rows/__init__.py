"""The row primitive in Triton, for GPUs: what csrc/cpu/divergence_rows.cpp is for CPUs, with the same arguments.

One program takes one row, in blocks of columns: once for the running maxima and sums of exponentials (online softmax of
both models at once), once more for the divergences that need normalised probabilities, and once for the gradient. The
fused kernel makes all passes one after the other, so that the later ones find the row in the second-level cache.

The mathematics is that of csrc/divergence.h, whose comments derive it; functions have its names and order. Every thread
sums up columns of its own in the working precision, and the row adds up the threads' sums in fp64. A row whose models
nearly agree is read once more, with care: the student's sum is then the teacher's plus the summed difference, and a
divergence is summed up as p log(p / q) + q - p, which is small of second order like the divergence itself. The q - p in
it cancels when the row is complete, and its rounding error with it.

Rows may be shards of longer ones, whose other columns are on other GPUs. fastkd/ops/drivers/divergence_rows.py says
what is computed of which arguments. Number of columns and strides are run-time arguments; the block size follows the
vocabulary and the dtype. Nothing waits for the device.
"""

from .host import divergence_rows

__all__ = ["divergence_rows"]
