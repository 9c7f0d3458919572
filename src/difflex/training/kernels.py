"""Triton kernels of a training update on a GPU: the search for the largest scores, decoding, and a row's whole update.

Matrices are read in whatever type they have, and all sums are in float32. `fused` launches the kernels.
"""

# Triton's types do not know what a kernel computes with.
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

import triton
import triton.language as tl

ROUNDS: tl.constexpr = tl.constexpr(16)
"""Rounds of a bisection; what remains of the interval costs a few more candidates."""


@triton.jit
def _at_most(values, threshold, most):
    """Return the least threshold from `threshold` on that at most `most` of the values reach."""
    if tl.sum((values >= threshold).to(tl.int32)) > most:
        low, high = threshold, tl.max(values)
        for _ in range(ROUNDS):
            middle = (low + high) / 2
            fits = tl.sum((values >= middle).to(tl.int32)) <= most
            low, high = tl.where(fits, low, middle), tl.where(fits, middle, high)
        threshold = high
    return threshold


@triton.jit
def block_maxima(scores, maxima, size, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Store the largest score of every `BLOCK` neighbouring features. Grid: tokens, tiles of blocks."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * TILE + tl.arange(0, TILE)
    columns = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tile = tl.load(scores + token * size + columns, mask=columns < size, other=-float("inf")).to(tl.float32)
    tl.store(maxima + token * blocks + block, tl.max(tile, 1), mask=block < blocks)


@triton.jit
def _reached(values, low, high, k):
    """Return two numbers close to the k-th largest value, of which k values reach the first and fewer the second."""
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        enough = tl.sum((values >= middle).to(tl.int32)) >= k
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    return low, high


@triton.jit
def choose_blocks(
    maxima, slack, limits, reached, chosen, counts, blocks, k, rounding, BLOCKS: tl.constexpr, ROOM: tl.constexpr
):  # fmt: skip
    """Store the blocks that may hold one of a token's k largest scores.

    Grid: tokens. Stored besides: a score that k blocks reach, and the largest error of a difference of two scores.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCKS)
    valid = columns < blocks
    peaks = tl.load(maxima + token * blocks + columns, mask=valid, other=-float("inf"))
    highest = tl.max(peaks)
    low, _ = _reached(peaks, tl.min(tl.where(valid, peaks, highest)), highest, k)
    error = rounding * (tl.abs(low) + tl.load(limits + 1)) + tl.load(slack + token) * tl.load(limits)
    keep = (peaks >= _at_most(peaks, low - error, ROOM)) & valid
    place = tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(chosen + token * ROOM + place, columns, mask=keep & (place < ROOM))
    tl.store(counts + token, tl.minimum(tl.sum(keep.to(tl.int32)), ROOM))
    tl.store(reached + 2 * token, low)
    tl.store(reached + 2 * token + 1, error)


@triton.jit
def choose_candidates(
    scores, reached, chosen, counts, candidates, values, numbers, size, k, BLOCK: tl.constexpr, ROOM: tl.constexpr
):
    """Store the features that may be among a token's k largest, with their scores: first those that must be scored again.

    Grid: tokens. The number of the first is stored; the others are among the k largest in spite of their error. Slots that stay
    empty get minus infinity.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ROOM)
    used = slot < tl.load(counts + token)
    block = tl.load(chosen + token * ROOM + slot, mask=used, other=0)
    columns = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = used[:, None] & (columns < size)
    tile = tl.load(scores + token * size + columns, mask=inside, other=-float("inf")).to(tl.float32)
    scored, features = tl.reshape(tile, (ROOM * BLOCK,)), tl.reshape(columns, (ROOM * BLOCK,))
    low, error = tl.load(reached + 2 * token), tl.load(reached + 2 * token + 1)
    keep = scored >= _at_most(scored, low - error, ROOM)
    _, high = _reached(scored, low, tl.max(scored), k)
    sure = keep & (scored > high + error)
    unsure = keep & (scored <= high + error)
    first = tl.sum(unsure.to(tl.int32))
    place = tl.where(sure, first + tl.cumsum(sure.to(tl.int32), 0), tl.cumsum(unsure.to(tl.int32), 0)) - 1
    keep = keep & (place < ROOM)
    tl.store(candidates + token * ROOM + place, features, mask=keep)
    tl.store(values + token * ROOM + place, scored, mask=keep)
    tl.store(values + token * ROOM + slot, -float("inf"), mask=slot >= first + tl.sum(sure.to(tl.int32)))
    tl.store(numbers + token, tl.minimum(first, ROOM))


