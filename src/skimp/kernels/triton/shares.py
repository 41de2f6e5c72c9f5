"""Adding up what several programs made of one tile's keys, each with its own share of them.

Of each share there are sums weighted below a peak of its own, the peak, and the total of weights:
partial [owners, SPLITS, BLOCK_M, DP], levels [owners, SPLITS, 2, BLOCK_M]. An owner is a tile of
rows and a group of heads.
"""

from __future__ import annotations

import triton
import triton.language as tl

from skimp.kernels.triton.cached_heads import turned
from skimp.kernels.triton.launch import let_next_start, wait_for_inputs


@triton.jit
def add_shares(
    partial_ptr,
    level_ptr,
    counter_ptr,
    out_ptr,
    positions_ptr,
    out_at,
    owner,
    base,
    active,
    first,
    end,
    head,
    ok,
    lane,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    TURN: tl.constexpr,
    ROOT: tl.constexpr,
    SPLITS_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Called by each of the ``active`` programs once its share is stored: the last one adds all
    shares, in their order, and writes the rows."""
    dims = tl.arange(0, DP)
    tl.debug_barrier()  # or the count could overtake another thread's stores
    done = tl.atomic_add(counter_ptr + owner, 1, sem="acq_rel")
    if done == active - 1:
        tl.store(counter_ptr + owner, 0)  # for the next launch
        if BLOCK_M <= 16:
            # All shares of one row at once: few rows, many shares.
            shares = tl.arange(0, SPLITS_P)
            there = shares < active
            places = (base + shares) * BLOCK_M
            for one_lane in range(tl.minimum(end - first, ROWS) * GROUP):
                peaks = tl.load(
                    level_ptr + 2 * places + one_lane, mask=there, other=float("-inf"),
                    cache_modifier=".cg",
                )  # fmt: skip
                totals = tl.load(
                    level_ptr + 2 * places + BLOCK_M + one_lane, mask=there, other=0.0,
                    cache_modifier=".cg",
                )  # fmt: skip
                parts = tl.load(
                    partial_ptr + (places + one_lane)[:, None] * DP + dims[None, :],
                    mask=there[:, None], other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                top = tl.max(peaks)
                top = tl.where(top == float("-inf"), 0.0, top)
                factors = tl.exp2(peaks - top)
                whole = tl.sum(totals * factors)
                mixed = tl.sum(parts * factors[:, None], 0)[None, :]
                mixed = mixed / tl.where(whole == 0.0, 1.0, whole)
                if TURN:
                    mixed = turned(mixed, 1, D, DP, ROOT)
                one_row = first + one_lane // GROUP
                to = one_row.to(tl.int64) * (H * D) + (head * GROUP + one_lane % GROUP) * D
                real = tl.load(positions_ptr + one_row) >= 0
                tl.store(
                    out_ptr + to + dims[None, :], mixed.to(out_ptr.dtype.element_ty),
                    mask=real & (dims < D)[None, :],
                )  # fmt: skip
        else:
            peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
            total = tl.zeros((BLOCK_M,), tl.float32)
            acc = tl.zeros((BLOCK_M, DP), tl.float32)
            for share_ in range(active):
                place = (base + share_) * BLOCK_M + lane
                level_at = level_ptr + place + (base + share_) * BLOCK_M
                part_peak = tl.load(level_at, mask=ok, other=float("-inf"), cache_modifier=".cg")
                part_total = tl.load(level_at + BLOCK_M, mask=ok, other=0.0, cache_modifier=".cg")
                part = tl.load(
                    partial_ptr + place[:, None] * DP + dims[None, :],
                    mask=ok[:, None], other=0.0, cache_modifier=".cg",
                )  # fmt: skip
                new_peak = tl.maximum(peak, part_peak)
                level = tl.where(new_peak == float("-inf"), 0.0, new_peak)
                shrink = tl.exp2(peak - level)
                grow = tl.exp2(part_peak - level)
                total = total * shrink + part_total * grow
                acc = acc * shrink[:, None] + part * grow[:, None]
                peak = new_peak
            x = acc / tl.where(total == 0.0, 1.0, total)[:, None]
            if TURN:
                x = turned(x, BLOCK_M, D, DP, ROOT)
            x = x.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + out_at, x, mask=ok[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["rows"])
def shares_kernel(
    partial_ptr,
    level_ptr,
    out_ptr,
    positions_ptr,
    rows,
    H: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLITS_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PDL: tl.constexpr,
):
    """One head of a single row, out of shares that were left apart."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    GROUP: tl.constexpr = H // G
    dims = tl.arange(0, DP)
    shares = tl.arange(0, SPLITS_P)
    position = tl.load(positions_ptr + row)
    owner = row.to(tl.int64) * G + head // GROUP
    lane = head % GROUP
    places = (owner * SPLITS + shares) * BLOCK_M
    wait_for_inputs(PDL)
    let_next_start(PDL)
    there = (shares < SPLITS) & (position >= 0)
    peaks = tl.load(level_ptr + 2 * places + lane, mask=there, other=float("-inf"))
    totals = tl.load(level_ptr + 2 * places + BLOCK_M + lane, mask=there, other=0.0)
    used = totals > 0.0
    parts = tl.load(
        partial_ptr + (places + lane)[:, None] * DP + dims[None, :], mask=used[:, None], other=0.0
    )
    top = tl.max(peaks)
    top = tl.where(top == float("-inf"), 0.0, top)
    factors = tl.exp2(peaks - top)
    whole = tl.sum(totals * factors)
    mixed = tl.sum(parts * factors[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    to = row.to(tl.int64) * (H * D) + head * D + dims
    tl.store(out_ptr + to, mixed.to(out_ptr.dtype.element_ty), mask=dims < D)
