"""Device code of estimates: attention mass, cosines, k-means, elimination. `kernels/estimates.py` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def group_logsums(
    q, k, logsums, lse, scale, queries, tokens, groups, q_head, q_token, k_head, k_token,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: log-sum-exps of their scores with each group of keys, and with all keys.

    Those of groups are in powers of two, and infinitely small where a group has no weight.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    row = tile * TILE_Q + tl.arange(0, TILE_Q)
    if not TMA:
        q += head.to(tl.int64) * q_head
        k += head.to(tl.int64) * k_head
    some = _tile(q, head, tile * TILE_Q, 0, queries, q_token, TILE_Q, STEP, TMA)
    # groups before queries: a warp stores queries that lie side by side
    logsums += head.to(tl.int64) * groups * queries
    most = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    whole = tokens // TILE_K
    most, total = _over_tiles(
        most, total, q, some, k, logsums, head, tile, row, 0, whole, scale, queries, tokens, groups, q_token, k_token,
        TILE_Q, TILE_K, GROUP, CHANNELS, STEP, TMA, False,
    )  # fmt: skip
    most, total = _over_tiles(
        most, total, q, some, k, logsums, head, tile, row, whole, tl.cdiv(tokens, TILE_K), scale, queries, tokens,
        groups, q_token, k_token, TILE_Q, TILE_K, GROUP, CHANNELS, STEP, TMA, True,
    )  # fmt: skip
    tl.store(lse + head.to(tl.int64) * queries + row, most * _LN2 + tl.log(total), mask=row < queries)


@triton.jit
def _over_tiles(
    most, total, q, loaded, k, logsums, head, tile, row, first, last, scale, queries, tokens, groups, q_token, k_token,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr, STEP: tl.constexpr,
    TMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Go on with tiles of keys, from the first to before the last."""
    parts: tl.constexpr = TILE_K // GROUP
    # where products go on over many loads, those of the next tile start before the sums of this one
    for i in tl.range(first, last, flatten=CHANNELS != STEP):
        if CHANNELS == STEP:
            # what fits is loaded once
            scores = tl.dot(loaded, _tile(k, head, i * TILE_K, 0, tokens, k_token, TILE_K, STEP, TMA).T)
        else:
            scores = tl.zeros([TILE_Q, TILE_K], tl.float32)
            for channel in range(0, CHANNELS, STEP):
                some = _tile(q, head, tile * TILE_Q, channel, queries, q_token, TILE_Q, STEP, TMA)
                keys = _tile(k, head, i * TILE_K, channel, tokens, k_token, TILE_K, STEP, TMA)
                scores = tl.dot(some, keys.T, scores)
        if TAIL:
            scores = tl.where((i * TILE_K + tl.arange(0, TILE_K) < tokens)[None, :], scores, float("-inf"))
        # the scale is not negative, and goes into one multiply-add with the subtraction; a group so far below the
        # tile's largest score that its sum is 0 has no weight in all of the attention either
        here = tl.max(scores, 1) * scale
        weights = tl.exp2(scores * scale - here[:, None])
        sums = tl.sum(tl.reshape(weights, [TILE_Q, parts, GROUP]), 2)
        group = i * parts + tl.arange(0, parts)
        tl.store(
            logsums + group[None, :].to(tl.int64) * queries + row[:, None], here[:, None] + tl.log2(sums),
            mask=(row[:, None] < queries) & (group[None, :] < groups),
        )  # fmt: skip
        # every tile has a key, so the largest is finite from the first on
        new_most = tl.maximum(most, here)
        total = total * tl.exp2(most - new_most) + tl.sum(sums, 1) * tl.exp2(here - new_most)
        most = new_most
    return most, total


@triton.jit
def _tile(x, head, start, channel, tokens, token_stride, ROWS: tl.constexpr, STEP: tl.constexpr, TMA: tl.constexpr):
    """Some channels of some tokens of a head; zeros past the last token."""
    if TMA:
        tile = x.load([head, start, channel]).reshape([ROWS, STEP])
    else:
        row, column = start + tl.arange(0, ROWS), channel + tl.arange(0, STEP)
        tile = tl.load(
            x + row[:, None].to(tl.int64) * token_stride + column[None, :], mask=row[:, None] < tokens, other=0.0
        )
    return tile


