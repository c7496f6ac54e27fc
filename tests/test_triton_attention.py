"""The Triton kernels of attention_kl and relation_kl: on a GPU where there is one, else in Triton's interpreter.

The contract test runs them behind the public functions. Here they are called directly and compared with plain torch in
float64, on what is particular to them: tiles and their edges, masks, biases, dtypes, lists, strides, rows left out.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from torch import Tensor

from fastkd.divergence import DIVERGENCES, divergence_code

from .cases import DEVICE, INF, NAN, distance, interpreted, over_divergences

pytest.importorskip("triton", reason="Triton is not installed")
kernels = importlib.import_module("fastkd.kernels.attention")  # ours: a failure to import it is a failure
host = importlib.import_module("fastkd.kernels.attention.host")

# Relative Frobenius error of a gradient. Of 16-bit inputs, the gradient of a score is rounded before it meets q and k,
# and their sum once more.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

pytestmark = interpreted


# ---- the oracle ------------------------------------------------------------------------------------------------------


def bias_matrix(bias: Tensor, queries: int, keys: int) -> Tensor:
    """What is added to scores [B, A, Lq, Lk]."""
    if bias.dim() == 4:
        return bias
    reach = bias.shape[1] // 2
    distance_ = torch.arange(keys) - torch.arange(queries)[:, None]
    return bias[:, distance_.clamp(-reach, reach) + reach]


def allowed(shape: torch.Size, key_mask: Tensor | None, causal: bool) -> Tensor:
    """Which keys each row may look at: [B, A, Lq, Lk]."""
    keys = torch.ones(shape, dtype=torch.bool)
    if key_mask is not None:
        keys = keys & key_mask[:, None, None, :]
    return keys.tril() if causal else keys


def log_probabilities(q, k, bias, key_mask, causal, num_heads, scale, rows) -> Tensor:
    """[B, A, Lq, Lk], of rows that count; the others are uniform."""
    q, k = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k))
    scores = scale * q @ k.transpose(2, 3)
    if bias is not None:
        scores = scores + bias_matrix(bias, *scores.shape[2:])
    scores = scores.masked_fill(~allowed(scores.shape, key_mask, causal), -INF)
    return scores.masked_fill(~rows[..., None], 0).log_softmax(-1)


def oracle(
    student_q, student_k, teacher_q, teacher_k, student_bias, teacher_bias, coefficient, key_mask, causal, num_heads,
    student_scale, teacher_scale, divergence, beta=0.3, dtype=torch.float64,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """(loss, gradients of student_q, student_k and, if given, student_bias) by autograd."""
    if student_k is student_q:
        student_k, teacher_k = student_q.clone(), teacher_q.clone()
    q, k, teacher_q, teacher_k = (x.to(dtype, copy=True) for x in (student_q, student_k, teacher_q, teacher_k))
    rows = coefficient != 0
    for x in (q, teacher_q):
        x[~rows.any(1)] = 0  # what they hold counts for nothing
    for x in (k, teacher_k):
        if key_mask is not None:
            x[~key_mask] = 0
    biases = [None if bias is None else bias.to(dtype) for bias in (student_bias, teacher_bias)]
    leaves = [x.requires_grad_() for x in (q, k, biases[0]) if x is not None]
    masks = key_mask, causal, num_heads
    log_q = log_probabilities(q, k, biases[0], *masks, student_scale, rows)
    log_p = log_probabilities(teacher_q, teacher_k, biases[1], *masks, teacher_scale, rows)
    loss = coefficient.to(dtype) * DIVERGENCES[divergence](log_p, log_q, beta)
    return loss.detach(), list(torch.autograd.grad(loss.sum(), leaves))


# ---- calls -----------------------------------------------------------------------------------------------------------


def moved(x):
    """To the device, with its strides."""
    if not isinstance(x, Tensor) or x.device == DEVICE:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=DEVICE).copy_(x)


def run(arguments: tuple, divergence: str, wanted=None, beta=0.3) -> tuple[Tensor, list[Tensor]]:
    """(loss, the gradients that the oracle gives) by the kernels."""
    wanted = wanted or [True, True, arguments[4] is not None]
    code = divergence_code(divergence)
    loss, *gradients = kernels.attention_kl(*map(moved, arguments), wanted, code, beta)
    assert loss.dtype == torch.float64
    assert [g.numel() > 0 for g in gradients] == wanted
    return loss.cpu(), [g.cpu() for g, is_wanted in zip(gradients, wanted, strict=True) if is_wanted]


def run_relations(students, teachers, coefficients, masks, causal, num_heads, divergence, beta=0.3):
    lists = [[moved(x) for x in xs] for xs in (students, teachers, coefficients, masks)]
    wanted = [True] * len(students)
    losses, gradients = kernels.relation_kl(*lists, causal, num_heads, wanted, divergence_code(divergence), beta)
    return [x.cpu() for x in losses], [x.cpu() for x in gradients]


def relation_oracle(student, teacher, coefficient, mask, causal, num_heads, divergence, **options):
    scales = [(x.shape[-1] // num_heads) ** -0.5 for x in (student, teacher)]
    arguments = student, student, teacher, teacher, None, None, coefficient, mask, causal, num_heads, *scales
    loss, (as_query, as_key) = oracle(*arguments, divergence, **options)
    return loss, as_query + as_key


def over_half(parity: int) -> pytest.MarkDecorator:
    """Every divergence, causal or not: what one test of a kernel leaves out another has."""
    half = [(name, (i + parity) % 2 == 1) for i, name in enumerate(DIVERGENCES)]
    return pytest.mark.parametrize(("divergence", "causal"), [*half, ("forward_kl", parity == 0)])


def check(got, wanted, tolerance=TOLERANCE[torch.float32], loss=1e-6) -> None:
    assert distance(got[0], wanted[0]) <= loss
    for mine, true in zip(got[1], wanted[1], strict=True):
        assert distance(mine, true) <= tolerance


def make(
    batch=1, queries=37, keys=70, num_heads=1, widths=(12, 24), deviation=2.0, near=None, causal=False, bias=None,
    masked=True, dtype=torch.float32,
) -> tuple:  # fmt: skip
    """attention_kl's arguments up to the scales. Scores have the deviation; `near` is the student's distance."""
    widths = widths if near is None else (widths[0], widths[0])
    keys = queries if causal else keys
    student, teacher = (
        [torch.randn(batch, length, num_heads * width, dtype=torch.float64) for length in (queries, keys)]
        for width in widths
    )
    if near is not None:  # scores of deviation `near` around the teacher's
        student = [teacher[0], teacher[1] + near / deviation * student[1]]
    biases = [None, None]
    if bias == "diagonals":
        biases = [torch.randn(num_heads, 19), torch.randn(num_heads, 5)]
    elif bias is not None:
        full = batch, num_heads, queries, keys
        biases = [torch.randn([n if full_size else 1 for n, full_size in zip(full, bias, strict=True)]), None]
    coefficient = torch.rand(batch, num_heads, queries, dtype=torch.float64) / queries
    coefficient[:1, :, 3] = 0
    key_mask = None
    if masked:
        key_mask = torch.rand(batch, keys) < 0.6
        key_mask[:, 0] = True
    scales = [deviation * width**-0.5 for width in widths]
    tensors = [x.to(dtype) if x is not None else None for x in (*student, *teacher, *biases)]
    return (*tensors, coefficient, key_mask, causal, num_heads, *scales)


# ---- values ----------------------------------------------------------------------------------------------------------


@over_half(0)
def test_attention(divergence: str, causal: bool):
    arguments = make(num_heads=2, causal=causal, bias="diagonals")
    check(run(arguments, divergence), oracle(*arguments, divergence))


def test_scales_may_be_negative_or_zero():
    arguments = *make()[:-2], -0.5, 0.0
    check(run(arguments, "reverse_kl"), oracle(*arguments, "reverse_kl"))


@over_half(0)
def test_relation(divergence: str, causal: bool):
    student, teacher, coefficient = torch.randn(1, 75, 12), torch.randn(1, 75, 24), torch.rand(1, 1, 75).double()
    wanted = relation_oracle(student, teacher, coefficient, None, causal, 1, divergence)
    (loss,), (gradient,) = run_relations([student], [teacher], [coefficient], [None], [causal], 1, divergence)
    check((loss, [gradient]), (wanted[0], [wanted[1]]))


@pytest.mark.parametrize("divergence", ["forward_kl", "tvd"])
@pytest.mark.parametrize("causal", [False, True])
def test_relations_of_unequal_length(divergence: str, causal: bool):
    """Four are more than a launch takes, and one of them has no mask and so needs a launch of its own."""
    lengths, num_heads = (37, 50, 20, 5), 2
    students, teachers = ([torch.randn(2, n, num_heads * d) for n in lengths] for d in (12, 24))
    coefficients = [torch.rand(2, num_heads, n).double() for n in lengths]
    masks = [torch.rand(2, n) < 0.6 for n in lengths]
    for mask in masks:
        mask[:, 0] = True
    masks[2] = None
    arguments = students, teachers, coefficients, masks, [causal] * 4
    losses, gradients = run_relations(*arguments, num_heads, divergence)
    for loss, gradient, *one in zip(losses, gradients, *arguments, strict=True):
        wanted = relation_oracle(*one, num_heads, divergence)
        check((loss, [gradient]), (wanted[0], [wanted[1]]))


def test_relations_that_differ_in_everything():
    """Widths, causality and what is wanted are settled by launch."""
    widths, causal, num_heads = [(12, 24), (16, 16), (12, 24)], [False, True, True], 2
    students = [torch.randn(1, 20, num_heads * d) for d, _ in widths]
    teachers = [torch.randn(1, 20, num_heads * d) for _, d in widths]
    coefficients = [torch.rand(1, num_heads, 20).double() for _ in widths]
    lists = [[moved(x) for x in xs] for xs in (students, teachers, coefficients)]
    losses, gradients = kernels.relation_kl(*lists, [None] * 3, causal, num_heads, [True, True, False], 0, 0.5)
    assert gradients[2].numel() == 0
    for i in range(3):
        one = students[i], teachers[i], coefficients[i], None, causal[i]
        wanted = relation_oracle(*one, num_heads, "forward_kl", beta=0.5)
        assert distance(losses[i], wanted[0]) <= 1e-6
        assert i == 2 or distance(gradients[i], wanted[1]) <= 2e-5


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_every_dtype(dtype: torch.dtype, divergence: str):
    arguments = make(queries=20, keys=41, dtype=dtype, bias="diagonals")
    got = run(arguments, divergence)
    expected = torch.float32 if dtype == torch.float16 else dtype
    assert all(g.dtype == expected for g in got[1])
    check(got, oracle(*arguments, divergence), TOLERANCE[dtype], 1e-13 if dtype == torch.float64 else 1e-6)


@pytest.mark.parametrize("student, teacher", [("float64", "bfloat16"), ("float32", "float64"), ("bfloat16", "float32")])
def test_teachers_of_another_dtype(student: str, teacher: str):
    dtypes = getattr(torch, student), getattr(torch, teacher)
    sq, sk, tq, tk, *rest = make()
    arguments = *(x.to(dtypes[0]) for x in (sq, sk)), *(x.to(dtypes[1]) for x in (tq, tk)), *rest
    if teacher == "float64":  # as precise as the scores, which are the student's
        arguments = *arguments[:2], *(x.float().double() for x in arguments[2:4]), *rest
    check(run(arguments, "forward_kl"), oracle(*arguments, "forward_kl"), TOLERANCE[dtypes[0]])


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "skew_kl"])
@pytest.mark.parametrize("keys, deviation", [(97, 5.0), (97, 30.0), (507, 30.0)])
def test_scores_of_large_deviation(divergence: str, keys: int, deviation: float):
    arguments = make(queries=23, keys=keys, deviation=deviation)
    check(run(arguments, divergence), oracle(*arguments, divergence), loss=2e-6)


@over_divergences
@pytest.mark.parametrize("deviation", [1.0, 5.0])
def test_near_converged(divergence: str, deviation: float):
    """Rounded scores are all that sets a limit: fp32 autograd, which has the same, is at most half as far off."""
    arguments = make(queries=37, keys=203, deviation=deviation, near=1e-3)
    if divergence == "tvd":  # its slope jumps where p = q: rows where rounding picks the side of a key are left out
        q, k, teacher_q, teacher_k, _, _, coefficient, mask, _, _, *scales = (
            x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in arguments
        )
        log_q, log_p = (
            log_probabilities(*qk, None, mask, False, 1, scale, coefficient != 0)
            for *qk, scale in ((q, k, scales[0]), (teacher_q, teacher_k, scales[1]))
        )
        coefficient = coefficient.masked_fill(((log_p - log_q).abs() < 2e-6 * deviation).any(-1), 0)
        assert (coefficient != 0).sum() > 8
        arguments = *arguments[:6], coefficient, *arguments[7:]
    got, wanted = run(arguments, divergence), oracle(*arguments, divergence)
    plain = oracle(*arguments, divergence, dtype=torch.float32)
    assert distance(got[0], wanted[0]) <= 2 * distance(plain[0], wanted[0])
    for mine, torchs, true in zip(got[1], plain[1], wanted[1], strict=True):
        least = 1e-6 if divergence == "tvd" else 0  # its slope is a constant times q
        assert distance(mine, true) <= max(2 * distance(torchs, true), least)


@pytest.mark.parametrize("near", [0.1, 0.3])
def test_near_converged_relations(near: float):
    """Of rows with nearly all at one key the gradient is a small part of what scores differ by."""
    teacher = 3 * torch.randn(1, 130, 24)
    student = teacher + near * torch.randn_like(teacher)
    arguments = student, teacher, torch.rand(1, 1, 130).double(), None, False, 1, "forward_kl"
    _, (gradient,) = run_relations(*[[x] for x in arguments[:5]], *arguments[5:])
    wanted, plain = relation_oracle(*arguments)[1], relation_oracle(*arguments, dtype=torch.float32)[1]
    assert distance(gradient, wanted) <= 2 * distance(plain, wanted)


# ---- relations by one exponential of each score, if they are of 16 bits ----------------------------------------------

over_paths = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@over_paths
@pytest.mark.parametrize("near", [1e-3, 1.0])
def test_relations_of_short_and_long_rows(near: float, dtype: torch.dtype):
    """Scores of rows some of which are out of reach of one reference for exponentials, in one tile or all of it."""
    teacher = torch.randn(1, 200, 16, dtype=torch.float64)
    teacher[:, [5, 150]] *= 6
    teacher[:, 64:96] *= 0.1
    student = (teacher + near * torch.randn_like(teacher)).to(dtype)
    arguments = student, teacher.to(dtype), torch.rand(1, 1, 200).double(), None, False, 1, "forward_kl"
    (loss,), (gradient,) = run_relations(*[[x] for x in arguments[:5]], *arguments[5:])
    wanted, plain = relation_oracle(*arguments), relation_oracle(*arguments, dtype=torch.float32)
    least = 0 if dtype == torch.float32 else TOLERANCE[dtype]
    assert distance(loss, wanted[0]) <= 2 * distance(plain[0], wanted[0])
    assert distance(gradient, wanted[1]) <= max(2 * distance(plain[1], wanted[1]), least)


@over_paths
@pytest.mark.parametrize("deviations", [(0.1, 2.0), (2.0, 2.5), (3.0, 1.0)])
def test_relations_whose_sums_are_far_apart(deviations: tuple[float, float], dtype: torch.dtype):
    """A row of one model has a much larger sum of exponentials than that of the other."""
    student, teacher = (d * torch.randn(1, 128, 16).to(dtype) for d in deviations)
    arguments = student, teacher, torch.rand(1, 1, 128).double(), None, False, 1, "forward_kl"
    (loss,), (gradient,) = run_relations(*[[x] for x in arguments[:5]], *arguments[5:])
    wanted = relation_oracle(*arguments)
    check((loss, [gradient]), (wanted[0], [wanted[1]]), TOLERANCE[dtype])


def test_a_token_of_large_activations_slows_nobody_else():
    """Transformers have some. Its scores are out of reach of the others', which keep their one exponential."""
    teacher = torch.randn(1, 200, 16, dtype=torch.float64)
    teacher[..., 15] = 0
    teacher[:, 150, 15] = 300
    student = teacher + 1e-2 * torch.randn_like(teacher) * (teacher.abs() < 100)
    student, teacher = student.to(DEVICE, torch.bfloat16), teacher.to(DEVICE, torch.bfloat16)
    coefficient = torch.rand(1, 1, 200, dtype=torch.float64, device=DEVICE)
    launches = host._Launches([(student,)], [(teacher,)], [coefficient], (), 1, (0.25, 0.25), False, True, 0, 0.5)
    launches.forward()
    (gradient,) = launches.gradients()
    out_of_reach = launches.call.rows.stats[0][0, 0, -1].isnan()
    assert out_of_reach.nonzero().tolist() == [[150]]
    arguments = student.cpu(), teacher.cpu(), coefficient.cpu(), None, False, 1, "forward_kl"
    wanted, plain = relation_oracle(*arguments), relation_oracle(*arguments, dtype=torch.float32)
    assert distance(launches.losses[0].cpu(), wanted[0]) <= 2 * distance(plain[0], wanted[0])
    assert distance(gradient.cpu(), wanted[1]) <= TOLERANCE[torch.bfloat16]


