"""The verbs of the attention kernels: load and store tiles, contract head dims, mask, soften, drop.

A head dim that is no power of two is cut into two that are (40 → 32 + 16, 160 → 128 + 32), so
that no work goes into padding up to the next one. A `parts` argument is a tuple of one or two
tiles, (rows, PART_0) and (rows, PART_1); what lies outside the matrix is loaded as 0 and not
stored.

An `else` stands after each compile-time `return`: Triton compiles what follows an `if` without one.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def aligned(stride, STEP: tl.constexpr):
    """Return the stride, which the launcher found to be a multiple of STEP, as one to the compiler.

    Triton itself looks for multiples of 16 alone, and loads rows of 40 elements one by one.
    """
    return stride // STEP * STEP


@triton.jit
def tile_pointers(ptr, start, stride, BLOCK: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr):
    # 64-bit row offsets: a tensor may hold more than 2^31 elements. What depends on `start` is one
    # number, so that a loop over blocks keeps its tile of offsets in registers.
    first = ptr + tl.cast(start, tl.int64) * stride
    offsets = tl.arange(0, BLOCK).to(tl.int64)[:, None] * stride
    return first + (offsets + (FIRST + tl.arange(0, PART))[None, :])


@triton.jit
def tile_bounds(
    start, length, BLOCK: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr, D: tl.constexpr
):
    inside = (start + tl.arange(0, BLOCK) < length)[:, None]
    if FIRST + PART > D:
        inside = inside & (FIRST + tl.arange(0, PART) < D)[None, :]
    return inside


@triton.jit
def load_part(
    ptr, start, stride, length, BLOCK: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr,
    D: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    pointers = tile_pointers(ptr, start, stride, BLOCK, FIRST, PART)
    if CHECK_ROWS:
        return tl.load(pointers, mask=tile_bounds(start, length, BLOCK, FIRST, PART, D), other=0.0)
    if FIRST + PART > D:
        columns = FIRST + tl.arange(0, PART)
        return tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_parts(
    ptr, start, stride, length, BLOCK: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    D: tl.constexpr, CHECK_ROWS: tl.constexpr,
):  # fmt: skip
    """Load rows start … start + BLOCK of a (length, D) matrix with unit column stride."""
    first = load_part(ptr, start, stride, length, BLOCK, 0, PART_0, D, CHECK_ROWS)
    if PART_1 == 0:
        return (first,)
    else:
        second = load_part(ptr, start, stride, length, BLOCK, PART_0, PART_1, D, CHECK_ROWS)
        return (first, second)


@triton.jit
def open_rows(
    ptr, stride, length, BLOCK: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Return what `load_rows` reads blocks of a (length, D) matrix from.

    With TMA they are tensor maps, which Hopper's copy engine follows by itself: no arithmetic for
    addresses, and what lies outside the matrix arrives as 0.
    """
    if TMA:
        first = tl.make_tensor_descriptor(ptr, [length, D], [stride, 1], [BLOCK, PART_0])
        if PART_1 == 0:
            return (first,)
        else:
            second = tl.make_tensor_descriptor(ptr, [length, D], [stride, 1], [BLOCK, PART_1])
            return (first, second)
    else:
        return (ptr, stride)


