"""Every kernel compiles, for chips that are not here, to what the design promises; and the checker can say no."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from concurrent.futures import Executor

import pytest
import torch

pytest.importorskip("triton")  # exists for Linux only

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from acs_triton import kernels
from acs_triton.kernels.launch import CONV_BLOCKS, IEEE_BLOCKS, SWAPPED_BLOCKS, Launch
from bench import compile_report
from bench.aot import TARGETS, Compiled, compile_launch
from bench.assembly import AMDGCN, PTX, main_loop
from bench.compile_calls import DTYPES
from bench.compile_report import Row, cross_section, difference, pool, rows, start
from bench.contract import full_width, violations

GROUPS = [(target, dtype) for target in TARGETS for dtype in (*DTYPES, "bool") if (target, dtype) != ("gfx942", "tf32")]


@pytest.fixture(scope="module")
def workers() -> Iterator[Executor]:
    with pool() as executor:
        yield executor


@pytest.fixture(scope="module")
def shipped() -> dict[Row, Launch]:
    return rows()


def broken(workers: Executor, wanted: dict[Row, Launch]) -> dict[str, list[str]]:
    """The clauses that each row breaks, by row."""
    assert wanted
    found = {
        str(row): violations(wanted[row], future.result(), TARGETS[row.target])
        for row, future in start(workers, wanted).items()
    }
    return {row: clauses for row, clauses in found.items() if clauses}


@pytest.mark.parametrize("target, dtype", GROUPS)
def test_each_form_and_each_tile_keeps_the_contract(workers, shipped, target, dtype):
    chosen = cross_section(shipped)
    assert broken(workers, {row: chosen[row] for row in chosen if (row.target, row.dtype) == (target, dtype)}) == {}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("target, dtype", GROUPS)
def test_each_pair_of_form_and_tile_keeps_the_contract(workers, shipped, target, dtype):
    rest = shipped.keys() - cross_section(shipped).keys()
    wanted = {row: shipped[row] for row in shipped if row in rest and (row.target, row.dtype) == (target, dtype)}
    assert broken(workers, wanted) == {}


@pytest.mark.parametrize("target", TARGETS)
def test_no_tile_escapes(shipped, target):
    chosen = cross_section(shipped)
    for dtype in DTYPES if target != "gfx942" else ("fp16", "bf16", "fp32"):
        seen = {
            (launch.arguments["BLOCK_M"], launch.arguments["BLOCK_N"])
            for row, launch in chosen.items()
            if row.kernel == "conv_kernel" and (row.target, row.dtype) == (target, dtype)
        }
        assert seen == set(IEEE_BLOCKS if dtype == "fp32" else {*CONV_BLOCKS, *SWAPPED_BLOCKS}), dtype


def test_no_kernel_escapes(shipped):
    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"acs_triton.kernels.{name}") for name in names]
    functions = {
        value.__name__ for module in modules for value in vars(module).values() if isinstance(value, JITFunction)
    }
    launched = {name for name in functions if name.endswith("_kernel")}
    assert {row.kernel for row in shipped} == launched
    assert {row.kernel for row in cross_section(shipped)} == launched


@triton.jit
def product_kernel(
    x_ptr, weight_ptr, out_ptr, in_index_ptr, in_count_ptr, out_index_ptr,
    C_IN: tl.constexpr, IN_WIDTH: tl.constexpr, RUN: tl.constexpr, PRECISION: tl.constexpr, BY_COUNT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gathers rows of the weight [C_in + 1, BLOCK_N]; BY_COUNT: masked with a count as it was read."""
    count = tl.load(in_count_ptr)
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, tl.cdiv(count, BLOCK_K)):
        k = first * BLOCK_K + tl.arange(0, BLOCK_K)
        x_ptrs = x_ptr + offs_m[:, None] * IN_WIDTH + k[None, :]
        x = tl.load(x_ptrs, mask=(k < count)[None, :], other=0.0) if BY_COUNT else tl.load(x_ptrs)
        source = tl.load(in_index_ptr + k)
        w = tl.load(weight_ptr + source[:, None] * BLOCK_N + offs_n[None, :])
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    tl.store(out_ptr + offs_m[:, None] * BLOCK_N + offs_n[None, :], acc.to(out_ptr.dtype.element_ty))


