"""The Triton kernel of low_rank where there is no GPU: interpreted, compiled, and left alone."""

from __future__ import annotations

import os
import subprocess
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
from factorlm.ops.low_rank import FEW_TOKENS, fits_one_launch, has_triton, low_rank

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
KERNEL = torch.tensor(7.0)
"""What stands for the kernel's result."""
SHARED_MEMORY = 99 * 1024
"""What every GPU from compute capability 8.0 on gives to a program."""


@on_linux
@pytest.mark.slow
def test_in_the_interpreter() -> None:
    """All of ``interpreted_low_rank.py``, which says why it is a process of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    tests = Path(__file__).with_name("interpreted_low_rank.py")
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", str(tests)],
        env=env | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert found.returncode == 0, found.stdout[-5000:] + found.stderr[-2000:]


@on_linux
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("num_tokens", [1, 16, 64])
def test_compiles_for_a_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    dtype: str,
    num_tokens: int,
) -> None:
    """As far as the machine code, with memory that a GPU has, and the order that the docstring
    promises: release after the parts are stored, acquire before they are read."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx, shared = compiled(capability, dtype, num_tokens)
    assert shared <= SHARED_MEMORY
    assert "tf32" not in ptx
    assert ptx.count("atom.global.gpu.acq_rel.add") == 1
    acquires = [ptx.find(name) for name in ("ld.global.gpu.acquire", "atom.global.gpu.acquire.add")]
    acquire, load = max(acquires), ptx.find("ld.global.cg")
    assert 0 <= acquire < ptx.find("bar.sync", acquire) < load
    release = ptx.find("atom.global.gpu.acq_rel.add")
    assert "bar.sync" in ptx[ptx.rfind("st.global", 0, release) : release]


def compiled(capability: int, dtype: str, num_tokens: int) -> tuple[str, int]:
    """PTX of 1024 -> 256 -> 4096, and its bytes of shared memory, as a launch would have it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from factorlm.ops import triton_low_rank as kernel

    sizes = {"width_in": 1024, "rank": 256, "width_out": 4096}
    chosen = kernel.tiles(num_tokens, *sizes.values(), 4 if dtype == "fp32" else 2, 108)
    parts, block_n, block_o, block_k = chosen
    constants = dict(
        zip(
            ("NUM_PARTS", "BLOCK_N", "BLOCK_R", "BLOCK_O", "BLOCK_K", "WIDEN"),
            (parts, block_n, kernel.BLOCK_R, block_o, block_k, False),
            strict=True,
        )
    )
    pointers = dict.fromkeys(("x", "V", "U", "bias", "y"), f"*{dtype}")
    pointers |= {"parts": "*fp32", "counters": "*i32"}
    names = kernel._kernel.arg_names
    types = {
        name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names
    }
    places = {name: (place,) for place, name in enumerate(names)}
    source = ASTSource(
        kernel._kernel,
        types,
        {places[name]: value for name, value in constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in (*pointers, *sizes)},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert binary.asm["cubin"]
    return str(binary.asm["ptx"]), int(binary.metadata.shared)


@on_linux
@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 17, 64])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (768, 192, 3072), (4096, 1024, 11008), (16384, 4096, 4096)]
)
def test_tiles_are_powers_of_two_within_their_limits(
    num_tokens: int, itemsize: int, sizes: tuple[int, int, int]
) -> None:
    from factorlm.ops.triton_low_rank import BLOCK_R, tiles

    chosen = tiles(num_tokens, *sizes, itemsize, 132)
    assert all(size & (size - 1) == 0 for size in chosen)
    assert num_tokens <= chosen.block_n < 2 * num_tokens
    assert chosen.num_parts * -(-sizes[1] // BLOCK_R) <= max(132, -(-sizes[1] // BLOCK_R))
    assert chosen.num_parts * chosen.block_n * chosen.block_k <= 8192
    assert chosen.block_k >= 16  # the least that tl.dot sums over


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

    def launch(*tensors: Tensor) -> Tensor:
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
    def fails(x: Tensor, *rest: Tensor) -> Tensor:
        raise RuntimeError("no compiler")

    def differs(x: Tensor, V: Tensor, U: Tensor, bias: Tensor) -> Tensor:
        return 1.1 * linear(linear(x, V), U, bias)

    def is_nan(x: Tensor, *rest: Tensor) -> Tensor:
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