@triton.jit
def block_mass(
    logsums, lse, starts, mass, queries, groups, q_blocks, k_blocks,
    PARTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One query block of one head, some key blocks of so many groups: exponentials of their log-sum-exps, summed."""
    block, head = tl.program_id(0), tl.program_id(2).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    behind = tl.load(starts + block + 1)
    sums = tl.zeros([COLUMNS], tl.float32)
    for start in range(tl.load(starts + block), behind, ROWS):
        row = start + tl.arange(0, ROWS)
        real = row < behind
        total = tl.load(lse + head * queries + row, mask=real, other=0.0) / _LN2
        for part in range(PARTS):
            group = column * PARTS + part
            found = tl.load(
                logsums + (head * groups + group[:, None]) * queries + row[None, :],
                mask=(group < groups)[:, None] & real[None, :], other=float("-inf"),
            )  # fmt: skip
            sums += tl.sum(tl.exp2(found - total[None, :]), 1)
    tl.store(mass + (head * q_blocks + block) * k_blocks + column, sums, mask=column < k_blocks)


@triton.jit
def logsums_and_cosines(
    q, k, bands, logsums, lse, cosine, scale, places, rows, columns, tokens, groups, q_head, q_token, k_head, k_token,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Queries at some places of an anchor row and of so many other rows: as `group_logsums`, and their cosines.

    Tiles of all rows lie below one another in a product, so that each thread has a place's queries of all of them.
    """
    tile, band, head = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # a row, or -1 for none; the anchor, and whether it is this program that stores what is its own
    bands += band * (MEMBERS + 2)
    anchor, owns = tl.load(bands), tl.load(bands + 1)
    queries = places * rows
    q += head * q_head
    k += head * k_head
    logsums += head * groups * queries

    place = tile * TILE_Q + tl.arange(0, TILE_Q)
    there = place < tl.where(owns == 1, places, 0)
    at_anchor = _query(place, anchor, rows, columns)
    one = _rows(q, at_anchor, place < places, q_token, HEAD_DIM)
    flat = tl.arange(0, MEMBERS * TILE_Q)
    member = tl.load(bands + 2 + flat // TILE_Q)
    place = tile * TILE_Q + flat % TILE_Q
    real = (place < places) & (member >= 0)
    row = _query(place, tl.maximum(member, 0), rows, columns)
    others = _rows(q, row, real, q_token, HEAD_DIM)

    most_one = tl.full([TILE_Q], float("-inf"), tl.float32)
    total_one = tl.zeros([TILE_Q], tl.float32)
    squares_one = tl.zeros([TILE_Q], tl.float32)
    most = tl.full([MEMBERS * TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([MEMBERS * TILE_Q], tl.float32)
    squares = tl.zeros([MEMBERS * TILE_Q], tl.float32)
    dots = tl.zeros([MEMBERS, TILE_Q], tl.float32)
    whole = tokens // TILE_K * TILE_K
    most_one, total_one, squares_one, most, total, squares, dots = _over_pairs(
        most_one, total_one, squares_one, most, total, squares, dots, one, others, k, logsums, at_anchor, there, row,
        real, 0, whole, scale, queries, tokens, groups, k_token, TILE_Q, TILE_K, GROUP, MEMBERS, HEAD_DIM, False,
    )  # fmt: skip
    most_one, total_one, squares_one, most, total, squares, dots = _over_pairs(
        most_one, total_one, squares_one, most, total, squares, dots, one, others, k, logsums, at_anchor, there, row,
        real, whole, tokens, scale, queries, tokens, groups, k_token, TILE_Q, TILE_K, GROUP, MEMBERS, HEAD_DIM, True,
    )  # fmt: skip
    lengths = tl.sqrt(tl.reshape(squares, [MEMBERS, TILE_Q])) * tl.sqrt(squares_one)[None, :]
    found = tl.reshape(dots / lengths, [MEMBERS * TILE_Q])
    tl.store(cosine + head * queries + row, found, mask=real)
    tl.store(lse + head * queries + row, most * _LN2 + tl.log(total), mask=real)
    tl.store(lse + head * queries + at_anchor, most_one * _LN2 + tl.log(total_one), mask=there)
    tl.store(cosine + head * queries + at_anchor, tl.full([TILE_Q], 1.0, tl.float32), mask=there)


@triton.jit
def _over_pairs(
    most_one, total_one, squares_one, most, total, squares, dots, one, others, k, logsums, at_anchor, there, row, real,
    first, last, scale, queries, tokens, groups, k_token,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, GROUP: tl.constexpr, MEMBERS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TAIL: tl.constexpr,
):  # fmt: skip
    """Go on with tiles of keys, from the first key to before the last."""
    for start in range(first, last, TILE_K):
        keys = _tile(k, 0, start, 0, tokens, k_token, TILE_K, HEAD_DIM, False).T
        seen = (start + tl.arange(0, TILE_K) < tokens)[None, :]
        weights_one, here_one = _weights(one, keys, seen, scale, TAIL)
        weights, here = _weights(others, keys, seen, scale, TAIL)
        sums_one = _store_logsums(weights_one, here_one, logsums, at_anchor, there, start, queries, groups, GROUP)
        sums = _store_logsums(weights, here, logsums, row, real, start, queries, groups, GROUP)
        new_one, new = tl.maximum(most_one, here_one), tl.maximum(most, here)
        fall_one, fall = tl.exp2(most_one - new_one), tl.exp2(most - new)
        rise_one, rise = tl.exp2(here_one - new_one), tl.exp2(here - new)
        total_one = total_one * fall_one + sums_one * rise_one
        total = total * fall + sums * rise
        squares_one = squares_one * (fall_one * fall_one) + tl.sum(weights_one * weights_one, 1) * rise_one * rise_one
        squares = squares * (fall * fall) + tl.sum(weights * weights, 1) * rise * rise
        both = tl.sum(tl.reshape(weights, [MEMBERS, TILE_Q, TILE_K]) * weights_one[None, :, :], 2)
        dots = dots * (tl.reshape(fall, [MEMBERS, TILE_Q]) * fall_one[None, :])
        dots += both * tl.reshape(rise, [MEMBERS, TILE_Q]) * rise_one[None, :]
        most_one, most = new_one, new
    return most_one, total_one, squares_one, most, total, squares, dots


@triton.jit
def _query(place, row, rows, columns):
    """The query at a place, counted over columns of all frames, of a row."""
    return (place // columns * rows + row) * columns + place % columns


@triton.jit
def _rows(x, row, real, stride, HEAD_DIM: tl.constexpr):
    """Some tokens of a head, wherever they lie; zeros where they are none."""
    channel = tl.arange(0, HEAD_DIM)
    return tl.load(x + row[:, None].to(tl.int64) * stride + channel[None, :], mask=real[:, None], other=0.0)


@triton.jit
def _weights(queries, keys, seen, scale, TAIL: tl.constexpr):
    """Exponentials of scores, less the largest of each query, and these, in powers of two; the scale is positive."""
    scores = tl.dot(queries, keys)
    if TAIL:
        scores = tl.where(seen, scores, float("-inf"))
    # every tile has a key, so it is finite
    here = tl.max(scores, 1) * scale
    return tl.exp2(scores * scale - here[:, None]), here


@triton.jit
def _store_logsums(weights, here, logsums, row, real, start, queries, groups, GROUP: tl.constexpr):
    """Log-sum-exps of each group of keys, and the sum of the weights."""
    parts: tl.constexpr = weights.shape[1] // GROUP
    sums = tl.sum(tl.reshape(weights, [weights.shape[0], parts, GROUP]), 2)
    group = start // GROUP + tl.arange(0, parts)
    tl.store(
        logsums + group[None, :].to(tl.int64) * queries + row[:, None], here[:, None] + tl.log2(sums),
        mask=real[:, None] & (group[None, :] < groups),
    )  # fmt: skip
    return tl.sum(sums, 1)


@triton.jit
def nearest(
    x, directions, offsets, labels, tokens, clusters, x_head, x_token,
    TILE: tl.constexpr, CLUSTERS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head: which cluster has the largest inner product plus offset; of equal ones the first."""
    head = tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, HEAD_DIM)
    some = tl.load(
        x + head.to(tl.int64) * x_head + row[:, None].to(tl.int64) * x_token + channel[None, :],
        mask=row[:, None] < tokens, other=0.0,
    )  # fmt: skip
    directions += head * clusters * HEAD_DIM
    offsets += head * clusters
    best = tl.full([TILE], float("-inf"), tl.float32)
    label = tl.zeros([TILE], tl.int32)
    for start in range(0, clusters, CLUSTERS):
        cluster = start + tl.arange(0, CLUSTERS)
        real = cluster < clusters
        toward = tl.load(directions + cluster[None, :] * HEAD_DIM + channel[:, None], mask=real[None, :], other=0.0)
        offset = tl.load(offsets + cluster, mask=real, other=float("-inf"))
        scores = tl.dot(some, toward) + offset[None, :]
        here = tl.max(scores, 1)
        first = tl.min(tl.where(scores == here[:, None], cluster[None, :], clusters), 1)
        label = tl.where(here > best, first, label)
        best = tl.maximum(best, here)
    tl.store(labels + head.to(tl.int64) * tokens + row, label.to(tl.int64), mask=row < tokens)


@triton.jit
def cluster_means(
    x, order, sizes, ends, before, means, clusters, tokens, x_head, x_token, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """One cluster of one head: the mean of its tokens, which lie side by side in the order, or what it was before."""
    head = tl.program_id(1).to(tl.int64)
    cluster = head * clusters + tl.program_id(0)
    channel = tl.arange(0, HEAD_DIM)
    # ends are counted over all heads, as the order's places are
    size, end = tl.load(sizes + cluster), tl.load(ends + cluster)
    sums = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for start in range(0, size, ROWS):
        place = end - size + start + tl.arange(0, ROWS)
        token = tl.load(order + place, mask=place < end, other=0)
        sums += tl.load(
            x + head * x_head + token[:, None] * x_token + channel[None, :], mask=(place < end)[:, None], other=0.0
        ).to(tl.float32)
    mean = tl.sum(sums, 0) / tl.maximum(size, 1).to(tl.float32)
    old = tl.load(before + cluster * HEAD_DIM + channel)
    tl.store(means + cluster * HEAD_DIM + channel, tl.where(size > 0, mean, old))


@triton.jit
def alike_blocks(
    x, centre, means, alike, tokens, blocks, x_head, x_token, BLOCK: tl.constexpr, ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """One block of one head: the mean of its tokens less the centre, and the squared length of their mean direction."""
    block, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)
    middle = tl.load(centre + head * HEAD_DIM + channel)
    sums = tl.zeros([HEAD_DIM], tl.float32)
    directions = tl.zeros([HEAD_DIM], tl.float32)
    for start in range(0, BLOCK, ROWS):
        place = start + tl.arange(0, ROWS)
        row = block * BLOCK + place
        real = ((place < BLOCK) & (row < tokens))[:, None]
        some = tl.load(x + head * x_head + row[:, None].to(tl.int64) * x_token + channel[None, :], mask=real, other=0.0)
        some = tl.where(real, some.to(tl.float32) - middle[None, :], 0.0)
        length = tl.maximum(tl.sqrt(tl.sum(some * some, 1)), 1e-12)
        sums += tl.sum(some, 0)
        directions += tl.sum(some / length[:, None], 0)
    size = tl.minimum(BLOCK, tokens - block * BLOCK).to(tl.float32)
    tl.store(means + (head * blocks + block) * HEAD_DIM + channel, sums / size)
    directions /= size
    tl.store(alike + head * blocks + block, tl.sum(directions * directions, 0))


@triton.jit
def eliminate(gram, mass, whole, grown, items, least, BLOCKS: tl.constexpr):
    """One row of blocks: leave out the block that costs least, again and again, and say what each cost."""
    row = tl.program_id(0).to(tl.int64)
    gram += row * items * items
    item = tl.arange(0, BLOCKS)
    live = item < items
    own = tl.load(gram + item * items + item, mask=live, other=0)
    share = tl.load(mass + row * items + item, mask=live, other=0)
    # with all that is left out so far: products of each block with it, its squared length, its mass, the error
    product = tl.zeros([BLOCKS], tl.float32)
    length, gone, error, most = 0.0, 0.0, 0.0, 0.0
    for _ in range(items - 1):
        lengths = length + 2 * product + own
        left = tl.maximum(1 - gone - share, least)
        errors = tl.where(live, lengths / (left * left), float("inf"))
        next_error, next_item = tl.min(errors, return_indices=True, axis=0)
        most = tl.maximum(most, next_error - error)
        tl.store(grown + row * items + next_item, most)
        chosen = item == next_item
        error, length = next_error, tl.sum(tl.where(chosen, lengths, 0))
        gone += tl.sum(tl.where(chosen, share, 0))
        live &= item != next_item
        product += tl.load(gram + next_item * items + item, mask=item < items, other=0)
    last = tl.maximum(most, tl.load(whole + row) - error)
    tl.store(grown + row * items + item, last, mask=live)