def product(block_m=64, block_n=64, block_k=64, by_count=False, stages=4, warps=4, dtype=torch.float16) -> Launch:
    pointers = {"x_ptr": dtype, "weight_ptr": dtype, "out_ptr": dtype}
    lists = {"in_index_ptr": torch.int32, "in_count_ptr": torch.int32, "out_index_ptr": None}
    shape = {"C_IN": 256, "IN_WIDTH": 256, "RUN": 1, "PRECISION": "tf32", "BY_COUNT": by_count}
    arguments = {**pointers, **lists, **shape, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    return Launch(product_kernel, 1, arguments, num_warps=warps, num_stages=stages)


def clauses(launch: Launch, target: str = "sm_90") -> str:
    return "; ".join(violations(launch, compile_launch(launch, TARGETS[target]), TARGETS[target]))


@pytest.mark.parametrize("target", TARGETS)
def test_a_good_kernel_breaks_nothing(target):
    assert full_width(product().arguments)
    assert clauses(product(stages=2), target) == ""


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_count_as_a_mask_is_found(target):
    found = clauses(product(by_count=True), target)
    assert "copies of 16 bytes in the loop: the tiles take 8" in found and "loads of at most 16 bits" in found


@pytest.mark.parametrize("target, warps", [("sm_90", 4), ("gfx942", 1)])
def test_spilled_registers_are_found(target, warps):
    """The sums alone take all registers of a lane: 256 on sm_90, 512 on gfx942."""
    launch = product(block_m=256, block_n=128, block_k=16, stages=1, warps=warps)
    compiled = compile_launch(launch, TARGETS[target])
    assert compiled.stack > 0
    assert "bytes of stack" in "; ".join(violations(launch, compiled, TARGETS[target]))


@pytest.mark.parametrize("target", TARGETS)
def test_too_much_shared_memory_is_found(target):
    stages = 6 if target == "gfx942" else 16
    assert "bytes of shared memory, the chip has" in clauses(product(block_m=128, block_n=128, stages=stages), target)


def test_matrix_units_that_are_not_used_are_found():
    assert "multiplies with mma.sync instead of wgmma" in clauses(product(block_m=32))


def test_rounded_float32_is_found():
    launch = product(dtype=torch.float32)
    compiled = compile_launch(launch, TARGETS["sm_80"])
    ieee = Launch(launch.kernel, 1, {**launch.arguments, "PRECISION": "ieee"}, 4, 4)
    assert "rounded" in "; ".join(violations(ieee, compiled, TARGETS["sm_80"]))


def test_what_does_not_compile_is_found():
    launch = product()
    assert "does not compile" in clauses(Launch(launch.kernel, 1, {**launch.arguments, "BLOCK_M": 48}, 4, 2))
    assert violations(launch, Compiled(error="why"), TARGETS["sm_90"]) == ["does not compile: why"]


@pytest.mark.parametrize(
    "changed, wide",
    [
        ({}, True),
        ({"IN_WIDTH": 100}, False),
        ({"out_index_ptr": torch.int32}, False),
        ({"out_index_ptr": torch.int32, "RUN": 8}, True),
        ({"x_ptr": torch.float32, "weight_ptr": torch.float32}, False),
        ({"x_ptr": torch.float32, "weight_ptr": torch.float32, "RUN": 4}, True),
        ({"in_index_ptr": None, "C_IN": 100}, False),
    ],
)
def test_where_full_width_is_promised(changed, wide):
    assert full_width({**product().arguments, **changed}) is wide


def test_a_loop_is_found_wherever_its_blocks_lie():
    """The block that closes the loop stands before its head; inline assembly brings a label of its own."""
    text = """
    ld.global.b16 %rs1, [%rd1];
    bra.uni $L__BB0_2;
$L__BB0_1: // in the loop
    {
    waitLoop:
    @!complete bra.uni waitLoop;
    }
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
    @%p1 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4;
    @%p2 bra $L__BB0_2;
    bra.uni $L__BB0_3;
$L__BB0_2:
    @%p3 ld.global.b16 %rs1, [%rd1];
    ld.global.v2.b16 {%rs1, %rs2}, [%rd1];
    @%p3 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r3, %p4;
    bra.uni $L__BB0_1;
$L__BB0_3:
    cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10;
    ret;
"""
    loop = main_loop(text, PTX)
    assert loop is not None
    assert (loop.instructions, loop.copies16, loop.copies_narrow, loop.scalar_loads) == (8, 1, 1, 1)
    assert loop.matrix == {"tcgen05": 1}
    assert main_loop("v_add_u32 v1, v1, v2\ns_endpgm", AMDGCN) is None


def test_differences_name_what_changed():
    old = {"a": {"registers": 64, "stack": 0}, "b": {"registers": 1}, "c": {"registers": 2}}
    new = {"a": {"registers": 72, "stack": 0}, "c": {"registers": 2}, "d": {"registers": 3}}
    assert difference(old, new) == ["- b", "+ d: registers 3", "~ a: registers 64 -> 72"]


@pytest.mark.parametrize("arguments, status", [([], 0), (["--check"], 1), (["--write"], 0)])
def test_the_command_compares_writes_and_checks(arguments, status, tmp_path, monkeypatch, capsys):
    row = "sm_90 compact_kernel bool 64 by 1 64 w4 s2"
    committed = tmp_path / "results" / "compile_report.json"
    monkeypatch.setattr(compile_report, "COMMITTED", committed)
    monkeypatch.setattr(compile_report, "table", lambda wanted: ({str(each): {"registers": 18} for each in wanted}, {}))
    assert compile_report.main(["--targets", "sm_90", "--filter", row, *arguments]) == status
    assert committed.exists() == ("--write" in arguments)
    if committed.exists():
        assert compile_report.main(["--targets", "sm_90", "--filter", row, "--check"]) == 0
    assert row in capsys.readouterr().out
