"""What the inner loops of the GPU kernels execute is counted rightly, and is no more than it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.count.classes import bytes_of, class_of, count, flops_of, operand_bytes_of
from benchmarks.gpu.count.kernels import OPS, TRITON, Op, Part
from benchmarks.gpu.count.sass import Instruction, functions, loops, way

ROOT = Path(__file__).parents[1]


def listing(*lines: str, name: str = "kernel") -> str:
    """Machine code as nvdisasm prints it: labels end in a colon."""
    head = [f'\t.section\t.text.{name},"ax",@progbits', f"{name}:", f".text.{name}:"]
    body = [x if x.endswith(":") else f"        /*{16 * i:04x}*/    {x:>40} ;" for i, x in enumerate(lines)]
    return "\n".join([*head, *body])


def opcodes(trip: list[Instruction] | None) -> list[str]:
    assert trip is not None
    return [one.opcode for one in trip]


# Two loads and an exponential; when a maximum moves, which is seldom, sums are rescaled.
RESCALED = listing(
    "MOV R0, RZ",
    ".L_x_0:",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "@!P1 LDG.E.64 R8, desc[UR4][R2.64+0x10]",
    "FSETP.GT.AND P0, PT, R4, R5, PT",
    "BSSY B0, `(.L_x_1)",
    "@!P0 BRA `(.L_x_2)",
    "MUFU.EX2 R6, R5",
    "DMUL R10, R10, R12",
    ".L_x_2:",
    "BSYNC B0",
    ".L_x_1:",
    "MUFU.EX2 R7, R4",
    "@P2 BRA `(.L_x_0)",
    "EXIT",
)
# A chunk is copied at once where it is aligned, or else number by number; then it is stored or not.
CHUNKS = listing(
    ".L_x_0:",
    "@P0 BRA `(.L_x_2)",
    ".L_x_1:",
    "LDG.E R4, desc[UR4][R2.64]",
    "STS [R5], R4",
    "@P1 BRA `(.L_x_1)",
    "BRA `(.L_x_3)",
    ".L_x_2:",
    "LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]",
    "IADD3 R2, R2, 0x10, RZ",
    "IADD3 R3, R3, 0x10, RZ",
    "IADD3 R5, R5, 0x10, RZ",
    ".L_x_3:",
    "@P3 BRA `(.L_x_4)",
    "STG.E.128 desc[UR4][R2.64], R8",
    ".L_x_4:",
    "@P2 BRA `(.L_x_0)",
    "EXIT",
)


def test_a_trip_leaves_out_what_is_seldom_executed():
    blocks = functions(RESCALED)["kernel"]
    (loop,) = loops(blocks)
    normal = opcodes(way(blocks, loop, [loop], {"MUFU.EX2": 1}))
    assert normal == ["LDG.E.128", "LDG.E.64", "FSETP.GT.AND", "BSSY", "BRA", "BSYNC", "MUFU.EX2", "BRA"]
    assert sum(len(blocks[number].instructions) for number in loop.blocks) == len(normal) + 2
    assert "DMUL" in opcodes(way(blocks, loop, [loop], {"MUFU.EX2": 2}))
    assert way(blocks, loop, [loop], {"MUFU.EX2": 3}) is None


def test_a_predicate_before_the_label_and_one_before_the_opcode_make_a_jump_conditional():
    for jump in ("@P0 BRA `(.L_x_0)", "BRA P0, `(.L_x_0)", "@!P0 BRA P1, `(.L_x_0)", "BRA.U UP0, `(.L_x_0)"):
        blocks = functions(listing(".L_x_0:", "MOV R0, R1", jump, "EXIT"))["kernel"]
        assert sorted(blocks[0].successors) == [0, 1], jump
    blocks = functions(listing(".L_x_0:", "MOV R0, R1", "BRA `(.L_x_0)", "EXIT"))["kernel"]
    assert blocks[0].successors == [0]


def test_bsync_goes_where_bssy_said():
    """As where a branch is moved behind the code that follows it."""
    blocks = functions(
        listing("BSSY B0, `(.L_x_1)", "@P0 BRA `(.L_x_0)", "BSYNC B0", ".L_x_0:", "MOV R0, R1", ".L_x_1:", "EXIT")
    )["kernel"]
    assert [block.successors for block in blocks] == [[2, 1], [3], [3], []]


def test_a_trip_goes_by_what_is_asked_of_it_and_not_through_inner_loops():
    blocks = functions(CHUNKS)["kernel"]
    inner, outer = loops(blocks)
    assert inner < outer and not outer < inner
    kept = opcodes(way(blocks, outer, [inner, outer], {"LDGSTS": 1, "STG": 0}))
    assert kept == ["BRA", "LDGSTS.E.BYPASS.128", *["IADD3"] * 3, "BRA", "BRA"]
    assert "STG.E.128" in opcodes(way(blocks, outer, [inner, outer], {"STG": 1}))
    assert way(blocks, outer, [inner, outer], {"LDG.E": 1}) is None
    assert opcodes(way(blocks, inner, [inner, outer], {})) == ["LDG.E", "STS", "BRA"]


def test_of_several_functions_each_has_its_own_blocks():
    found = functions(listing("EXIT", name="a") + "\n" + listing("MOV R0, R1", "EXIT", name="b"))
    assert {name: [len(block.instructions) for block in blocks] for name, blocks in found.items()} == {
        "a": [1],
        "b": [2],
    }


def test_jumps_to_where_a_register_says_are_an_error():
    with pytest.raises(ValueError, match="kernel: expected jumps to labels, got BRX"):
        functions(listing("BRX R2 -0x10", "EXIT"))


@pytest.mark.parametrize(
    ("opcode", "kind", "size"),
    [
        ("LDG.E.128", "global", 16),
        ("LDG.E.U8", "global", 1),
        ("STG.E", "global", 4),
        ("LDGSTS.E.BYPASS.128", "copy", 16),
        ("LDS.U16", "shared", 2),
        ("STS.64", "shared", 8),
        ("LDSM.16.MT88.4", "shared", 16),
        ("STSM.16.M88", "shared", 4),
        ("STL.64", "local", 8),
    ],
)
def test_bytes_of_an_instruction(opcode: str, kind: str, size: int):
    instruction = Instruction(opcode)
    assert (class_of(instruction), bytes_of(instruction)) == (kind, size)


def test_products_have_the_flops_of_their_shape_and_read_what_is_not_in_registers():
    both = Instruction("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], R24, gsb0")
    one = Instruction("HGMMA.64x128x16.F32.BF16", "R24, R88, gdesc[UR8].tnspB, R24")
    assert flops_of(both) == flops_of(one) == 2 * 64 * 128 * 16 / 128
    assert operand_bytes_of(both) == 2 * 16 * (64 + 128) / 128
    assert operand_bytes_of(one) == 2 * 16 * 128 / 128
    assert flops_of(Instruction("HMMA.16816.F32.BF16")) == 2 * 16 * 8 * 16 / 32
    assert flops_of(Instruction("UTCHMMA")) is None


def test_counts_of_a_trip():
    blocks = functions(RESCALED)["kernel"]
    found = count(one for block in blocks for one in block.instructions)
    assert found["instructions"] == 12 and found["exponentials"] == 2
    assert found["loaded bytes"] == 24 and found["stored bytes"] == 0
    assert found["fp64"] == 1 and found["special"] == 2 and found["control"] == 5
    assert found["other"] == 0 and count([Instruction("NOVEL.X")])["other"] == 1


# ---- the kernels -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict:
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if triton.__version__.rpartition(".")[0] != TRITON:
        pytest.skip(f"the figures are those of Triton {TRITON}, and this is {triton.__version__}")
    path = tmp_path_factory.mktemp("count") / "sm_90.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.gpu.count", "--target", "sm_90", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    print("\n" + run.stdout)
    folder = ROOT / "build" / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "count.txt").write_text(run.stdout)
    return json.loads(path.read_text())["ops"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("op", "part"), [pytest.param(op, part, id=f"{op.name}: {part.title}") for op in OPS for part in op.parts]
)
def test_no_loop_executes_more_than_today(counted: dict, op: Op, part: Part):
    if op.name not in counted and part.module == "cuda":
        pytest.skip("nvcc is not installed")
    found = counted[op.name]["kernels"][part.title]
    instructions, exponentials, barriers = part.at_most
    assert found["each"]["instructions"] <= instructions, found
    assert found["each"].get("exponentials", 0) <= exponentials, found
    assert found["barriers"] <= barriers, found
    assert found["local"] == found["spills"] == 0, found


@pytest.mark.long
def test_elements_are_those_of_the_tile(counted: dict):
    """A loop that a compiler unrolled would move and multiply a multiple of this."""
    for op in OPS:
        for part in op.parts if op.name in counted else ():
            each = counted[op.name]["kernels"][part.title]["each"]
            if part.module == "rows":
                assert each["loaded bytes"] == (8 if part.case[2] == "fp32" else 4), op
            if part.module == "cuda" and part.title == "gradient":
                assert each["stored bytes"] == (4 if part.kernel.endswith("fp32") else 2), op
            if part.kernel == "forward":  # products of heads, padded to 16, once or for JSD twice
                padded = sum(-(-width // 16) * 16 for width in part.case[3:5])
                assert each["tensor FLOPs"] == 2 * padded * part.loops, op
            if part.module == "topk":
                assert each["loaded bytes"] == 4, op
            if part.module == "cka":
                assert each["loaded bytes" if part.kernel == "means" else "stored bytes"] == 2, op