@over_paths
@pytest.mark.parametrize("apart", [100.0, 300.0])
def test_relations_between_tokens_that_a_teacher_tells_apart(apart: float, dtype: torch.dtype):
    """Half of the teacher's scores are far below the student's, and their rows' sums near each other."""
    student, teacher = (0.05 * torch.randn(1, 128, 16) for _ in range(2))
    student[..., 0] += (2 * apart) ** 0.5
    teacher[..., 0] += (2 * apart) ** 0.5
    teacher[:, ::2, 0] *= -1
    arguments = student.to(dtype), teacher.to(dtype), torch.rand(1, 1, 128).double(), None, False, 1, "forward_kl"
    (loss,), (gradient,) = run_relations(*[[x] for x in arguments[:5]], *arguments[5:])
    wanted = relation_oracle(*arguments)
    check((loss, [gradient]), (wanted[0], [wanted[1]]), TOLERANCE[dtype])


@pytest.mark.parametrize("beta", [0.02, 0.5, 0.98])
@pytest.mark.parametrize("apart", [0.3, 1.5, "opposed"])
def test_jsd_of_any_beta(beta: float, apart: float | str):
    """Near each other, not, and where the student is sure of keys that the teacher rules out: saturated rows."""
    sq, sk, tq, tk, *rest = make(widths=(16, 16), deviation=10.0 if apart == "opposed" else 2.0)
    tq, tk = (-sq + 0.3 * tq, sk) if apart == "opposed" else (sq + apart * tq, sk)
    arguments = sq, sk, tq, tk, *rest
    check(run(arguments, "jsd", beta=beta), oracle(*arguments, "jsd", beta=beta))


