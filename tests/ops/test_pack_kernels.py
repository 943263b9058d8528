"""The CUDA pack kernel's own source, run on the CPU by the emulator, against the CPU op."""

from __future__ import annotations

import ctypes
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from made_once import made_once, shared_folder
from torch import Tensor

from ddit_rt import ops

ROOT = Path(__file__).parents[2]
GUARD = 64  # values before and after each tensor that no kernel may touch
FLUX = (1, 16, 1, 128, 128)
WAN_480P = (1, 16, 21, 60, 104)
WAN_720P = (1, 16, 21, 90, 160)


@dataclass(frozen=True)
class Layout:
    """Sizes of latents `[B, C, F, H, W]` and how a patch is cut from them."""

    latents: tuple[int, int, int, int, int]
    patch: int
    channels_last: bool = False

    def numbers(self) -> ctypes.Array[ctypes.c_int64]:
        last = int(self.channels_last)
        return (ctypes.c_int64 * 7)(*self.latents, self.patch, last)

    def pack(self, latents: Tensor) -> Tensor:
        return ops.pack(latents, self.patch, channels_last=self.channels_last)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    flags.append("-fsanitize=alignment")  # the library itself says what then happens
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    source = ROOT / "tests" / "native" / "pack_kernels.cpp"

    def build(library: Path) -> None:
        subprocess.run(["g++", *flags, *includes, str(source), "-o", str(library)], check=True)

    return ctypes.CDLL(str(made_once(shared_folder(tmp_path_factory) / "pack_kernels.so", build)))


