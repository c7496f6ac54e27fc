"""cka_loss beyond what every op is tested for: both forms, degenerate batches, masks, lists, process groups."""

from __future__ import annotations

import datetime
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel

import fastkd
from fastkd.checks import numbers
from fastkd.ops import cka_loss as op_file
from fastkd.ops.drivers import cka_loss_torch as gemms

from .cases import (
    CKA_LOSS,
    DTYPES,
    LONG_IN_TRITON,
    ROUNDING,
    SMALLEST,
    Inputs,
    by_name,
    distance,
    end_process,
    group_of_one,
    oracle,
    over_backends,
    over_fused,
    running_on,
    to,
    value_and_gradients,
)
from .forks import Forks

over_forms = pytest.mark.parametrize("grams", [False, True], ids=["covariances", "grams"])


def hidden(tokens: int, widths: tuple[int, int], offset: float = 0.0, distance: float | None = None) -> Inputs:
    """Hidden states of unit variance around an offset, float64; a student at a distance has the teacher's columns."""
    teacher = offset + torch.randn(tokens, widths[1], dtype=torch.float64)
    noise = torch.randn(tokens, widths[0], dtype=torch.float64)
    student = offset + noise if distance is None else teacher[:, : widths[0]] + distance * noise
    return {"student": student, "teacher": teacher}


def poison(inputs: Inputs, mask: Tensor) -> Inputs:
    """NaN in the student's dropped tokens, infinity in the teacher's."""
    values = {"student": torch.nan, "teacher": torch.inf}
    return {name: x.masked_fill(~mask.unsqueeze(-1), values[name]) for name, x in inputs.items()}


def test_definition():
    """HSM's formula, and linear CKA as Kornblith et al. write it: HSIC of the Grams, by a centring matrix."""
    inputs = hidden(11, (3, 5), offset=2.0)
    a, b = (x - x.mean(0) for x in inputs.values())
    covariance = [x.T @ y / 10 for x, y in ((b, a), (a, a), (b, b))]
    c, s, t = (torch.linalg.matrix_norm(x) for x in covariance)
    for impl in ("reference", "fused"):
        assert distance(fastkd.cka_loss(**inputs, impl=impl), 1 - c / (s.sqrt() * t.sqrt())) <= 1e-8
    centring = torch.eye(11, dtype=torch.float64) - 1 / 11
    k, m = (centring @ x @ x.T @ centring for x in inputs.values())
    hsic = [(x * y).sum() for x, y in ((k, m), (k, k), (m, m))]
    for impl in ("reference", "fused"):
        got = fastkd.cka_loss(**inputs, impl=impl, squared=True)
        assert distance(got, 1 - hsic[0] / (hsic[1] * hsic[2]).sqrt()) <= 1e-8


SHAPES = [(3, (10, 20)), (50, (1, 1)), (40, (7, 1)), (129, (63, 65)), (700, (257, 33)), (21, (1003, 1536))]
# Triton has tests of its own: tensor cores round centred 16-bit states, and its interpreter is slow.
ON_BACKENDS = [("cpp", dtype, *shape) for dtype in DTYPES for shape in SHAPES] + [
    ("triton", dtype, *shape) for dtype in (torch.float32, torch.float64) for shape in (SHAPES[0], SHAPES[3])
]


