"""What the attention kernels share about one head's vectors: norm, rotation, codes, and where a
token's vector lies in the cache.

Pages are laid out for a GPU. Full precision: [2, kv_heads, page_tokens, head_dim], keys first.
Low bits: for each of [2, kv_heads] the codes of all tokens of the page, then their scales, so
that codes are aligned to 16 bytes and can be read in wide pieces; the size is the same. Codes lie
in the order of their numbers, two to a byte at 4 bits, the first in the low one.

Tiles are [M, DP]: M vectors of D numbers, padded to the power of two DP. What is stored is what
``cache/formats.py`` says, bit by bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

FULL, INT8, FP8, INT4 = 0, 1, 2, 3
KINDS = {None: FULL, "int8": INT8, "fp8": FP8, "int4": INT4}


@triton.jit
def raw_heads(
    x_ptr,
    at,
    positions,
    ok,
    factor_ptr,
    cos_ptr,
    sin_ptr,
    D: tl.constexpr,
    DP: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """All that :func:`prepared` needs of the heads that start at ``at`` [M], asked for at once:
    what follows waits for the slowest of these loads instead of one after another."""
    dims = tl.arange(0, DP)
    start = x_ptr + at[:, None]
    x = tl.load(start + dims[None, :], mask=ok[:, None] & (dims < D)[None, :], other=0.0)
    y, cos, sin = x, x, x
    factor, other_factor = dims, dims
    if NORM:
        factor = tl.load(factor_ptr + dims, mask=dims < D, other=0.0)
    if ROTARY > 0:
        # The other number of each pair is loaded again, which is quicker than moving it between
        # threads.
        if INTERLEAVED:
            other = dims ^ 1
            frequency = dims // 2
        else:
            other = tl.where(dims < ROTARY // 2, dims + ROTARY // 2, dims - ROTARY // 2)
            frequency = dims % (ROTARY // 2)
        turns = dims < ROTARY
        both = ok[:, None] & turns[None, :]
        y = tl.load(start + other[None, :], mask=both, other=0.0)
        if NORM:
            other_factor = tl.load(factor_ptr + other, mask=turns, other=0.0)
        angle = positions.to(tl.int64)[:, None] * (ROTARY // 2) + frequency[None, :]
        cos = tl.load(cos_ptr + angle, mask=both, other=1.0)
        sin = tl.load(sin_ptr + angle, mask=both, other=0.0)
    return x, y, cos, sin, factor, other_factor


@triton.jit
def prepared(
    raw,
    eps,
    D: tl.constexpr,
    DP: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Heads normed and rotated: float32 [M, DP], zeros where they were not loaded."""
    x, y, cos, sin, factor, other_factor = raw
    x = x.to(tl.float32)
    y = y.to(tl.float32)
    if NORM:
        shrink = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        x = x * shrink * factor[None, :]
        y = y * shrink * other_factor[None, :]
    if ROTARY > 0:
        dims = tl.arange(0, DP)
        first = dims % 2 == 0 if INTERLEAVED else dims < ROTARY // 2
        x = x * cos + tl.where(first, -1.0, 1.0)[None, :] * (y * sin)
    return x