def address(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def guarded(like: Tensor, offset: int) -> tuple[Tensor, Tensor]:
    """NaN everywhere: a buffer, and the tensor in it, `offset` values from where it is aligned."""
    whole = torch.full((like.numel() + 2 * GUARD,), torch.nan, dtype=like.dtype)
    return whole, whole[GUARD + offset : GUARD + offset + like.numel()].view(like.shape)


def plan(
    kernels: ctypes.CDLL, layout: Layout, item: int, latents: object = None, tokens: object = None
) -> tuple[int, ...]:
    """Unit, bytes of an access to latents and to tokens, threads of a block, blocks."""
    numbers = (ctypes.c_int64 * 5)()
    kernels.plan_pack(layout.numbers(), ctypes.c_int64(item), latents, tokens, numbers)
    return tuple(numbers)


def assert_equals_cpu(
    kernels: ctypes.CDLL, layout: Layout, dtype: torch.dtype, offsets: tuple[int, int] = (0, 0)
) -> tuple[int, ...]:
    latents = torch.randn(layout.latents).to(dtype)
    tokens = layout.pack(latents)
    around_latents, own_latents = guarded(latents, offsets[0])
    around_tokens, own_tokens = guarded(tokens, offsets[1])
    pointers = (address(own_latents), address(own_tokens))
    item = ctypes.c_int64(latents.element_size())

    own_latents.copy_(latents)
    kernels.emulate_pack(layout.numbers(), item, *pointers, ctypes.c_bool(True))
    assert torch.equal(own_tokens, tokens)
    assert around_tokens.isnan().sum() == 2 * GUARD
    own_latents.fill_(torch.nan)
    kernels.emulate_pack(layout.numbers(), item, *pointers, ctypes.c_bool(False))
    assert torch.equal(own_latents, latents)
    assert around_latents.isnan().sum() == 2 * GUARD
    return plan(kernels, layout, latents.element_size(), *pointers)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "p", "dtype"),
    [
        *[(FLUX, p, dtype) for p in (1, 2, 4, 8) for dtype in (torch.float32, torch.bfloat16)],
        *[(size, 2, torch.bfloat16) for size in (WAN_480P, WAN_720P)],
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_pack_equals_cpu_at_real_sizes(
    kernels: ctypes.CDLL,
    size: tuple[int, int, int, int, int],
    p: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> None:
    assert_equals_cpu(kernels, Layout(size, p, channels_last=channels_last), dtype)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("latent_offset", [0, 1, 2, 4])
@pytest.mark.parametrize("token_offset", [0, 1, 2, 4])
def test_accesses_are_as_wide_as_addresses_allow(
    kernels: ctypes.CDLL, channels_last: bool, latent_offset: int, token_offset: int
) -> None:
    # Values of 2 bytes, so offsets of 1, 2 and 4 leave addresses that 2, 4 and 8 divide.
    layout = Layout((1, 16, 2, 8, 32), 2, channels_last=channels_last)
    offsets = (latent_offset, token_offset)
    unit, *accesses, _, _ = assert_equals_cpu(kernels, layout, torch.bfloat16, offsets)
    widths = [2 * offset if offset else 16 for offset in offsets]
    if channels_last:
        assert (unit, accesses) == (2, widths)
    elif min(widths) > 2:
        assert (unit, accesses) == (4, widths)  # two values of a line stay together
    else:
        # Pairs would lie across accesses. Single values of two lines are not neighbours in a token.
        assert (unit, accesses[1]) == (2, 2)
        assert accesses[0] == widths[0]


@pytest.mark.parametrize(
    ("layout", "item", "accesses"),
    [
        (Layout(FLUX, 2), 2, (4, 16, 16)),
        (Layout(FLUX, 2), 4, (8, 16, 16)),
        (Layout(FLUX, 4), 2, (8, 16, 16)),
        (Layout(FLUX, 8), 2, (16, 16, 16)),
        (Layout(WAN_720P, 2), 2, (4, 16, 16)),
        (Layout(WAN_480P, 2), 2, (4, 16, 16)),
        (Layout(WAN_720P, 2, channels_last=True), 2, (2, 16, 16)),
        (Layout(WAN_480P, 2, channels_last=True), 4, (4, 16, 16)),
        (Layout((1, 48, 21, 44, 80), 2, channels_last=True), 2, (2, 16, 16)),
        (Layout((1, 16, 21, 160, 90), 2), 2, (4, 4, 16)),  # lines of 180 bytes
        (Layout((1, 17, 1, 128, 128), 2), 2, (4, 16, 8)),  # tokens of 136 bytes
        (Layout((1, 17, 1, 128, 128), 2, channels_last=True), 2, (2, 16, 2)),  # pixels of 34
        (Layout((1, 16, 1, 96, 96), 3), 2, (2, 2, 2)),  # runs of 6 bytes
        (Layout((1, 6, 3, 64, 64), 2, channels_last=True), 2, (2, 16, 4)),  # pixels of 12
    ],
)
def test_accesses_are_16_bytes_where_sizes_allow(
    kernels: ctypes.CDLL, layout: Layout, item: int, accesses: tuple[int, int, int]
) -> None:
    assert plan(kernels, layout, item)[:3] == accesses


def random_layout(choose: random.Random) -> Layout:
    p = choose.choice([1, 2, 3, 4, 5, 6, 8, 16])
    channels = choose.choice([1, 2, 3, 4, 7, 8, 16, 17, 33, 64])
    frames, rows, columns = choose.randint(1, 6), choose.randint(1, 4), choose.randint(1, 30)
    sizes = (choose.randint(1, 2), channels, frames, p * rows, p * columns)
    return Layout(sizes, p, choose.random() < 0.5)


@pytest.mark.parametrize("seed", range(30))
def test_pack_equals_cpu_at_odd_sizes(kernels: ctypes.CDLL, seed: int) -> None:
    choose = random.Random(seed)
    dtype = choose.choice([torch.float32, torch.float16])
    offsets = (choose.randint(0, 8), choose.randint(0, 8))
    assert_equals_cpu(kernels, random_layout(choose), dtype, offsets)


@pytest.mark.parametrize("p", [48, 96])
def test_pack_equals_cpu_with_large_patches(kernels: ctypes.CDLL, p: int) -> None:
    assert_equals_cpu(kernels, Layout((1, 7, 2, 96, 96), p), torch.bfloat16)
    assert_equals_cpu(kernels, Layout((1, 7, 2, 96, 96), p, True), torch.bfloat16)


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("size", "most"),
    # Lines of 208 bytes begin in the middle of a sector, so 128 bytes of them touch a fifth one.
    [(FLUX, 1.0), (WAN_720P, 1.0), (WAN_480P, 1.16)],
)
def test_warps_touch_whole_sectors(
    kernels: ctypes.CDLL,
    item: int,
    channels_last: bool,
    size: tuple[int, int, int, int, int],
    most: float,
) -> None:
    layout = Layout(size, 2, channels_last=channels_last)
    counts = (ctypes.c_int64 * 4)()
    kernels.count_traffic(layout.numbers(), ctypes.c_int64(item), counts)
    latent_bytes, latent_sectors, token_bytes, token_sectors = counts
    assert latent_bytes == token_bytes == item * torch.Size(size).numel()
    assert 32 * latent_sectors <= most * latent_bytes
    assert 32 * token_sectors == token_bytes


@pytest.mark.parametrize("item", [2, 4])
def test_blocks_are_enough_for_every_multiprocessor_at_flux_size(
    kernels: ctypes.CDLL, item: int
) -> None:
    for p in (2, 4, 8):
        *_, blocks = plan(kernels, Layout(FLUX, p), item)
        assert blocks >= 132  # of an H200


@pytest.mark.parametrize("p", [2, 4])
def test_addresses_do_not_overflow_32_bits(kernels: ctypes.CDLL, p: int) -> None:
    sizes = (3, 16, 500, 1024, 1024)  # 46 GiB in half precision
    ends = (ctypes.c_uint64 * 2)()
    kernels.end_of_tensors(Layout(sizes, p).numbers(), ctypes.c_int64(2), ends)
    assert list(ends) == [2 * torch.Size(sizes).numel()] * 2


def test_emulator_stops_at_misaligned_accesses(kernels: ctypes.CDLL) -> None:
    code = (
        "import ctypes, sys\n"
        "kernels, buffer = ctypes.CDLL(sys.argv[1]), (ctypes.c_int32 * 12)()\n"
        "aligned = (ctypes.addressof(buffer) + 15) // 16 * 16\n"
        "kernels.load_16_bytes(ctypes.c_void_p(aligned)); print('loaded', flush=True)\n"
        "kernels.load_16_bytes(ctypes.c_void_p(aligned + 8)); print('again')"
    )
    command = [sys.executable, "-c", code, kernels._name]
    result = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("loaded\n", "misaligned access\n")
    assert result.returncode == -signal.SIGABRT


def test_divisor_is_exact_for_31_bits(kernels: ctypes.CDLL) -> None:
    most = 2**31 - 1
    near = [2**k + d for k in range(31) for d in (-1, 0, 1)]
    divisors = sorted({d for d in near if 1 <= d <= most} | {3, 5, 6, 7, 45, 641, 65537, most})
    numbers = torch.randint(0, most, (1000,), dtype=torch.int32)
    for divisor in divisors:
        multiples = torch.arange(0, most + 1, max(divisor, most // 500), dtype=torch.int64)
        around = torch.cat([multiples, multiples - 1, torch.tensor([most])]).clamp(0, most).int()
        tested = torch.cat([numbers, around])
        quotients = torch.empty_like(tested)
        kernels.divide(
            ctypes.c_int64(divisor), address(tested), address(quotients),
            ctypes.c_int64(tested.numel()),
        )  # fmt: skip
        assert torch.equal(quotients, tested.div(divisor, rounding_mode="floor"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_on_the_gpu_equals_cpu(dtype: torch.dtype) -> None:
    choose = random.Random(0)
    flux, wan = Layout(FLUX, 2), Layout(WAN_720P, 2, channels_last=True)
    for layout in (flux, wan, *(random_layout(choose) for _ in range(40))):
        latents = torch.randn(layout.latents).to(dtype)
        tokens = layout.pack(latents)
        assert torch.equal(layout.pack(latents.cuda()).cpu(), tokens)
        _, _, frames, height, width = layout.latents
        last = layout.channels_last
        unpacked = ops.unpack(
            tokens.cuda(), layout.patch, height, width, frames, channels_last=last
        )
        assert torch.equal(unpacked.cpu(), latents)
