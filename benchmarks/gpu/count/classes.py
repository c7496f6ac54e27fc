"""What instructions are: the part of a multiprocessor that executes them, and what they move or multiply."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from .sass import Instruction

# Lanes a clock of a multiprocessor of compute capability 9.0 (CUDA programming guide, "Arithmetic Instructions"), and
# opcodes without modifiers; a regular expression each. None: what takes a slot of its warp's issue and no more, or is
# counted by bytes or FLOPs.
CLASSES: dict[str, tuple[int | None, str]] = {
    "fp32": (128, r"FADD2?|FMUL2?|FFMA2?|FADD32I|FMUL32I|FFMA32I|HADD2|HMUL2|HFMA2|IMAD|FSWZADD"),
    "fp64": (64, r"DADD|DMUL|DFMA|DSETP|DMNMX"),
    "integer": (
        64,
        r"IADD3?|VIADD|IABS|LEA|LOP3|LOP|PLOP3|SHF|SHL|SHR|ISETP|FSETP|FSEL|SEL|FMNMX3?|IMNMX|VIMNMX3?|PRMT|MOV|MOV32I"
        r"|VIADDMNMX|HSETP2|HMNMX2|FSET|F2FP|I2FP|FCHK|P2R|R2P|SGXT|BMSK|VABSDIFF4?|LDC|LDCU|CS2R|IMMA",
    ),
    "special": (16, r"MUFU|F2F|F2I|I2F|FRND|POPC|FLO|BREV|S2R|S2UR|R2UR"),
    "shuffle": (32, r"SHFL|VOTE|VOTEU|MATCH|REDUX|CREDUX"),
    "shared": (None, r"LDS|STS|LDSM|STSM|ATOMS"),
    "global": (None, r"LDG|STG|LD|ST|RED|ATOM|ATOMG"),
    "copy": (None, r"LDGSTS"),  # from device to shared memory
    "bulk copy": (None, r"UTMALDG|UTMASTG|UTMAPF|UBLKCP"),  # the bytes are in a descriptor
    "local": (None, r"LDL|STL"),
    "tensor": (None, r"HGMMA|HMMA|QGMMA|IGMMA|DMMA|UTC\w*MMA"),
    "tensor memory": (None, r"LDTM|STTM|UTCBAR|UTCATOMSWS|UTCCP"),
    "barrier": (None, r"BAR"),
    "control": (
        None,
        r"BRA|BRX|JMP|CALL|RET|EXIT|BSSY|BSYNC|BREAK|NOP|WARPSYNC|WARPGROUP|WARPGROUPSET|DEPBAR|LDGDEPBAR|MEMBAR|ERRBAR|CGAERRBAR"
        r"|ENDCOLLECTIVE|FENCE|SYNCS|ELECT|NANOSLEEP|YIELD|CCTL|UCGABAR_\w+|LEPC|BMOV|ACQBULK|ARRIVES|KILL|PMTRIG|BPT",
    ),
    "uniform": (None, r"U[A-Z]\w*"),  # one for all of a warp
}
_CLASS = [(name, re.compile(pattern)) for name, (_, pattern) in CLASSES.items()]

LANES = 32  # of a warp
_BITS = re.compile(r"\.(?:U|S)?(8|16|32|64|128)(?=\.|$)")
_HGMMA = re.compile(r"[A-Z]+\.(\d+)x(\d+)x(\d+)")
_HMMA = {"16816": (16, 8, 16), "1688": (16, 8, 8), "884": (8, 8, 4), "16832": (16, 8, 32)}


def class_of(instruction: Instruction) -> str:
    """ "other" where no class has it."""
    return next((name for name, pattern in _CLASS if pattern.fullmatch(instruction.name)), "other")


def bytes_of(instruction: Instruction) -> int:
    """What a load or a store moves for one lane."""
    if instruction.name in ("LDSM", "STSM"):  # matrices of 8 x 8 numbers of 16 bits
        matrices = re.search(r"MT?88\.(\d)", instruction.opcode)
        return 4 * int(matrices[1] if matrices else 1)
    found = _BITS.search(instruction.opcode)
    return int(found[1]) // 8 if found else 4


def flops_of(instruction: Instruction) -> float | None:
    """Of a product in the tensor cores, by a lane's share; None where the opcode does not tell the shape."""
    if group := _HGMMA.match(instruction.opcode):  # by a group of four warps
        m, n, k = map(int, group.groups())
        return 2 * m * n * k / (4 * LANES)
    for part in instruction.opcode.split("."):
        if part in _HMMA:
            m, n, k = _HMMA[part]
            return 2 * m * n * k / LANES
    return None


def operand_bytes_of(instruction: Instruction) -> float:
    """What HGMMA reads of shared memory, by a lane's share: B, and A where it is not in registers."""
    shape = _HGMMA.match(instruction.opcode)
    if instruction.name != "HGMMA" or shape is None:
        return 0.0
    m, n, k = map(int, shape.groups())
    size = 4 if ".TF32" in instruction.opcode else 2
    first_is_shared = instruction.operands.split(",")[1].strip().startswith("gdesc")
    return size * k * (n + (m if first_is_shared else 0)) / (4 * LANES)


def count(instructions: Iterable[Instruction]) -> defaultdict[str, float]:
    """What a lane executes: instructions, those of each class, bytes by where they go, FLOPs, exponentials.

    Of predicated instructions all count, as they take their slots.
    """
    found: defaultdict[str, float] = defaultdict(float)
    for one in instructions:
        kind = class_of(one)
        found["instructions"] += 1
        found[kind] += 1
        found["exponentials"] += one.opcode.startswith("MUFU.EX2")
        if kind in ("shared", "copy"):
            found["shared bytes"] += bytes_of(one)
        if kind in ("global", "copy"):
            stores = one.name in ("STG", "ST", "RED")
            found["stored bytes" if stores else "loaded bytes"] += bytes_of(one)
        if kind == "tensor":
            flops = flops_of(one)
            found["tensor FLOPs" if flops is not None else "tensor products of unknown shape"] += flops or 1
            found["shared bytes"] += operand_bytes_of(one)
    return found