def test_fp16_gradients_are_not_flushed():
    """A thousandth of a probability over a million rows is far below what fp16 holds."""
    arguments = make(near=1e-3, dtype=torch.float16)
    small = [*arguments[:6], arguments[6] * 2.0**-40, *arguments[7:]]
    for large, tiny in zip(run(arguments, "forward_kl")[1], run(tuple(small), "forward_kl")[1], strict=True):
        assert torch.equal(large, tiny * 2.0**40)
    check(run(tuple(small), "forward_kl"), oracle(*small, "forward_kl"), TOLERANCE[torch.float16], loss=1)


# ---- biases ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [(1, 1, 1, 1), (1, 1, 0, 1), (0, 1, 1, 1), (1, 0, 1, 1), (0, 0, 0, 1), (1, 1, 1, 0)])
@pytest.mark.parametrize("causal", [False, pytest.param(True, marks=pytest.mark.long)])
def test_gradient_of_a_dense_bias(bias: tuple, causal: bool):
    """Summed over whatever it is broadcast along: sequences, heads, queries. Along keys the sum is zero."""
    arguments = make(batch=2, num_heads=2, bias=bias, causal=causal, queries=41)
    (*got, gradient), (*wanted, true) = run(arguments, "forward_kl")[1], oracle(*arguments, "forward_kl")[1]
    assert gradient.shape == arguments[4].shape
    check((torch.zeros(1), got), (torch.ones(1), wanted), loss=2)
    assert distance(gradient, true) <= 2e-5 if bias[3] else (gradient == 0).all()