@triton.jit
def prepared_heads(
    x_ptr,
    at,
    positions,
    ok,
    factor_ptr,
    cos_ptr,
    sin_ptr,
    eps,
    D: tl.constexpr,
    DP: tl.constexpr,
    NORM: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Heads that start at ``at`` [M], normed and rotated: float32 [M, DP], zeros where not ok."""
    raw = raw_heads(
        x_ptr, at, positions, ok, factor_ptr, cos_ptr, sin_ptr, D, DP, NORM, ROTARY, INTERLEAVED
    )
    return prepared(raw, eps, D, DP, NORM, ROTARY, INTERLEAVED)


@triton.jit
def turned(x, M: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, ROOT: tl.constexpr):
    """Walsh-Hadamard products in blocks of the power of two in D; ROOT is 1 / sqrt(block).

    Sums are taken in the order of ``cache.formats.hadamard``, so that codes are the same."""
    for bit in tl.static_range(0, 9):
        if (1 << bit) < (D & -D):
            pairs = tl.reshape(x, (M, DP >> (bit + 1), 2, 1 << bit))
            low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            both = tl.permute(tl.join(low + high, low - high), (0, 1, 3, 2))
            x = tl.reshape(both, (M, DP))
    return x * ROOT


@triton.jit
def _nearest_even(x):
    """Of |x| < 2**22. Callers bound x first, which also keeps a product out of a fused add."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _to_bfloat16(x):
    """Float32 rounded to bfloat16, as float32 (not NaN)."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _fp8_code(x):
    """Float32 in [-448, 448] as an E4M3 byte in an int32."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    tiny = _nearest_even(tl.abs(x) * 512.0).to(tl.int32)
    return sign | tl.where(bits < 0x3C800000, tiny, normal)


@triton.jit
def fp8_value(byte):
    """E4M3 bytes as float32, exactly (not NaN)."""
    wide = byte.to(tl.int32)
    bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
    # The fields stand in a float32 whose exponent is 120 too small, subnormals included; a
    # subnormal float32 may be flushed, so those are taken as integers.
    normal = (bits + (120 << 23)).to(tl.float32, bitcast=True)
    tiny = (wide & 7).to(tl.float32) * 0.001953125
    return tl.where((wide & 0x78) == 0, tl.where(wide >= 128, -tiny, tiny), normal)


@triton.jit
def rounded(x, KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Codes int32 [M, DP], what they stand for before the scale, and scales float32 [M]."""
    inside = (tl.arange(0, DP) < D)[None, :]
    broken = tl.max((x != x).to(tl.int32), 1) > 0
    if KIND == 3:
        high = tl.max(tl.where(inside, x, float("-inf")), 1)
        low = tl.min(tl.where(inside, x, float("inf")), 1)
        scale = tl.where(high >= -low, high, low) * -0.125
    else:
        limit: tl.constexpr = 127.0 if KIND == 1 else 448.0
        scale = tl.max(tl.abs(x), 1) * (1.0 / limit)
    scale = tl.where(broken, float("nan"), _to_bfloat16(scale))
    finite = tl.abs(scale) < float("inf")
    usable = finite & (tl.abs(scale) >= 7.888609052210118e-31)  # 2**-100
    inverse = tl.div_rn(1.0, tl.where(usable, scale, 1.0))
    x = tl.where(usable[:, None] & inside, x * inverse[:, None], 0.0)
    scale = tl.where(usable | (finite == 0), scale, 0.0)
    if KIND == 1:
        x = _nearest_even(tl.minimum(tl.maximum(x, -127.0), 127.0))
        codes = x.to(tl.int32)
    elif KIND == 2:
        codes = _fp8_code(tl.minimum(tl.maximum(x, -448.0), 448.0))
        x = fp8_value(codes)
    else:
        x = _nearest_even(tl.minimum(tl.maximum(x, -8.0), 7.0))
        codes = x.to(tl.int32) + 8
    return codes, x, scale


@triton.constexpr_function
def code_bytes(kind, dim):
    """Of a vector's codes, which its scale follows in two bytes."""
    return dim // 2 if kind == 3 else dim


@triton.jit
def _codes_begin(pages, offset, vector, WIDTH: tl.constexpr, PAGE: tl.constexpr):
    """Where the codes of a page's vectors begin, in pairs of bytes."""
    return pages.to(tl.int64) * 32 + (offset + vector * (PAGE * (WIDTH + 2) // 2))


@triton.jit
def pages_of(table, tokens, ok, PAGE: tl.constexpr):
    """The pages that tokens lie in, where ok; ``table`` points at their sequence's pages."""
    if ok is None:
        return tl.load(table + tokens // PAGE)
    else:
        return tl.load(table + tokens // PAGE, mask=ok, other=0)


@triton.jit
def slots(
    pages,
    tokens,
    offset,
    vector,
    KIND: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    ITEM: tl.constexpr,
):
    """Where each token's vector begins, in elements (codes: bytes), and where its scale lies, in
    bfloat16s. ``vector`` counts [2, kv_heads]; ``offset`` counts elements (codes: two bytes)."""
    token = tokens % PAGE
    if KIND == 0:
        page = pages.to(tl.int64)
        at = page * (64 // ITEM) + (offset + vector * (PAGE * D) + token * D)
        return at, at
    else:
        width: tl.constexpr = code_bytes(KIND, D)
        begin = _codes_begin(pages, offset, vector, width, PAGE)
        return 2 * begin + token * width, begin + PAGE * width // 2 + token


@triton.jit
def word_slots(
    pages,
    tokens,
    offset,
    vector,
    KIND: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """:func:`slots` of low bits, with vectors counted in int16 words."""
    token = tokens % PAGE
    width: tl.constexpr = code_bytes(KIND, D)
    begin = _codes_begin(pages, offset, vector, width, PAGE)
    return begin + token * (width // 2), begin + PAGE * width // 2 + token


@triton.jit
def load_words(words_ptr, at, ok, KIND: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Codes of vectors as int16 [N, DP / parts], of which each word holds 2 or 4 in a row, as
    ``products.decode_words`` takes them; what is not ok does not count."""
    PARTS: tl.constexpr = 4 if KIND == 3 else 2
    columns = tl.arange(0, DP // PARTS)
    places = words_ptr + at[:, None] + columns[None, :]
    inside = ok[:, None] & (columns < D // PARTS)[None, :]
    words = tl.load(places, mask=inside, other=0)
    if KIND == 1:
        words = words ^ -0x7F80  # 0x8080: from two's complement to 128 more
    return words


@triton.jit
def apart(x, M: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr):
    """Columns i, i + PARTS, i + 2 PARTS, ... of [M, DP] for i of 0 to 3 (2 and 3: 0 and 1 again if
    there are two parts)."""
    x0, x1 = tl.split(tl.reshape(x, (M, DP // 2, 2)))
    if PARTS == 2:
        return x0, x1, x0, x1
    else:
        x0, x2 = tl.split(tl.reshape(x0, (M, DP // 4, 2)))
        x1, x3 = tl.split(tl.reshape(x1, (M, DP // 4, 2)))
        return x0, x1, x2, x3


@triton.jit
def together(x0, x1, x2, x3, M: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr):
    """What :func:`apart` took apart."""
    if PARTS == 4:
        x0 = tl.reshape(tl.join(x0, x2), (M, DP // 2))
        x1 = tl.reshape(tl.join(x1, x3), (M, DP // 2))
    return tl.reshape(tl.join(x0, x1), (M, DP))


@triton.jit
def store_heads(
    x,
    arena_ptr,
    scales_ptr,
    at,
    scale_at,
    ok,
    M: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Write vectors [M, DP]; what a reader would make of them comes back, float32 [M, DP]."""
    dims = tl.arange(0, DP)
    if KIND == 0:
        stored = x.to(arena_ptr.dtype.element_ty)
        tl.store(
            arena_ptr + at[:, None] + dims[None, :], stored, mask=ok[:, None] & (dims < D)[None, :]
        )
        return stored.to(tl.float32)
    else:
        codes, values, scale = rounded(x, KIND, D, DP)
        width: tl.constexpr = code_bytes(KIND, D)
        places = dims
        if KIND == 3:
            low, high = tl.split(tl.reshape(codes, (M, DP // 2, 2)))
            codes = low | (high << 4)
            places = tl.arange(0, DP // 2)
        tl.store(
            arena_ptr + at[:, None] + places[None, :],
            codes.to(tl.uint8),
            mask=ok[:, None] & (places < width)[None, :],
        )
        bits = (scale.to(tl.uint32, bitcast=True) >> 16).to(tl.int16)
        tl.store(scales_ptr + scale_at, bits.to(tl.bfloat16, bitcast=True), mask=ok)
        return values * scale[:, None]


@triton.jit
def load_heads(
    arena_ptr,
    at,
    ok,
    MASKED: tl.constexpr,
    KIND: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    dtype: tl.constexpr,
    NATIVE_FP8: tl.constexpr,
):
    """Vectors [N, DP] as ``dtype``, before their scales; zeros where not ok."""
    dims = tl.arange(0, DP)
    if KIND == 3:
        places = arena_ptr + at[:, None] + (dims // 2)[None, :]
    else:
        places = arena_ptr + at[:, None] + dims[None, :]
    if MASKED:
        stored = tl.load(places, mask=ok[:, None] & (dims < D)[None, :], other=0)
    elif D < DP:
        stored = tl.load(places, mask=(dims < D)[None, :], other=0)
    else:
        stored = tl.load(places)
    if KIND == 0:
        return stored.to(dtype)
    elif KIND == 1:
        return stored.to(tl.int8, bitcast=True).to(dtype)
    elif KIND == 2:
        if NATIVE_FP8:
            return stored.to(tl.float8e4nv, bitcast=True).to(dtype)
        else:
            return fp8_value(stored).to(dtype)
    else:
        shift = (dims % 2 * 4).to(tl.uint8)
        values = ((stored >> shift[None, :]) & 15).to(tl.int8) - 8
        # What lies beyond D came as zero bits, which stand for -8.
        return tl.where((dims < D)[None, :], values, 0).to(dtype)