@pytest.mark.parametrize(("backend", "dtype", "tokens", "widths"), ON_BACKENDS, ids=by_name)
@pytest.mark.parametrize("offset", [0.0, 50.0])
@pytest.mark.parametrize("masked", [False, True])
def test_value_and_gradients(
    backend: str, dtype: torch.dtype, offset: float, tokens: int, widths: tuple[int, int], masked: bool
):
    if masked:
        mask = torch.rand(2 * tokens) < 0.5
        mask[:tokens] |= mask[tokens:].logical_not()  # at least `tokens` are left
        mask[0] = False
    else:
        mask = torch.ones(tokens, dtype=torch.bool)
    squared = tokens % 2 == 0
    inputs = to(hidden(mask.numel(), widths, offset), dtype)
    kept = {name: x[mask] for name, x in inputs.items()}
    loss, gradients = oracle(CKA_LOSS, kept, squared=squared)
    plain = torch.float64 if dtype == torch.float64 else torch.float32
    _, plain_gradients = value_and_gradients(CKA_LOSS, to(kept, plain), impl="reference", squared=squared)
    with running_on(backend) as (impl, device):
        moved = to(poison(inputs, mask), dtype, device)
        option = {"mask": mask.to(device)} if masked else {}
        got, got_gradients = value_and_gradients(CKA_LOSS, moved, impl=impl, squared=squared, **option)

    exact = dtype == torch.float64
    assert got.dtype == plain
    # what a loss of which the parts are rounded to fp32 may be off by beside its value: they are near 1
    assert abs(got.item() - loss.item()) <= (1e-12 if exact else 1e-6 * loss.item() + 1e-7)
    gradient, wanted = got_gradients["student"], gradients["student"]
    assert gradient.dtype == dtype
    assert not gradient[~mask].any()
    bound = 1e-11 if exact else 5e-5
    error = max(bound, 2 * distance(plain_gradients["student"], wanted))
    rounding = 2 * ROUNDING[dtype] + SMALLEST[dtype] * wanted.numel() ** 0.5 / wanted.norm().item()
    assert distance(gradient[mask], wanted) <= error + rounding


@over_backends
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("tokens", "widths"), [(300, (20, 33)), (40, (24, 50))])
def test_gradients_far_from_the_origin(backend: str, tokens: int, widths: tuple[int, int], masked: bool):
    """An offset of a thousand deviations takes no digit from the gradient."""
    inputs = {
        name: 1000 + torch.randn(tokens, width) for name, width in zip(("student", "teacher"), widths, strict=True)
    }
    options = {"mask": torch.rand(tokens) < 0.8} if masked else {}
    loss, gradients = oracle(CKA_LOSS, inputs, **options)
    with running_on(backend) as (impl, device):
        options = {name: x.to(device) for name, x in options.items()}
        got, got_gradients = value_and_gradients(CKA_LOSS, to(inputs, torch.float32, device), impl=impl, **options)
    assert abs(got.item() - loss.item()) <= 1e-6
    assert distance(got_gradients["student"], gradients["student"]) <= 1.5e-6