@pytest.mark.parametrize("reach", [1, 7, 16, 40, 128])
def test_gradient_of_diagonals(reach: int):
    """Diagonals that end inside a tile, at its edge, or beyond the matrix."""
    arguments = list(make(queries=53, keys=75))
    arguments[4], arguments[5] = torch.randn(1, 2 * reach + 1), torch.randn(1, 1, 53, 75)
    check(run(tuple(arguments), "reverse_kl"), oracle(*arguments, "reverse_kl"))


@pytest.mark.parametrize(("queries", "keys"), [(40, 330), (330, 9)])
def test_diagonals_that_end_before_a_tile_begins(queries: int, keys: int):
    """Tables are padded by so much as a tile needs, and no tile reads beyond. Some tiles of sums need no mask."""
    arguments = make(queries=queries, keys=keys, num_heads=2, bias="diagonals")
    check(run(arguments, "forward_kl"), oracle(*arguments, "forward_kl"))


def test_a_dense_bias_of_more_than_2_to_the_31_numbers():
    """Its third head begins at the 2^31st; of what lies between heads no page is touched."""
    arguments = list(make(num_heads=3, bias=(0, 1, 1, 1)))
    spread = torch.empty(2**31 + 37 * 70, dtype=torch.bfloat16).as_strided((1, 3, 37, 70), (0, 2**30, 70, 1))
    arguments[4] = arguments[4].bfloat16()
    plain = run(tuple(arguments), "forward_kl")
    arguments[4] = spread.copy_(arguments[4])
    loss, gradients = run(tuple(arguments), "forward_kl")
    assert torch.equal(loss, plain[0])
    assert all(torch.equal(mine, other) for mine, other in zip(gradients, plain[1], strict=True))


