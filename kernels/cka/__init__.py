"""cka_loss in Triton, for GPUs: all pairs of layers in one launch of each kernel, and nothing centred in memory.

With B the teacher's and A the student's hidden states less their means, the products that the loss and its gradient
are made of are tiles of one symmetric matrix, (B|A)^T (B|A): see fastkd/ops/cka_loss.py, which has the mathematics.
With fewer tokens than Ds + Dt its other form is cheaper, which fastkd/ops/drivers/cka_loss_gpu.py leaves to torch.

- `means_kernel` takes means from the first valid token on, so that an offset costs nothing.
- `covariance_kernel` owns a tile of the upper half of (B|A)^T (B|A) and goes through the tokens. Rows are centred
  between memory and the tensor cores. A tile of B^T B ends as one number, its sum of squares; one of (B|A)^T A is also
  stored, where a gradient is wanted.
- `loss_kernel` adds those numbers up, and turns what was stored into the factor of the gradient.
- `gradient_kernel` is the GEMM of centred rows with that factor.

No program adds to what another wrote, and sums are taken in one order: results do not depend on scheduling. How many
tokens are valid stays on the device.

Sums of squares are fp32 in a row of a tile and fp64 beyond: near convergence the loss is what two norms differ by.
Hidden states of 16 bits are centred in fp32 and rounded once for the tensor cores, the factor too. From that of hidden
states before they were 16 bits, the gradient is then at most 1.8 times as far as the one of fp32 arithmetic on the same
inputs, and with an offset of 50 standard deviations, which costs those most, as far.

The floor of a pair, with W = Ds + Dt: N W (W + 1) FLOPs forward and 2 N W Ds backward. Memory has to be read twice
(means, products) and once more for the gradient, 2 N W + N W + N Ds numbers in all: at W 1280 and 16 bits that is 320
FLOPs a byte forward, which the tensor cores bound. By tiles, a pair of n blocks of columns computes n (n + 1) / 2 of
n^2 tiles.

N tokens, Ds and Dt widths. Neither is a constant of the kernels.
"""

from .host import cka_loss, cka_loss_backward_

__all__ = ["cka_loss", "cka_loss_backward_"]