@triton.jit
def load_rows(
    source, start, length, BLOCK: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr,
    D: tl.constexpr, CHECK_ROWS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Load rows start … start + BLOCK of what `open_rows` opened."""
    if TMA:
        if PART_1 == 0:
            return (source[0].load([start, 0]),)
        else:
            return (source[0].load([start, 0]), source[1].load([start, PART_0]))
    else:
        return load_parts(source[0], start, source[1], length, BLOCK, PART_0, PART_1, D, CHECK_ROWS)


@triton.jit
def store_parts(
    ptr, start, stride, length, parts, BLOCK: tl.constexpr, PART_0: tl.constexpr,
    PART_1: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    pointers = tile_pointers(ptr, start, stride, BLOCK, 0, PART_0)
    inside = tile_bounds(start, length, BLOCK, 0, PART_0, D)
    tl.store(pointers, parts[0].to(ptr.dtype.element_ty), mask=inside)
    if PART_1 > 0:
        pointers = tile_pointers(ptr, start, stride, BLOCK, PART_0, PART_1)
        inside = tile_bounds(start, length, BLOCK, PART_0, PART_1, D)
        tl.store(pointers, parts[1].to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def zero_parts(ROWS: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr):
    if PART_1 == 0:
        return (tl.zeros((ROWS, PART_0), tl.float32),)
    else:
        return (tl.zeros((ROWS, PART_0), tl.float32), tl.zeros((ROWS, PART_1), tl.float32))


@triton.jit
def float32_parts(parts, PART_1: tl.constexpr):
    if PART_1 == 0:
        return (parts[0].to(tl.float32),)
    else:
        return (parts[0].to(tl.float32), parts[1].to(tl.float32))


@triton.jit
def add_parts(left, right, PART_1: tl.constexpr):
    if PART_1 == 0:
        return (left[0] + right[0],)
    else:
        return (left[0] + right[0], left[1] + right[1])


@triton.jit
def scale_parts(parts, factor, PART_1: tl.constexpr):
    if PART_1 == 0:
        return (parts[0] * factor,)
    else:
        return (parts[0] * factor, parts[1] * factor)


@triton.jit
def load_scale(ptr, head_index, start, length, QUANT_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Load the one scale of a block of INT8 rows."""
    tl.static_assert(QUANT_ROWS % BLOCK == 0, "a block of rows must have one scale")
    return tl.load(ptr + head_index * tl.cdiv(length, QUANT_ROWS) + start // QUANT_ROWS)


@triton.jit
def contract(left, right, PART_1: tl.constexpr, PRECISION: tl.constexpr):
    """Return left @ rightᵀ over the head dim: (ROWS, D), (COLUMNS, D) → (ROWS, COLUMNS) float32.

    INT8 operands give the exact sum, for D ≤ 256: it is below 2^22.
    """
    if left[0].dtype == tl.int8:
        integers = tl.dot(left[0], tl.trans(right[0]), out_dtype=tl.int32)
        if PART_1 > 0:
            integers = tl.dot(left[1], tl.trans(right[1]), integers, out_dtype=tl.int32)
        return integers.to(tl.float32)
    else:
        product = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
        if PART_1 > 0:
            product = tl.dot(left[1], tl.trans(right[1]), product, input_precision=PRECISION)
        return product


@triton.jit
def accumulate(total, weights, parts, PART_1: tl.constexpr, PRECISION: tl.constexpr):
    """Return total + weights @ parts: (ROWS, N), (N, D) → (ROWS, D) float32."""
    weights = weights.to(parts[0].dtype)
    first = tl.dot(weights, parts[0], total[0], input_precision=PRECISION)
    if PART_1 == 0:
        return (first,)
    else:
        return (first, tl.dot(weights, parts[1], total[1], input_precision=PRECISION))


@triton.jit
def row_dot(left, right, PART_1: tl.constexpr):
    """Return the inner product of each row pair in float32: (ROWS,)."""
    product = tl.sum(left[0].to(tl.float32) * right[0].to(tl.float32), 1)
    if PART_1 > 0:
        product += tl.sum(left[1].to(tl.float32) * right[1].to(tl.float32), 1)
    return product


@triton.jit
def visible_keys(
    rows, columns, K, diagonal, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Return which keys each query may attend by position; rows and columns broadcast to a tile."""
    visible = columns < K
    if HAS_RIGHT:
        visible = visible & (columns <= rows + (diagonal + right))
    if HAS_LEFT:
        visible = visible & (columns >= rows + (diagonal - left))
    return visible


@triton.jit
def masked_scores(
    product, rows, columns, mask_ptr, stride_mq, stride_mk, Q, K, scale, cap, diagonal, left, right,
    MASK: tl.constexpr, HAS_CAP: tl.constexpr, SCALED: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Turn Q Kᵀ into scores, -inf where a key may not be attended; return them unmasked, too.

    MASK is 0 for none, 1 for a boolean one, 2 for one that is added. Unless SCALED, the scores keep
    the scale of the product, and the exponent's unit carries it. `rows` and `columns` broadcast to
    the tile, so it may lie either way round.
    """
    scores = product
    if SCALED:
        scores = scores * scale
    if HAS_CAP:
        scores = soft_cap(scores, cap)
    capped = scores
    if MASK > 0:
        pointers = mask_ptr + (rows.to(tl.int64) * stride_mq + columns.to(tl.int64) * stride_mk)
        mask = tl.load(pointers, mask=(rows < Q) & (columns < K), other=0)
        if MASK == 1:
            scores = tl.where(mask != 0, scores, -INFINITY)
        else:
            scores = scores + mask.to(tl.float32)
    if CHECK:
        visible = visible_keys(rows, columns, K, diagonal, left, right, HAS_LEFT, HAS_RIGHT)
        scores = tl.where(visible, scores, -INFINITY)
    return scores, capped


@triton.jit
def online_softmax(scores, unit, row_max, row_sum, MAY_BE_EMPTY: tl.constexpr):
    """Return 2^(scores · unit - max), the factor that corrects earlier sums, the new max and sum.

    `unit`, positive, turns a score into an exponent of 2; the maximum is in those. A row may have
    seen no key yet (MAY_BE_EMPTY): then -inf must not meet -inf.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1) * unit)
    shift = new_max
    if MAY_BE_EMPTY:
        shift = tl.where(new_max == -INFINITY, 0.0, shift)
    weights = tl.exp2(scores * unit - shift[:, None])
    rescale = tl.exp2(row_max - shift)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def keep_weights(seed_ptr, head, rows, columns, dropout_p):
    """Draw which attention weights dropout keeps; the same for the same seed and position."""
    key = (columns + rows * 0).to(tl.uint32)
    query = (rows + columns * 0).to(tl.uint32)
    zero = query * 0
    bits, _, _, _ = tl.philox(tl.load(seed_ptr), key, query, zero + head.to(tl.uint32), zero)
    return tl.uint_to_uniform_float(bits) >= dropout_p


@triton.jit
def soft_cap(scores, cap):
    """Return cap * tanh(scores / cap)."""
    return cap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2_E) / cap) + 1.0))