def test_gradient_of_a_wide_bias_beside_narrow_queries():
    """Gradients of scores are rounded as queries are. Their sums are nearer to the truth, unlike scores in bfloat16."""
    arguments = make(batch=2, queries=60, keys=60, num_heads=2, bias="diagonals")
    narrow = *(x.bfloat16() for x in arguments[:4]), *arguments[4:]
    gradient, true = run(narrow, "forward_kl")[1][2], oracle(*narrow, "forward_kl")[1][2]
    assert gradient.dtype == torch.float32 and distance(gradient, true) <= 1e-3


def test_minus_infinity_in_a_bias_masks():
    """In both models it is a masked key, in the student alone an infinite divergence; a row of it is left out."""
    arguments = list(make(batch=1, masked=False))
    bias = torch.zeros(1, 1, 37, 70)
    bias[..., 40:] = -INF
    arguments[4] = arguments[5] = bias
    got = run(tuple(arguments), "forward_kl", [True, True, False])
    arguments[4] = arguments[5] = None
    arguments[7] = torch.arange(70)[None] < 40
    check(got, oracle(*arguments, "forward_kl"))

    arguments[7] = None
    arguments[4], arguments[5] = bias, torch.zeros(1)[:, None, None, None]
    assert run(tuple(arguments), "forward_kl")[0][0, 0, 5] == INF
    bias[..., 5, :] = -INF
    loss, gradients = run(tuple(arguments), "reverse_kl")
    assert (loss[:, :, 5] == 0).all() and not loss.isnan().any()
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][:, 5] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model", [4, 5])
def test_a_row_that_a_bias_masks_whole_is_left_out(dtype: torch.dtype, model: int):
    arguments = list(make(masked=False, dtype=dtype))
    arguments[4], arguments[5] = (torch.zeros(1, 1, 37, 1, dtype=dtype) for _ in range(2))
    arguments[model][:, :, 5] = -INF
    got = run(tuple(arguments), "forward_kl", [True, True, False])
    arguments[model] = torch.zeros_like(arguments[model])
    arguments[6][:, :, 5] = 0
    wanted = run(tuple(arguments), "forward_kl", [True, True, False])
    assert torch.equal(got[0], wanted[0]) and all(map(torch.equal, got[1], wanted[1]))


