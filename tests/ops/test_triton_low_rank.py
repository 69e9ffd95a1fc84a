"""The Triton kernel of low_rank where there is no GPU: interpreted, compiled, and left alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

from factorlm.ops import low_rank as module
from factorlm.ops.kernels import has_triton
from factorlm.ops.low_rank import FEW_TOKENS, fits_one_launch, low_rank

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
KERNEL = torch.tensor(7.0)
"""What stands for the kernel's result."""
SHARED_MEMORY = 99 * 1024
"""What every GPU from compute capability 8.0 on gives to a program."""


@on_linux
@pytest.mark.parametrize(("capability", "chained"), [(80, False), (90, False), (90, True)])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("width_in", "num_parts"), [(256, 1), (4096, 8)])
def test_compiles_for_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    chained: bool,
    dtype: str,
    width_in: int,
    num_parts: int,
) -> None:
    """As far as the machine code, with memory that a GPU has, and the order that the docstring
    promises: release after what it releases is stored, acquire before that is read, and nothing
    that the kernel before may use or write is touched before that one has ended."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, shared = compiled(capability, dtype, chained, width_in, num_parts)
    assert shared <= SHARED_MEMORY
    assert "tf32" not in ptx
    *stored, ended = places(ptx, "atom.global.gpu.acq_rel.add")
    assert len(stored) == (num_parts > 1)  # the parts of a block of h are counted
    waits = places(ptx, "ld.global.gpu.acquire") + places(ptx, "atom.global.gpu.acquire.add")
    for counted in stored:
        assert_threads_meet(ptx, accesses(ptx, "st", "parts"), [counted])
        assert_threads_meet(ptx, [counted], accesses(ptx, "ld", "parts"))
        assert_threads_meet(ptx, [counted], accesses(ptx, "st", "h"))
    assert_threads_meet(ptx, accesses(ptx, "st", "h"), [ended])
    assert_threads_meet(ptx, waits, accesses(ptx, "ld", "h"))
    assert_threads_meet(ptx, waits, accesses(ptx, "st", "y"))
    for at in accesses(ptx, "ld", "h") + (accesses(ptx, "ld", "parts") if stored else []):
        assert ptx.startswith("ld.global.cg", at)
    before = places(ptx, "griddepcontrol.wait")
    assert len(places(ptx, "griddepcontrol.launch_dependents")) == len(before) == chained
    for end in before:
        assert places(ptx, "griddepcontrol.launch_dependents")[0] < min(places(ptx, "ld.global"))
        assert min(accesses(ptx, "ld", "V")) < end  # fetched meanwhile
        assert end < min(accesses(ptx, "ld", "x") + accesses(ptx, "st", "h"))
        assert not stored or end < min(accesses(ptx, "st", "parts"))


def places(text: str, part: str) -> list[int]:
    """Where ``part`` begins, in order."""
    return [found.start() for found in re.finditer(re.escape(part), text)]


ARGUMENTS = ("x", "V", "U", "bias", "y", "h", "parts", "counters")
"""The pointers, in the kernel's order."""


def accesses(ptx: str, operation: str, argument: str) -> list[int]:
    """Where the kernel loads (ld) or stores (st) at addresses computed from an argument."""
    place = ARGUMENTS.index(argument)
    (first,) = re.findall(rf"ld\.param\.b64\s+(%rd\d+), \[_kernel_param_{place}\];", ptx)
    moves = re.findall(r"(?:add|mad|mov)\.[\w.]+\s+(%rd\d+), ([^;]*);", ptx)
    addresses, known = {first}, 0
    while known < len(addresses):
        known = len(addresses)
        addresses |= {to for to, of in moves if addresses.intersection(re.findall(r"%rd\d+", of))}
    every = re.finditer(rf"\b{operation}\.global[^;]*\[ (%rd\d+) \+ \d+ \]", ptx)
    found = [one.start() for one in every if one[1] in addresses]
    assert found
    return found