@triton.jit
def pair_dots(
    matrix, features, numbers, vectors, bias, products, size, width, slots, fill,
    NUMBERED: tl.constexpr, BIAS: tl.constexpr, TILE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store `matrix[feature] . vector + bias[feature]` for the features of a token, `fill` in slots whose feature is `size`.

    Grid: tokens, tiles of slots. With NUMBERED, slots from `numbers[token]` on are left alone.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1) * TILE + tl.arange(0, TILE)
    written = slot < slots
    if NUMBERED:
        count = tl.load(numbers + token)
        if tl.program_id(1) * TILE >= count:
            return
        written = written & (slot < count)
    used = written
    feature = tl.load(features + token * slots + slot, mask=used, other=size)
    used = used & (feature < size)
    total = tl.zeros((TILE, COLUMNS), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        vector = tl.load(vectors + token * width + column, mask=column < width, other=0.0).to(tl.float32)
        at = feature.to(tl.int64)[:, None] * width + column[None, :]
        total += tl.load(matrix + at, mask=used[:, None] & (column < width)[None, :], other=0.0).to(tl.float32) * vector[None, :]
    product = tl.sum(total, 1)
    if BIAS:
        product += tl.load(bias + feature, mask=used, other=0.0)
    tl.store(products + token * slots + slot, tl.where(used, product, fill), mask=written)


@triton.jit
def decode_errors(
    matrix, features, values, base, errors, squares, size, width, slots, sign, PAIRS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Store `sum value * matrix[feature] + sign * base` of a token, and its square. Grid: tokens, tiles of columns."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.load(base + token * width + column, mask=inside, other=0.0).to(tl.float32) * sign
    for start in range(0, slots, PAIRS):
        slot = start + tl.arange(0, PAIRS)
        feature = tl.load(features + token * slots + slot, mask=slot < slots, other=size)
        value = tl.load(values + token * slots + slot, mask=slot < slots, other=0.0)
        at = feature.to(tl.int64)[:, None] * width + column[None, :]
        rows = tl.load(matrix + at, mask=(feature < size)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(rows * value[:, None], 0)
    tl.store(errors + token * width + column, total.to(errors.dtype.element_ty), mask=inside)
    tl.store(squares + token * tl.num_programs(1) + tl.program_id(1), tl.sum(total * total))


@triton.jit
def weighted_rows(matrix, weights, sums, size, width, span, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store `sum weight * row` over `span` rows; rows of weight 0 are not read. Grid: tiles of columns, spans."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    first = tl.program_id(1) * span
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(first, tl.minimum(first + span, size), ROWS):
        row = start + tl.arange(0, ROWS)
        weight = tl.load(weights + row, mask=row < size, other=0.0)
        at = row.to(tl.int64)[:, None] * width + column[None, :]
        rows = tl.load(matrix + at, mask=(weight != 0)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(rows * weight[:, None], 0)
    tl.store(sums + tl.program_id(1).to(tl.int64) * width + column, total, mask=inside)


@triton.jit
def _pair_sums(total, first, last, index, weights, inputs, width, column, inside, PAIRS: tl.constexpr):
    """Return `total` with `weight * input` of pairs `first` to `last` added."""
    for start in range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        used = pair < last
        row = tl.load(index + pair, mask=used, other=0).to(tl.int64)
        mask = used[:, None] & inside[None, :]
        tile = tl.load(inputs + row[:, None] * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tile * tl.load(weights + pair, mask=used, other=0.0)[:, None], 0)
    return total


@triton.jit
def sum_segments(
    starts, segments, partial, index, weights, inputs, size, width,
    SEGMENT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Store the gradient of `SEGMENT` pairs of a popular feature. Grid: as many segments as there may be."""
    segment = tl.program_id(0)
    if segment >= tl.load(segments + size):
        return
    owner, after = 0, size  # the last feature whose first segment is no later
    for _ in range(ROUNDS):
        middle = (owner + after) // 2
        earlier = tl.load(segments + middle) <= segment
        owner, after = tl.where(earlier, middle, owner), tl.where(earlier, after, middle)
    first = tl.load(starts + owner) + (segment - tl.load(segments + owner)) * SEGMENT
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    total = _pair_sums(total, first, first + SEGMENT, index, weights, inputs, width, column, inside, PAIRS)
    tl.store(partial + segment.to(tl.int64) * width + column, total, mask=inside)


@triton.jit
def _row_gradient(
    starts, segments, partial, index, weights, inputs, weight, row, width, column, inside,
    UNIT: tl.constexpr, SEGMENT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return the gradient of a row; of a row that keeps norm 1, without the part along it."""
    first, last = tl.load(starts + row), tl.load(starts + row + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    if SEGMENT > 0:
        segment, after = tl.load(segments + row), tl.load(segments + row + 1)
        first += (after - segment) * SEGMENT
        at = segment.to(tl.int64) * width + column
        for _ in range(segment, after):
            total += tl.load(partial + at, mask=inside, other=0.0)
            at += width
    total = _pair_sums(total, first, last, index, weights, inputs, width, column, inside, PAIRS)
    if UNIT:
        direction = tl.load(weight + row * width + column, mask=inside, other=0.0)
        total -= tl.sum(total * direction) * direction
    return total


@triton.jit
def measure_rows(
    needed, squares, starts, segments, partial, index, weights, inputs, weight, width,
    UNIT: tl.constexpr, SEGMENT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the squared norm of a row's gradient, if it is needed. Grid: features."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(needed) == 0 or tl.load(starts + row) == tl.load(starts + row + 1):
        return
    column = tl.arange(0, BLOCK)
    gradient = _row_gradient(
        starts, segments, partial, index, weights, inputs, weight, row, width, column, column < width,
        UNIT, SEGMENT, PAIRS, BLOCK,
    )  # fmt: skip
    tl.store(squares + row, tl.load(squares + row) + tl.sum(gradient * gradient))


@triton.jit
def _adam(
    weight, first, second, at, inside, gradient, skipped, rate, root, beta1, beta2, log_beta2, eps,
    LAZY: tl.constexpr, MOMENT: tl.constexpr,
):  # fmt: skip
    """Store the moments of a row and return its weight before and after the update."""
    old = tl.load(weight + at, mask=inside, other=0.0)
    square = tl.load(second + at, mask=inside, other=0.0)
    if LAZY:
        square *= tl.exp2(skipped * log_beta2)
    square = beta2 * square + (1 - beta2) * gradient * gradient
    tl.store(second + at, square, mask=inside)
    if MOMENT:
        gradient = beta1 * tl.load(first + at, mask=inside, other=0.0) + (1 - beta1) * gradient
        tl.store(first + at, gradient, mask=inside)
    return old, old - rate * gradient / (tl.sqrt(square) * root + eps)


@triton.jit
def _average(average, at, inside, old, new, skipped, ema, log_ema, LAZY: tl.constexpr):
    """Store the moving average of a row: the old weight counts for the skipped updates."""
    mean = tl.load(average + at, mask=inside, other=0.0)
    if LAZY:
        mean = old + (mean - old) * tl.exp2(skipped * log_ema)
    tl.store(average + at, new + (mean - new) * ema, mask=inside)


@triton.jit
def update_rows(
    failed, number, controls, squares, fourths, last_update, starts, segments, partial, index, weights, inputs,
    weight, first, second, average, copy, width, beta1, beta2, log_beta2, eps, ema, log_ema,
    UNIT: tl.constexpr, LAZY: tl.constexpr, MOMENT: tl.constexpr, AVERAGE: tl.constexpr,
    SEGMENT: tl.constexpr, PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a feature's row of a matrix, its optimiser state and its copy. Grid: features.

    With UNIT, the matrix is the decoder, whose rows have norm 1; it is updated after the encoder.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(failed) != 0 or (LAZY and tl.load(starts + row) == tl.load(starts + row + 1)):
        return
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    gradient = _row_gradient(
        starts, segments, partial, index, weights, inputs, weight, row, width, column, inside, UNIT, SEGMENT, PAIRS, BLOCK
    )
    square = tl.sum(gradient * gradient)
    current = tl.load(number)
    skipped = (current - 1 - tl.load(last_update + row)).to(tl.float32)
    old, new = _adam(
        weight, first, second, at, inside, gradient * tl.load(controls + 2), skipped, tl.load(controls), tl.load(controls + 1),
        beta1, beta2, log_beta2, eps, LAZY, MOMENT,
    )  # fmt: skip
    if UNIT:
        new = new / tl.sqrt(tl.sum(new * new))
        square += tl.load(squares + row)
        tl.store(last_update + row, current)
    else:
        tl.store(fourths + row, tl.sum(new * new * new * new))
    if AVERAGE:
        _average(average, at, inside, old, new, skipped, ema, log_ema, LAZY)
    tl.store(weight + at, new, mask=inside)
    tl.store(copy + at, new.to(copy.dtype.element_ty), mask=inside)
    tl.store(squares + row, square)


@triton.jit
def update_vector(
    failed, number, controls, last_update, starts, weight, first, second, average, gradient, count,
    beta1, beta2, log_beta2, eps, ema, log_ema,
    LAZY: tl.constexpr, MOMENT: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update a weight of one number per feature, or with LAZY off any vector. Grid: tiles of it. Before `update_rows`."""
    if tl.load(failed) != 0:
        return
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    skipped = tl.zeros((BLOCK,), tl.float32)
    if LAZY:
        inside = tl.load(starts + at, mask=inside, other=0) != tl.load(starts + at + 1, mask=inside, other=0)
        skipped = (tl.load(number) - 1 - tl.load(last_update + at, mask=inside, other=0)).to(tl.float32)
    change = tl.load(gradient + at, mask=inside, other=0.0) * tl.load(controls + 2)
    rate, root = tl.load(controls), tl.load(controls + 1)
    old, new = _adam(weight, first, second, at, inside, change, skipped, rate, root, beta1, beta2, log_beta2, eps, LAZY, MOMENT)
    if AVERAGE:
        _average(average, at, inside, old, new, skipped, ema, log_ema, LAZY)
    tl.store(weight + at, new, mask=inside)