# ---- masks and rows left out -----------------------------------------------------------------------------------------


@over_half(1)
def test_what_is_masked_is_not_read(divergence: str, causal: bool):
    """NaN and infinity in masked keys, in the bias there, and in rows of coefficient 0; a single valid key."""
    arguments = list(make(batch=2, causal=causal, bias=(1, 1, 1, 1)))
    q, k, tq, tk, bias, _, coefficient, key_mask, *_ = arguments
    key_mask[0] = False
    key_mask[0, 0] = True
    coefficient[1, :, 7] = 0
    wanted = oracle(*arguments, divergence)
    for x in (k, tk):
        x[~key_mask] = NAN
        x[0, 5] = INF
    q[0, 3], tq[1, 7] = NAN, INF
    bias.masked_fill_(~key_mask[:, None, None, :], NAN)
    bias[1, :, 7] = NAN
    loss, gradients = run(tuple(arguments), divergence)
    check((loss, gradients), wanted)
    assert (loss[0, :, 3] == 0).all() and (gradients[0][0, 3] == 0).all()
    assert (gradients[1][~key_mask] == 0).all()
    assert (loss[0] == 0).all()  # one key has all the probability of both models


@over_half(1)
def test_padding_of_a_relation_is_not_read(divergence: str, causal: bool):
    student, teacher = torch.randn(3, 41, 12), torch.randn(3, 41, 24)
    mask = torch.arange(41) < torch.tensor([[41], [20], [0]])
    coefficient = mask[:, None, :].double()
    wanted = relation_oracle(student, teacher, coefficient, mask, causal, 1, divergence)
    student[~mask], teacher[~mask] = NAN, INF
    (loss,), (gradient,) = run_relations([student], [teacher], [coefficient], [mask], [causal], 1, divergence)
    check((loss, [gradient]), (wanted[0], [wanted[1]]))
    assert (gradient[~mask] == 0).all() and (loss[2] == 0).all()