@over_fused
@pytest.mark.parametrize("tokens", [60, 300])
def test_student_near_the_teacher(backend: str, tokens: int):
    """Widths alike, a loss of about 1e-6: it and its gradient are what remains when things are subtracted."""
    inputs = to(hidden(tokens, (130, 130), distance=1e-3), torch.float32)
    loss, gradients = oracle(CKA_LOSS, inputs)
    _, plain = value_and_gradients(CKA_LOSS, inputs, impl="reference")
    with running_on(backend) as (impl, device):
        got, got_gradients = value_and_gradients(CKA_LOSS, to(inputs, torch.float32, device), impl=impl)
    assert loss < 1e-6
    assert abs(got.item() - loss.item()) <= 2e-8
    error = distance(got_gradients["student"], gradients["student"])
    assert error <= max(5e-5, 2 * distance(plain["student"], gradients["student"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=by_name)
@pytest.mark.parametrize("masked", [False, True])
@over_forms
def test_both_forms_in_chunks_of_any_size(dtype, masked: bool, grams: bool, monkeypatch: pytest.MonkeyPatch):
    """Either form is right on either side of where it is chosen."""
    inputs = to(hidden(57, (23, 36), offset=5.0), dtype)
    mask = torch.rand(57) < 0.6 if masked else torch.ones(57, dtype=torch.bool)
    loss, gradients = oracle(CKA_LOSS, inputs, mask=mask)
    monkeypatch.setattr(op_file, "_by_grams", lambda tokens, widths: grams)
    for workspace, strip in ((1, 1), (100, 7), (600, 16), (2**20, 128)):
        monkeypatch.setattr(gemms, "WORKSPACE", workspace)
        monkeypatch.setattr(gemms, "STRIP", strip)
        got, got_gradients = value_and_gradients(
            CKA_LOSS, poison(inputs, mask), impl="fused", mask=mask if masked else None
        )
        assert distance(got, loss) <= 1e-6
        assert distance(got_gradients["student"], gradients["student"]) <= 5e-5 + 2 * ROUNDING[dtype]


def test_the_form_with_fewer_flops_is_chosen():
    """As a count of them says, forward alone or with the gradient."""
    for students, teachers in ((768, 512), (1, 4000), (64, 64)):
        widths = students + teachers
        for tokens in (1, widths // 2, widths - 1, widths + 1, 3 * widths):
            for gradient in (0, 1):
                grams = tokens**2 * widths + gradient * 2 * tokens**2 * students
                covariances = tokens * widths**2 + gradient * 2 * tokens * widths * students
                assert op_file._by_grams(tokens, widths) == (grams < covariances)


@over_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("case", ["no tokens", "one token", "all masked", "all but one masked"])
def test_fewer_than_two_valid_tokens(backend: str, dtype: torch.dtype, case: str):
    tokens = {"no tokens": 0, "one token": 1}.get(case, 9)
    inputs = to(hidden(tokens, (3, 5), offset=0.1), dtype)
    mask = torch.zeros(tokens, dtype=torch.bool) if "masked" in case else torch.ones(tokens, dtype=torch.bool)
    if case == "all but one masked":
        mask[4] = True
    with running_on(backend) as (impl, device):
        moved = to(poison(inputs, mask), dtype, device)
        loss, gradients = value_and_gradients(CKA_LOSS, moved, impl=impl, mask=mask.to(device))
    assert loss.item() == 0
    assert gradients["student"].shape == inputs["student"].shape
    assert not gradients["student"].any()


@pytest.mark.parametrize(
    ("backend", "tokens"), [*product(["reference", "cpp"], [7, 1999]), *product(["triton"], [7, 150])]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=by_name)
@pytest.mark.parametrize("which", [("student",), ("teacher",), ("student", "teacher")], ids="+".join)
def test_constant_hidden_states(backend: str, dtype: torch.dtype, tokens: int, which: tuple[str, ...]):
    """The same at every token: numbers that no dtype holds exactly, and a mean that rounding may not take off them."""
    inputs = to(hidden(tokens, (3, 5)), dtype)
    for name in which:
        inputs[name] = (inputs[name][:1] * 17 + 0.1).to(dtype).expand_as(inputs[name]).clone()
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[1::3] = False
    for option in (None, mask):
        with running_on(backend) as (impl, device):
            moved = to(inputs if option is None else poison(inputs, option), dtype, device)
            option = None if option is None else option.to(device)
            loss, gradients = value_and_gradients(CKA_LOSS, moved, impl=impl, mask=option)
        assert loss.item() == 1
        assert not gradients["student"].any()


@over_fused
def test_two_tokens_are_always_alike(backend: str):
    """Their kernels are both of rank one: the loss is 0 whatever they are, and so is its gradient."""
    for squared in (False, True):
        inputs = to(hidden(2, (6, 9), offset=1.0), torch.float32)
        with running_on(backend) as (impl, device):
            moved = to(inputs, torch.float32, device)
            loss, gradients = value_and_gradients(CKA_LOSS, moved, impl=impl, squared=squared)
        assert abs(loss.item()) <= 1e-6
        assert gradients["student"].norm() * inputs["student"].norm() <= 1e-5


@over_fused
def test_nan_is_not_hidden(backend: str):
    """Where a valid token holds it."""
    for name in ("student", "teacher"):
        inputs = to(hidden(9, (3, 5)), torch.float32)
        inputs[name][2, 1] = torch.nan
        with running_on(backend) as (impl, device):
            loss, gradients = value_and_gradients(CKA_LOSS, to(inputs, torch.float32, device), impl=impl)
        assert loss.isnan()
        assert gradients["student"].isnan().any()


@over_fused
def test_rotations_and_scales_change_nothing(backend: str):
    inputs = hidden(30, (6, 8))
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    with running_on(backend) as (impl, device):
        same = [
            fastkd.cka_loss(x.to(device), inputs["teacher"].to(device), impl=impl)
            for x in (inputs["student"], 1e3 * inputs["student"] @ rotation + 7)
        ]
    assert distance(same[1], same[0]) <= 1e-8


@over_backends
@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_lists(backend: str, reduction: str):
    """Pairs of any widths and lengths, one of them not trained, each with a mask of its own or none."""
    sizes = [((2, 9), (3, 5)), ((4,), (6, 2)), ((2, 30), (4, 4))]
    pairs = [
        {name: x.float().unflatten(0, shape) for name, x in hidden(torch.Size(shape).numel(), widths).items()}
        for shape, widths in sizes
    ]
    masks = [torch.rand(2, 9) < 0.7, None, torch.rand(2, 30) < 0.7]
    upstream = torch.tensor([2.0, -1.0, 0.5]) if reduction == "none" else torch.tensor(3.0)
    share = {"sum": 3 * torch.ones(3), "mean": torch.ones(3), "none": upstream}[reduction]
    wanted = [
        oracle(CKA_LOSS, pair, mask=mask, upstream=scale.double())
        for pair, mask, scale in zip(pairs, masks, share, strict=True)
    ]
    with running_on(backend) as (impl, device):
        students = [pair["student"].to(device).requires_grad_(i != 1) for i, pair in enumerate(pairs)]
        teachers = [pair["teacher"].to(device) for pair in pairs]
        moved = [None if mask is None else mask.to(device) for mask in masks]
        loss = fastkd.cka_loss(students, teachers, mask=moved, reduction=reduction, impl=impl)
        loss.backward(upstream.to(device))
    losses = torch.stack([value for value, _ in wanted])
    assert distance(loss, {"sum": losses.sum(), "mean": losses.mean(), "none": losses}[reduction]) <= 1e-6
    for i, (student, (_, gradients)) in enumerate(zip(students, wanted, strict=True)):
        if i == 1:
            assert student.grad is None
        else:
            assert distance(student.grad, gradients["student"]) <= 5e-5


@over_backends
def test_one_mask_for_all_pairs(backend: str):
    pairs = [to(hidden(20, widths), torch.float32) for widths in ((3, 5), (6, 2))]
    mask = torch.rand(20) < 0.6
    wanted = sum(oracle(CKA_LOSS, pair, mask=mask)[0] for pair in pairs)
    for given in (mask, mask.int(), mask.to(torch.uint8) * 7):
        with running_on(backend) as (impl, device):
            lists = [[pair[name].to(device) for pair in pairs] for name in ("student", "teacher")]
            assert distance(fastkd.cka_loss(*lists, mask=given.to(device), impl=impl), wanted) <= 1e-6


@over_fused
@over_forms
def test_strides_are_respected(backend: str, grams: bool):
    tokens, widths = (8, (9, 11)) if grams else (40, (3, 5))
    plain = {name: x.float().unflatten(0, (2, -1)) for name, x in hidden(tokens, widths).items()}
    mask = torch.rand(2, tokens // 2) < 0.7
    loss, gradients = oracle(CKA_LOSS, plain, mask=mask)
    views = {
        "shifted": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
        "transposed": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        "every other column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    }
    for layout, view in views.items():
        with running_on(backend) as (impl, device):
            moved = {name: view(x.to(device)) for name, x in plain.items()}
            got, got_gradients = value_and_gradients(CKA_LOSS, moved, impl=impl, mask=mask.to(device))
        assert distance(got, loss) <= 1e-6, layout
        assert distance(got_gradients["student"], gradients["student"]) <= 5e-5, layout


@pytest.mark.parametrize("backend", LONG_IN_TRITON)
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(backend: str, squared: bool, reduction: str):
    """Both forms, in one list."""
    with running_on(backend) as (impl, device):
        pairs = [to(hidden(*size), torch.float64, device) for size in ((5, (2, 2)), (5, (3, 4)))]
        teachers = [pair["teacher"] for pair in pairs]
        mask = torch.tensor([True, True, False, True, True], device=device)

        def function(*students):
            return fastkd.cka_loss(
                students, teachers, mask=mask, squared=squared, reduction=reduction, eps=0.3, impl=impl
            )

        students = [pair["student"].requires_grad_() for pair in pairs]
        assert torch.autograd.gradcheck(function, students, fast_mode=backend == "triton")  # the interpreter is slow


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=by_name)
def test_opcheck(dtype: torch.dtype):
    pairs = [to(hidden(*size), dtype) for size in ((12, (2, 3)), (4, (3, 4)), (12, (2, 3)))]
    student, teacher = ([pair[name] for pair in pairs] for name in ("student", "teacher"))
    masks, wanted = [torch.rand(12) < 0.7, None, None], [True, True, False]
    ops = torch.ops.fastkd
    opcheck(ops.cka_loss.default, (student, teacher, masks, wanted, numbers(1e-8), True))
    losses, means, factors = ops.cka_loss(student, teacher, masks, wanted, numbers(1e-8), False)
    assert factors[2].shape == (0,)
    opcheck(ops.cka_loss_backward.default, (student, teacher, masks, means, factors, wanted, torch.ones_like(losses)))


@pytest.mark.parametrize("reduction", ["sum", pytest.param("none", marks=pytest.mark.long)])
def test_compiles_without_a_graph_break(reduction: str):
    """fullgraph, forward and backward; one compilation for all batch sizes of a form."""
    torch._dynamo.reset()
    compilations = 0

    def count(graph, inputs):
        nonlocal compilations
        compilations += 1
        return graph.forward

    def function(students, teachers, mask):
        return fastkd.cka_loss(students, teachers, mask=mask, reduction=reduction)

    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    counted = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for tokens in (20, 31, 44):
        pairs = [to(hidden(tokens, widths), torch.float32) for widths in ((3, 5), (6, 2))]
        students = [pair["student"].requires_grad_() for pair in pairs]
        arguments = (students, [pair["teacher"] for pair in pairs], torch.rand(tokens) < 0.6)
        wanted, got = function(*arguments), compiled(*arguments)
        counted(*arguments)
        assert distance(got, wanted) <= 1e-6
        gradients = (torch.autograd.grad(loss.sum(), students) for loss in (got, wanted))
        for left, right in zip(*gradients, strict=True):
            assert distance(left, right) <= 1e-6
    assert compilations == 1


@over_fused
@over_forms
def test_results_repeat_to_the_bit(backend: str, grams: bool):
    inputs = to(hidden(50 if grams else 250, (130, 70)), torch.float32)
    with running_on(backend) as (impl, device):
        first, again = (value_and_gradients(CKA_LOSS, to(inputs, torch.float32, device), impl=impl) for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["student"], again[1]["student"])


def test_fp16_gradients_survive_loss_scaling():
    """They are smaller than fp16 holds; the scale comes first, rounding afterwards."""
    inputs = to(hidden(2000, (8, 8), distance=0.01), torch.float16)
    _, gradients = oracle(CKA_LOSS, inputs, upstream=2.0**14)
    assert gradients["student"].abs().median() / 2**14 < 2**-17
    _, got = value_and_gradients(CKA_LOSS, inputs, impl="fused", upstream=2.0**14)
    assert distance(got["student"], gradients["student"]) <= 1e-3


@over_forms
def test_no_gradient_is_held_between_the_passes(grams: bool):
    """What the forward pass keeps beside its inputs is the factor and the means."""
    inputs = to(hidden(40 if grams else 3000, (60, 30)), torch.float32)
    given = {x.untyped_storage().data_ptr() for x in inputs.values()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        fastkd.cka_loss(inputs["student"].requires_grad_(), inputs["teacher"])
    sizes = {x.numel() for x in kept if x.untyped_storage().data_ptr() not in given}
    assert sizes <= {0, 90, 40 * 40 if grams else 90 * 60}


def test_module_equals_function():
    inputs = to(hidden(20, (3, 5)), torch.float32)
    mask = torch.rand(20) < 0.7
    loss = fastkd.nn.CKALoss(squared=True, reduction="none", eps=1e-3)
    wanted = fastkd.cka_loss(**inputs, mask=mask, squared=True, reduction="none", eps=1e-3)
    assert torch.equal(loss(**inputs, mask=mask), wanted)
    assert "squared=True" in repr(loss)
    with pytest.raises(ValueError, match="eps: expected a number > 0, got -1"):
        fastkd.nn.CKALoss(eps=-1)


# ---- process groups -------------------------------------------------------------------------------------------------

WIDTHS = (5, 7)
SPLIT = 23  # tokens of the first process; the rest are the second's


def _model() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Linear(4, WIDTHS[0])


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    """Model inputs, the teacher's hidden states, and a mask; offsets differ along the batch."""
    torch.manual_seed(2)
    x = torch.randn(60, 4) + torch.linspace(-2, 2, 60).unsqueeze(1)
    return x, torch.randn(60, WIDTHS[1]) + x[:, :1], torch.rand(60) < 0.8


def _masks() -> dict[str, Tensor | None]:
    """None, a mask, and masks that leave a process nothing or everyone too little."""
    mask = _batch()[2]
    second_empty, one_left = mask.clone(), torch.zeros(60, dtype=torch.bool)
    second_empty[SPLIT:] = False
    one_left[3] = True
    return {"none": None, "mask": mask, "second empty": second_empty, "one left": one_left}


def _process(rank: int, store: str, results: str) -> None:
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    part = slice(0, SPLIT) if rank == 0 else slice(SPLIT, None)
    x, teacher, _ = _batch()
    found = {}
    for (name, mask), squared, debiased in product(_masks().items(), (False, True), (False, True)):
        model = DistributedDataParallel(_model())
        students = model(x[part])
        loss = fastkd.cka_loss(
            [students, 2 * students.tanh()],
            [teacher[part]] * 2,
            mask=None if mask is None else mask[part],
            squared=squared,
            debiased=debiased,
            reduction="mean",
            group=dist.group.WORLD,
        )
        loss.backward()
        found[name, squared, debiased] = (loss.detach(), [p.grad for p in model.parameters()])
    torch.save(found, f"{results}{rank}")
    end_process()


def test_a_group_is_one_batch(forks: Forks, tmp_path: Path):
    """Unequal parts under DistributedDataParallel: the loss and parameter gradients of one process on all tokens."""
    forks.call(_process, str(tmp_path / "store"), str(tmp_path / "results"), processes=2)
    x, teacher, _ = _batch()
    results = [torch.load(tmp_path / f"results{rank}") for rank in (0, 1)]
    for (name, mask), squared, debiased in product(_masks().items(), (False, True), (False, True)):
        model = _model().double()
        students = model(x.double())
        loss = fastkd.cka_loss(
            [students, 2 * students.tanh()],
            [teacher.double()] * 2,
            mask=mask,
            squared=squared,
            debiased=debiased,
            reduction="mean",
            impl="reference",
        )
        loss.backward()
        for found in results:
            got, gradients = found[name, squared, debiased]
            assert abs(got.item() - loss.item()) <= 1e-6, name
            for gradient, p in zip(gradients, model.parameters(), strict=True):
                assert (gradient - p.grad).norm() <= 5e-5 * p.grad.norm(), name


def test_a_group_has_no_reference(tmp_path: Path):
    with group_of_one(tmp_path) as group:
        inputs = to(hidden(20, (3, 5)), torch.float32)
        alone, gradients = value_and_gradients(CKA_LOSS, inputs)
        with pytest.raises(ValueError, match='impl: expected auto or fused, because a group is given, got "reference"'):
            fastkd.cka_loss(**inputs, group=group, impl="reference")
        loss, got = value_and_gradients(CKA_LOSS, inputs, group=group)
        few = to(hidden(4, (3, 5)), torch.float32)  # alone these would take the form of Grams
        wanted, few_gradients = value_and_gradients(CKA_LOSS, few)
        grouped, few_got = value_and_gradients(CKA_LOSS, few, group=group)
    assert torch.equal(loss, alone)
    assert torch.equal(got["student"], gradients["student"])
    assert distance(grouped, wanted) <= 1e-6
    assert distance(few_got["student"], few_gradients["student"]) <= 5e-5