def assert_threads_meet(ptx: str, before: list[int], after: list[int]) -> None:
    """Between all of the one and all of the other."""
    assert max(before) < min(after)
    assert "bar.sync" in ptx[max(before) : min(after)]


def compiled(
    capability: int, dtype: str, chained: bool, width_in: int, num_parts: int
) -> tuple[str, int]:
    """PTX of ``width_in`` -> 256 -> 4096, and its bytes of shared memory, as a launch would have
    it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from factorlm.ops import triton_low_rank as kernel

    itemsize = 4 if dtype == "fp32" else 2
    assert kernel.num_parts(width_in, 256, itemsize, 108) == num_parts
    constants = {
        "NUM_PARTS": num_parts,
        "BLOCK_N": kernel.MAX_TOKENS,
        "BLOCK_R": kernel.BLOCK_R,
        "BLOCK_O": kernel.BLOCK_O,
        "BLOCK_K": kernel.BLOCK_BYTES // itemsize,
        "CHAINED": chained,
        "WIDEN": False,
    }
    pointers = dict.fromkeys(("x", "V", "U", "bias", "y", "h"), f"*{dtype}")
    pointers |= {"parts": "*fp32", "counters": "*i32"}
    names = kernel._kernel.arg_names
    assert tuple(names[: len(ARGUMENTS)]) == ARGUMENTS
    types = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names
    }
    place = {name: (index,) for index, name in enumerate(names)}
    aligned = (*pointers, "width_in", "rank", "width_out")
    source = ASTSource(
        kernel._kernel,
        types,
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"launch_pdl": chained})
    assert binary.asm["cubin"]
    return str(binary.asm["ptx"]), int(binary.metadata.shared)


@on_linux
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "sizes", [(1, 1), (768, 192), (4096, 1024), (16384, 4096), (65536, 16), (1024, 992)]
)
def test_parts_are_a_power_of_two_within_their_limits(
    itemsize: int, sizes: tuple[int, int]
) -> None:
    from factorlm.ops import triton_low_rank as kernel

    width_in, rank = sizes
    parts = kernel.num_parts(width_in, rank, itemsize, 132)
    blocks = -(-rank // kernel.BLOCK_R)
    assert parts & (parts - 1) == 0
    assert 1 <= parts <= kernel.MAX_PARTS
    assert parts == 1 or parts * blocks <= 2 * 132
    assert parts == 1 or blocks + 2 <= kernel.COUNTERS_OF_A_LAUNCH
    assert (parts - 1) * kernel.BLOCK_BYTES < width_in * itemsize


@pytest.mark.parametrize(
    ("capability", "starts_early"), [((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_parameters_let_a_launch_start_early_where_the_device_can(
    weights: tuple[Tensor, Tensor, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    starts_early: bool,
) -> None:
    """Other tensors may be computed by the kernel before."""
    monkeypatch.setattr(module, "_starts_early", module._starts_early.__wrapped__)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    V, U, _ = weights
    cuda = torch.device("cuda", 0)
    assert module._can_chain(cuda, nn.Parameter(V), nn.Parameter(U)) == starts_early
    assert not module._can_chain(cuda, V, nn.Parameter(U))
    assert not module._can_chain(cuda, nn.Parameter(V), U)
    assert not module._can_chain(torch.device("cpu"), nn.Parameter(V), nn.Parameter(U))


@on_linux
@pytest.mark.usefixtures("_kernel_is_there")
@torch.no_grad()
def test_a_graph_chains_what_was_compared_in_both_forms(
    weights: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    launches: list[bool] = []

    def fused(*tensors: Tensor, chained: bool) -> Tensor:
        launches.append(chained)
        return linear(linear(*tensors[:2]), *tensors[2:])

    def launched(*factors: Tensor, captured: bool) -> list[bool]:
        launches.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
        low_rank(x, *factors, bias)
        return launches

    monkeypatch.setattr(module, "_fused", fused)
    monkeypatch.setattr(module, "_starts_early", lambda device: True)
    x = torch.randn(3, 8).as_subclass(OnGPU)
    V, U, bias = weights
    parameters = nn.Parameter(V), nn.Parameter(U)
    monkeypatch.setattr(module, "fits_one_launch", lambda *tensors: True)
    assert launched(V, U, captured=False) == [False]
    assert launched(V, U, captured=True) == [False]
    assert launched(*parameters, captured=True) == []  # no chained form was compiled yet
    assert launched(*parameters, captured=False) == [False, True]
    assert launched(*parameters, captured=False) == [False]
    assert launched(*parameters, captured=True) == [True]
    assert launched(V, U, captured=True) == [False]


@on_linux
@pytest.mark.usefixtures("_kernel_is_there")
@torch.no_grad()
def test_a_kernel_whose_chained_form_differs_is_not_used(
    weights: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fused(*tensors: Tensor, chained: bool) -> Tensor:
        return (1.1 if chained else 1.0) * linear(linear(*tensors[:2]), *tensors[2:])

    monkeypatch.setattr(module, "_fused", fused)
    monkeypatch.setattr(module, "_starts_early", lambda device: True)
    x, (V, U, bias) = torch.randn(3, 8), weights
    low_rank(x, V, U, bias)  # has no such form
    with pytest.warns(UserWarning, match="differs by 0.1"):
        low_rank(x, nn.Parameter(V), nn.Parameter(U), bias)
    assert list(module._AGREES.values()) == [True, False]


class OnGPU(Tensor):
    """Says that it is on a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture
def weights() -> tuple[Tensor, Tensor, Tensor]:
    """V, U, bias of 8 -> 4 -> 6."""
    draw = torch.Generator().manual_seed(0)
    V, U, bias = (torch.randn(s, generator=draw) for s in ((4, 8), (6, 4), (6,)))
    return V, U, bias


@pytest.fixture
def _kernel_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_has_kernel", lambda x: True)
    monkeypatch.setattr(module, "_AGREES", {})


def test_on_a_cpu_there_are_two_matmuls(
    weights: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_one_launch", None)
    V, U, bias = weights
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert fits_one_launch(x, V, U, bias)
        assert torch.equal(low_rank(x, V, U, bias), linear(linear(x, V), U, bias))


def test_few_tokens_without_gradients_fit_one_launch(
    weights: tuple[Tensor, Tensor, Tensor],
) -> None:
    V, U, bias = weights
    parameters = nn.Parameter(V), nn.Parameter(U), nn.Parameter(bias)
    x = torch.randn(2, FEW_TOKENS // 2, 8)
    assert not fits_one_launch(x, V, U, bias)
    with torch.no_grad():
        assert fits_one_launch(x, V, U)
        assert fits_one_launch(x, *parameters)
        assert fits_one_launch(x.half(), V.half(), U.half(), bias.half())
        with FlopCounterMode(display=False):
            assert not fits_one_launch(x, V, U, bias)
        torch.func.vmap(lambda row: check_not(row, V, U, bias))(x)


def check_not(x: Tensor, V: Tensor, U: Tensor, bias: Tensor) -> Tensor:
    assert not fits_one_launch(x, V, U, bias)
    return x


class Other(Tensor):
    """May do anything."""


OTHERS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "too many": lambda x, V, U, b: (torch.randn(FEW_TOKENS + 1, 8), V, U, b),
    "none": lambda x, V, U, b: (x[:0], V, U, b),
    "strided": lambda x, V, U, b: (torch.randn(8, 3).t(), V, U, b),
    "shifted": lambda x, V, U, b: (torch.randn(25)[1:].view(3, 8), V, U, b),
    "strided V": lambda x, V, U, b: (x, torch.randn(8, 4).t(), U, b),
    "width": lambda x, V, U, b: (x[:, :7].contiguous(), V, U, b),
    "rank": lambda x, V, U, b: (x, V, U[:, :3].contiguous(), b),
    "bias": lambda x, V, U, b: (x, V, U, b[:1]),
    "dtypes": lambda x, V, U, b: (x, V, U.bfloat16(), b),
    "devices": lambda x, V, U, b: (x, V, U.to("meta"), b),
    "float64": lambda x, V, U, b: (x.double(), V.double(), U.double(), b.double()),
    "class": lambda x, V, U, b: (x, V.as_subclass(Other), U, b),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_what_does_not_fit_one_launch(
    weights: tuple[Tensor, Tensor, Tensor], change: Callable[..., tuple[Tensor, ...]]
) -> None:
    with torch.no_grad():
        assert not fits_one_launch(*change(torch.randn(3, 8), *weights))


def test_autocast_that_casts_does_not_fit(weights: tuple[Tensor, Tensor, Tensor]) -> None:
    x = torch.randn(3, 8)
    narrow = [tensor.bfloat16() for tensor in (x, *weights)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fits_one_launch(x, *weights)
        assert fits_one_launch(*narrow)


@pytest.mark.usefixtures("_kernel_is_there")
def test_where_there_is_a_kernel_few_tokens_take_it(
    weights: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_one_launch", lambda x, V, U, b: KERNEL.expand(len(x), len(U)))
    V, U, bias = weights
    x = torch.randn(3, 8)
    plain = linear(linear(x, V), U, bias)
    assert torch.equal(low_rank(x, V, U, bias), plain)
    with torch.no_grad():
        assert torch.equal(low_rank(x.view(3, 1, 8), V, U, bias), KERNEL.expand(3, 1, 6))
        assert torch.equal(low_rank(x[0], V, U, bias), KERNEL.expand(6))
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert torch.equal(low_rank(x, V, U, bias), plain)


def test_the_kernel_is_launched_on_the_device_of_its_tensors(
    weights: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton launches on the current one, which the tensors need not be on."""
    x, events = torch.randn(3, 8), []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        events.append(tensor)
        yield
        events.append("back")

    def launch(*tensors: Tensor, chained: bool) -> Tensor:
        events.append("launch")
        return KERNEL

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    fake = SimpleNamespace(fused_low_rank=launch)
    monkeypatch.setitem(sys.modules, "factorlm.ops.triton_low_rank", fake)
    assert module._fused(x, *weights) is KERNEL
    assert events == [x, "launch", "back"]


@on_linux
@pytest.mark.usefixtures("_kernel_is_there")
def test_a_kernel_that_differs_or_fails_is_not_used(
    weights: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(x: Tensor, *rest: Tensor, chained: bool) -> Tensor:
        raise RuntimeError("no compiler")

    def differs(x: Tensor, V: Tensor, U: Tensor, bias: Tensor, *, chained: bool) -> Tensor:
        return 1.1 * linear(linear(x, V), U, bias)

    def is_nan(x: Tensor, *rest: Tensor, chained: bool) -> Tensor:
        return torch.full((len(x), 6), torch.nan)

    x = torch.randn(3, 8)
    plain = linear(linear(x, *weights[:1]), *weights[1:])
    cases = ((fails, "no compiler"), (differs, "differs by 0.1"), (is_nan, "differs by nan"))
    for broken, words in cases:
        module._AGREES.clear()
        monkeypatch.setattr(module, "_fused", broken)
        with torch.no_grad():
            with pytest.warns(UserWarning, match=words):
                assert torch.equal(low_rank(x, *weights), plain)
            assert torch.equal(low_rank(x, *weights), plain)


@on_linux
@pytest.mark.usefixtures("_kernel_is_there")
def test_a_result_that_is_not_finite_says_nothing_about_the_kernel(
    weights: tuple[Tensor, Tensor, Tensor],
) -> None:
    with torch.no_grad():
        assert low_rank(torch.full((1, 8), torch.inf), *weights).isnan().any()
    assert not module._AGREES


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not has_triton.__wrapped__()


@torch.no_grad()
def test_forward_derivatives_take_the_matmuls() -> None:
    """``torch.no_grad`` does not stop them, and the kernel has none."""
    x, V, U = torch.randn(2, 16), torch.randn(4, 16), torch.randn(8, 4)
    assert fits_one_launch(x, V, U)
    with torch.autograd.forward_ad.dual_level():
        assert not fits_one_launch(x, V, U)