def test_rows_and_keys_masked_apart():
    """A position may be a query and no key, or the other way round."""
    student, teacher = torch.randn(2, 41, 24), torch.randn(2, 41, 48)
    mask = torch.rand(2, 41) < 0.5
    mask[:, 0] = True
    coefficient = torch.rand(2, 2, 41).double() * (torch.rand(2, 1, 41) < 0.5)
    wanted = relation_oracle(student, teacher, coefficient, mask, False, 2, "forward_kl")
    (loss,), (gradient,) = run_relations([student], [teacher], [coefficient], [mask], [False], 2, "forward_kl")
    check((loss, [gradient]), (wanted[0], [wanted[1]]))


@over_divergences
@pytest.mark.parametrize(("model", "width"), [(0, 12), (2, 24)])
def test_nan_that_is_read_is_seen(divergence: str, model: int, width: int):
    """In one model it is in the gradient of the other, too."""
    arguments = make(batch=2, num_heads=2, masked=False)
    arguments[model][1, 5, :width] = NAN
    loss, gradients = run(arguments, divergence)
    assert loss[1, 0, 5].isnan() and loss.isnan().sum() == 1
    assert gradients[0][1, 5, :12].isnan().all() and gradients[0].isnan().sum() == 12
    assert gradients[1][1, :, :12].isnan().all() and gradients[1].isnan().sum() == 70 * 12


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_strides():
    """[L, B, H] tensors, slices of a fused projection, and columns that are not neighbours."""
    arguments = list(make(batch=2, num_heads=2, widths=(12, 12)))
    plain = run(tuple(arguments), "forward_kl")
    arguments[0] = arguments[0].transpose(0, 1).contiguous().transpose(0, 1)
    arguments[1] = torch.cat([torch.randn(2, 70, 24), arguments[1]], 2)[..., 24:]
    arguments[2] = arguments[2].transpose(1, 2).contiguous().transpose(1, 2)
    assert [x.is_contiguous() for x in arguments[:3]] == [False] * 3
    strided = run(tuple(arguments), "forward_kl")
    assert torch.equal(plain[0], strided[0])
    assert all(torch.equal(x, y) for x, y in zip(plain[1], strided[1], strict=True))


