"""What the Triton kernels share: the counter-based noise of the core, guidance, and the selection of top-k.

All arithmetic on logits and probabilities is float32. A row is read in blocks of columns, several times; all passes but
the first find it in a cache of the device.
"""

# mypy: disable-error-code="misc,no-untyped-def,type-arg"
# Triton compiles these functions from their source and reads no annotations.
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_SEED_SALT = tl.constexpr(0x8BB84B93962EACC9)
_GUMBEL_SALT = tl.constexpr(0x2D358DCCAA6C78A5)
_ITERATION_GAMMA = tl.constexpr(0xD1B54A32D192ED03)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_LOW_63 = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_UNIT = tl.constexpr(2.0**-63)
_LARGEST_U = tl.constexpr(1.0 - 2.0**-24)
_TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
_SIGN = tl.constexpr(0x80000000)
_NUM_PURPOSES = tl.constexpr(5)  # sjd_vllm.core.Purpose


@triton.jit
def mix(x):
    """SplitMix64's output function, on uint64."""
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit
def to_unit(bits):
    """63 of 64 random bits as a float32 in [0, 1)."""
    return tl.minimum((bits & _LOW_63).to(tl.int64).to(tl.float32) * _UNIT, _LARGEST_U)


@triton.jit
def gumbel_key(seed, position):
    """The key of a position's Gumbel noise; seed and position are int64."""
    seed_key = mix(seed.to(tl.uint64) * _GAMMA + _SEED_SALT)
    return mix(mix(seed_key ^ _GUMBEL_SALT) + position.to(tl.uint64) * _GAMMA)


@triton.jit
def gumbel_noise(key, token_ids):
    """-log(-log(1 - u)) for each token id."""
    u = to_unit(mix(key + token_ids.to(tl.uint64) * _GAMMA))
    # A device's logarithm has a small absolute error, which near log(1) is a large relative one; and small u is where
    # the noise that wins comes from. So for them: 2 artanh(s), s = u / (2 - u), as a series in s^2 <= 1/9.
    s = tl.math.div_rn(u, 2.0 - u)
    square = s * s
    series = 1.0 / 13.0 + square * (1.0 / 15.0)
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    small = 2.0 * s * (1.0 + square * series)
    exponential = tl.where(u <= 0.5, small, -tl.log(1.0 - u))
    return -tl.log(tl.maximum(exponential, _TINY))


@triton.jit
def step_key(seed, iteration):
    """The key of a request's step, for `uniform`."""
    seed_key = mix(seed.to(tl.uint64) * _GAMMA + _SEED_SALT)
    return mix(seed_key + iteration.to(tl.uint64) * _ITERATION_GAMMA)


@triton.jit
def uniform(key, position, purpose: tl.constexpr):
    """CounterNoise's uniform number for a position and a purpose."""
    counter = position * _NUM_PURPOSES + purpose
    return to_unit(mix(key + counter.to(tl.uint64) * _GAMMA))


@triton.jit
def mixed_logits(cond_ptr, uncond_ptr, scale, columns, is_in):
    """Guided logits of some columns in float32; -inf where not `is_in`. Scale 1 reads and is `cond` alone."""
    cond = tl.load(cond_ptr + columns, mask=is_in, other=float("-inf")).to(tl.float32)
    # in the shape of a block first: the interpreter (3.9) spreads a scalar truth value as a float
    scale = tl.zeros_like(cond) + scale
    is_guided = is_in & (scale != 1.0) & (cond != float("-inf"))
    uncond = tl.load(uncond_ptr + columns, mask=is_guided, other=0.0).to(tl.float32)
    base = tl.where(is_guided, cond, 0.0)
    difference = base - uncond
    # torch.lerp's two branches, which are exact at either end
    low = uncond + scale * difference
    high = base - difference * (1.0 - scale)
    return tl.where(is_guided, tl.where(tl.abs(scale) < 0.5, low, high), cond)


@triton.jit
def order_key(values):
    """uint32 in the order of float32; -0.0 and 0.0 are equals."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.uint32, bitcast=True)
    return tl.where(bits >= _SIGN, ~bits, bits | _SIGN)


@triton.jit
def count_digit(counts, keys, prefix, shift: tl.constexpr, is_in):
    """Add to counts [256] how often each value of the 8 bits from `shift` stands in the keys that begin with `prefix`.

    prefix holds the bits above those 8.
    """
    is_match = is_in
    if shift < 24:
        is_match = is_in & ((keys >> (shift + 8)) == prefix)
    return counts + tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=is_match)


@triton.jit
def take_digit(counts, prefix, rank):
    """The digit that the rank-th highest key has: the prefix with it, and the rank among those that share it."""
    digits = tl.arange(0, 256)
    at_least = tl.cumsum(counts, reverse=True)
    digit = tl.sum((at_least >= rank).to(tl.int32)) - 1
    above = tl.sum(tl.where(digits > digit, counts, 0))
    return (prefix << 8) | digit.to(tl.uint32), rank - above


@triton.jit
def keep_top(keys, threshold, num_tied, num_tied_before, is_in):
    """Which columns of a block survive top-k, and how many tied up to its end; the lowest columns among equals."""
    is_tied = is_in & (keys == threshold)
    rank = num_tied_before + tl.cumsum(is_tied.to(tl.int32))
    is_kept = is_in & ((keys > threshold) | (is_tied & (rank <= num_tied)))
    return is_kept, num_tied_before + tl.sum(is_tied.to(tl.int32))


def check_tensors(device_of: Tensor, **tensors: tuple[Tensor, str, tuple[int, ...]]) -> None:
    """Raise ValueError unless each (tensor, dtype's name, shape) is so, contiguous and on the device of the first."""
    for name, (tensor, dtype, shape) in tensors.items():
        found = str(tensor.dtype).removeprefix("torch.")
        if found != dtype or tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {found} {list(tensor.shape)}")
        if tensor.device != device_of.device:
            raise ValueError(f"{name} must be on {device_of.device}, got {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous")


def check_device(tensor: Tensor) -> None:
    """Raise ValueError on a CPU, where these kernels run under Triton's interpreter alone."""
    if tensor.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("the Triton kernels need a GPU (or, for tests, TRITON_INTERPRET=1); use sjd_vllm.core")


def block_size(num_columns: int) -> int:
    """Columns that a program reads at once."""
    return int(min(max(triton.next_power_of_2(num_columns), 16), 4096))