@pytest.mark.parametrize("bias", [None, (0, 1, 0, 1), (1, 0, 1, 1), "diagonals"], ids=str)
@pytest.mark.parametrize(("groups", "rows", "parts"), [(4, 40, 2), (2, 40, 3), (1, 40, 6), (1, 13, 24)])
def test_gradients_in_parts(monkeypatch: pytest.MonkeyPatch, bias, groups: int, rows: int, parts: int):
    """A workspace for two sequences, one, one of the two heads of keys, and some of their queries."""
    from fastkd.kernels.attention import products

    arguments = list(make(batch=3, queries=40, causal=True, num_heads=4, widths=(12, 12), bias=bias))
    repeated = [x.clone() for x in (arguments[1], arguments[3])]
    for x in repeated:
        x[..., 12:24], x[..., 36:] = x[..., :12], x[..., 24:36]
    wanted = oracle(arguments[0], repeated[0], arguments[2], repeated[1], *arguments[4:], "forward_kl")
    wanted[1][1] = wanted[1][1].unflatten(2, (2, 2, 12)).sum(3).flatten(2)
    arguments[1], arguments[3] = (x[..., [*range(12), *range(24, 36)]] for x in repeated)
    launched, add = [], products.Gradients.add
    operands = 12 * (4 + 4)
    monkeypatch.setattr(products, "WORKSPACE", groups * (rows * 2 * (48 * 4 + operands) + 40 * operands))
    monkeypatch.setattr(products.Gradients, "add", lambda *args: (launched.append(args[1]), add(*args)))
    check(run(tuple(arguments), "forward_kl"), wanted)
    assert len(launched) == parts


def test_results_do_not_depend_on_what_is_asked():
    """Nor on the run: bit by bit."""
    arguments = make(bias="diagonals")
    loss, gradients = run(arguments, "jsd")
    for i in range(3):
        wanted = [i == j for j in range(3)]
        again, (gradient,) = run(arguments, "jsd", wanted)
        assert torch.equal(again, loss) and torch.equal(gradient, gradients[i])
    assert torch.equal(run(arguments, "jsd", [False, False, False])[0], loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_nothing_to_do(dtype: torch.dtype):
    arguments = list(make(batch=0, num_heads=2, masked=False, dtype=dtype))
    loss, gradients = kernels.attention_kl(*map(moved, arguments), [True, True, False], 0, 0.5)[:2]
    assert loss.shape == (0, 2, 37) and gradients.shape == (0, 37, 24)
    for queries, keys in ((0, 5), (5, 0)):
        arguments = list(make(queries=max(queries, 4), keys=max(keys, 1), bias="diagonals", masked=False, dtype=dtype))
        for n in (0, 2):
            arguments[n], arguments[n + 1] = arguments[n][:, :queries], arguments[n + 1][:, :keys]
        arguments[6] = 0 * arguments[6][..., :queries]
        loss, *gradients = kernels.attention_kl(*map(moved, arguments), [True, True, True], 0, 0.5)
        assert loss.shape == (1, 1, queries) and (loss == 0).all()
        assert all((g == 0).all() and g.shape == arguments[n].shape for g, n in zip(gradients, (0, 1, 4), strict=True))


@pytest.mark.parametrize("width", [16, 20, 64, 128])
def test_head_widths(width: int):
    arguments = make(batch=1, num_heads=1, widths=(width, 12), masked=False)
    check(run(arguments, "forward_kl"), oracle(*arguments, "forward_kl"))
    assert math.isclose(arguments[-2], 2.0 * width**-0.5)
