"""Device code of the Triton kernel. `kernels/triton_sparse.py` launches it, and says what the arguments are."""

from __future__ import annotations

import triton
import triton.language as tl

# what a head does; the numbers are those of `expand.KINDS`
_MASKED = tl.constexpr(0)
_DENSE = tl.constexpr(1)
_REUSED = tl.constexpr(2)
_LN2 = tl.constexpr(0.6931471805599453)
# of a block whose largest magnitude is 1; the least that is no denormal number of fp32; and 1.5 · 2^23
_STEP = tl.constexpr(1 / 127)
_TINY = tl.constexpr(2.0**-126)
_NO_DIGITS = tl.constexpr(12582912.0)
# means of blocks walked at a time: of 64, 264 to 312 bytes of a thread spill on sm90, of 32 about as few as without
_MEANS = tl.constexpr(32)


@triton.jit
def expand(
    words, kinds, indices, counts, k_blocks, head_stride, row_words, BLOCKS: tl.constexpr, EVERY_HEAD: tl.constexpr
):
    """Bits to lists: for one query block of one head, its key blocks, ascending, and how many they are."""
    row, head = tl.program_id(0), tl.program_id(1)
    kind = tl.load(kinds + head)
    if EVERY_HEAD or kind == _MASKED:
        block = tl.arange(0, BLOCKS)
        listed = tl.where(kind == _MASKED, k_blocks, 0)
        word = tl.load(words + head * head_stride + row * row_words + block // 32, mask=block < listed, other=0)
        keep = (word >> (block % 32)) & 1
        if EVERY_HEAD:
            keep = keep | (block < tl.where(kind == _DENSE, k_blocks, 0)).to(tl.int32)
        place = tl.cumsum(keep, 0) - keep
        here = head * tl.num_programs(0) + row
        tl.store(indices + here * k_blocks + place, block, mask=keep == 1)
        tl.store(counts + here, tl.sum(keep, 0))


@triton.jit
def expand_variable(
    words, starts, tiles, counts, k_blocks, row_words, listed_most, BLOCKS: tl.constexpr, TILE: tl.constexpr
):
    """Bits to tiles of keys: for one query block of one head, whole tiles, then those that end before they are full.

    A whole tile is listed as its first key times TILE, another one as that plus how many keys it has. Kept blocks that
    lie side by side are one range, whose tiles are whole but for the last.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    here = (head * tl.num_programs(0) + row).to(tl.int64)
    words, starts = words + here * row_words, starts + head * (k_blocks + 1)
    block = tl.arange(0, BLOCKS)
    kept = _kept(words, starts, block, k_blocks)
    first = kept & ~_kept(words, starts, block - 1, k_blocks)
    last = kept & ~_kept(words, starts, block + 1, k_blocks)
    # starts never fall: the largest first one so far is that of the range a block is in
    begin = tl.load(starts + block, mask=first, other=0)
    begin = tl.associative_scan(begin, 0, _larger)
    length = tl.load(starts + block + 1, mask=last, other=0) - tl.where(last, begin, 0)
    whole, rest = length // TILE, length % TILE
    part = (rest > 0).to(tl.int32)
    place = tl.cumsum(whole, 0) - whole
    all_whole = tl.sum(whole, 0)
    tiles += here * listed_most
    for turn in range(tl.max(whole, 0)):
        tl.store(tiles + place + turn, (begin + turn * TILE) * TILE, mask=turn < whole)
    place = all_whole + tl.cumsum(part, 0) - part
    tl.store(tiles + place, (begin + whole * TILE) * TILE + rest, mask=part == 1)
    tl.store(counts + 2 * here, all_whole)
    tl.store(counts + 2 * here + 1, all_whole + tl.sum(part, 0))


@triton.jit
def _kept(words, starts, block, k_blocks):
    """Whether blocks are kept; empty ones count as kept, so that they part no range."""
    there = (block >= 0) & (block < k_blocks)
    bit = (tl.load(words + block // 32, mask=there, other=0) >> (block % 32)) & 1
    empty = tl.load(starts + block + 1, mask=there, other=1) == tl.load(starts + block, mask=there, other=0)
    return (bit == 1) | empty


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def move_rows(
    x_0, x_1, x_2, y_0, y_1, y_2, order, order_head, order_token, tokens,
    x_batch, x_head, x_token, x_channel, y_batch, y_head, y_token, y_channel,
    COUNT: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Some rows of one head of one of the tensors: from where the order says, or back to there."""
    head, third = tl.program_id(1), tl.program_id(2)
    batch, which = (third // COUNT).to(tl.int64), third % COUNT
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = place < tokens
    listed = tl.load(order + head * order_head + place * order_token, mask=real, other=0)
    place, listed = place.to(tl.int64), listed.to(tl.int64)
    channel = tl.arange(0, HEAD_DIM)
    source, target = listed, place
    if BACK:
        source, target = place, listed
    here = batch * x_batch + head.to(tl.int64) * x_head + source[:, None] * x_token + channel[None, :] * x_channel
    there = batch * y_batch + head.to(tl.int64) * y_head + target[:, None] * y_token + channel[None, :] * y_channel
    if which == 0:
        tl.store(y_0 + there, tl.load(x_0 + here, mask=real[:, None]), mask=real[:, None])
    elif which == 1:
        tl.store(y_1 + there, tl.load(x_1 + here, mask=real[:, None]), mask=real[:, None])
    else:
        tl.store(y_2 + there, tl.load(x_2 + here, mask=real[:, None]), mask=real[:, None])


@triton.jit
def quantise(
    x, mean, values, scales, tokens, x_batch, x_head, x_token,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, CENTRED: tl.constexpr,
):  # fmt: skip
    """One block of one head in INT8, and its scale; `int8.quantise` says how, and rounds the same at every step."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    here = batch * tl.num_programs(1) + head
    row, channel = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    token = block * BLOCK + row
    real = ((row < BLOCK) & (token < tokens))[:, None]
    token = token[:, None].to(tl.int64)
    numbers = tl.load(x + batch * x_batch + head * x_head + token * x_token + channel[None, :], mask=real, other=0.0)
    numbers = numbers.to(tl.float32)
    if CENTRED:
        numbers = tl.where(real, numbers - tl.load(mean + here * HEAD_DIM + channel)[None, :], 0.0)
    scale = tl.maximum(tl.max(tl.max(tl.abs(numbers), 1), 0) * _STEP, _TINY)
    # a maximum passes over NaN, a sum does not
    scale += tl.sum(tl.sum(numbers * 0.0, 1), 0)
    # beside 1.5 · 2^23 there are no digits behind the point, and halves are rounded to even
    whole = (tl.div_rn(numbers, scale) + _NO_DIGITS) - _NO_DIGITS
    tl.store(values + (here * tokens + token) * HEAD_DIM + channel[None, :], whole.to(tl.int8), mask=real)
    tl.store(scales + here * tl.num_programs(0) + block, scale)


@triton.jit
def block_means(
    k, v, starts, k_means, v_means, starts_step, k_batch, k_head, k_token, v_batch, v_head, v_token,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """The mean key and the mean value of one block of one head; zeros where it is empty."""
    block, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, behind = tl.load(starts + head * starts_step + block), tl.load(starts + head * starts_step + block + 1)
    channel = tl.arange(0, HEAD_DIM)
    keys, values = tl.zeros([HEAD_DIM], tl.float32), tl.zeros([HEAD_DIM], tl.float32)
    k += batch * k_batch + head.to(tl.int64) * k_head
    v += batch * v_batch + head.to(tl.int64) * v_head
    for start in range(first, behind, ROWS):
        token = (start + tl.arange(0, ROWS))[:, None]
        real, token = token < behind, token.to(tl.int64)
        keys += tl.sum(tl.load(k + token * k_token + channel[None, :], mask=real, other=0.0).to(tl.float32), 0)
        values += tl.sum(tl.load(v + token * v_token + channel[None, :], mask=real, other=0.0).to(tl.float32), 0)
    size = tl.maximum(behind - first, 1).to(tl.float32)
    here = ((batch * tl.num_programs(1) + head) * tl.num_programs(0) + block) * HEAD_DIM + channel
    tl.store(k_means + here, (keys / size).to(k_means.dtype.element_ty))
    tl.store(v_means + here, (values / size).to(v_means.dtype.element_ty))


@triton.jit
def bonuses(words, out, k_blocks, row_words, width, whole, last, BLOCKS: tl.constexpr):
    """One row of a mask: what its bits add to the scores of means, of whole blocks and of the last one."""
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCKS)
    there = block < k_blocks
    bit = (tl.load(words + row * row_words + block // 32, mask=there, other=0) >> (block % 32)) & 1
    bonus = tl.where(block == k_blocks - 1, last, whole)
    tl.store(out + row * width + block, tl.where(there & (bit == 0), bonus, float("-inf")), mask=block < width)


@triton.jit
def attend(
    q, k, v, q_scales, k_scales, out, lse, indices, counts, kinds, computed, served, low, thresholds, k_means, v_means,
    starts, words, mask_step, scale, tokens, computed_count, served_most, q_blocks, k_blocks, heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    HEAD_DIM: tl.constexpr, REUSE: tl.constexpr, WITH_LSE: tl.constexpr, NOTE: tl.constexpr, LEAVE: tl.constexpr,
    TMA: tl.constexpr, INT8: tl.constexpr, SCALE_Q: tl.constexpr, SCALE_K: tl.constexpr, REMAINDER: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one head: online softmax over the keys that the head's kind gives it."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    kind = tl.load(kinds + head)
    masked, reused = kind == _MASKED, kind == _REUSED

    place = tile * TILE_Q + tl.arange(0, TILE_Q)
    rows = tokens
    if REUSE:
        rows = tl.where(reused, computed_count, tokens)
    real = place < rows
    row = place
    if REUSE:
        gathered = place < tl.where(reused, rows, 0)
        row = tl.where(gathered, tl.load(computed + place, mask=gathered, other=0).to(tl.int32), place)
    channel = tl.arange(0, HEAD_DIM)
    queries = tl.load(
        q + batch * q_batch + head * q_head + row[:, None].to(tl.int64) * q_token + channel[None, :],
        mask=real[:, None], other=0.0,
    )  # fmt: skip

    scales = k_scales
    if INT8:
        here = batch * heads + head
        of_rows = q_scales + here * tl.cdiv(tokens, SCALE_Q) + row // SCALE_Q
        scale = scale * tl.load(of_rows, mask=real, other=0.0)[:, None]
        scales = k_scales + here * tl.cdiv(tokens, SCALE_K)

    list_row = head * q_blocks + tile * TILE_Q // BLOCK_Q
    count = tl.where(masked, tl.load(counts + list_row, mask=masked, other=0), k_blocks)
    # a reused head has fewer tiles than the launch
    count = tl.where(tile * TILE_Q < rows, count, 0)

    if TMA:
        k_here, v_here = k, v
    else:
        k_here = k + batch * k_batch + head * k_head
        v_here = v + batch * v_batch + head * v_head
    most = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    mean = tl.zeros([TILE_Q, HEAD_DIM], tl.float32)
    parts: tl.constexpr = BLOCK_K // TILE_K
    # lists ascend: only the last block can reach past the last token
    inner = tl.maximum(count - 1, 0) * parts
    threshold = 0.0
    if NOTE:
        threshold = tl.load(thresholds + head)
    # one bit a block, in words of 32
    low_row = low + list_row * tl.cdiv(k_blocks, 32)
    most, total, mean = _over_keys(
        most, total, mean, queries, real, k_here, v_here, indices + list_row * k_blocks, low_row, threshold, masked, 0,
        inner, tokens, scale, scales, k_token, v_token, batch.to(tl.int32), head, BLOCK_K, TILE_K, HEAD_DIM, NOTE,
        LEAVE, TMA, INT8, SCALE_K, False,
    )  # fmt: skip
    most, total, mean = _over_keys(
        most, total, mean, queries, real, k_here, v_here, indices + list_row * k_blocks, low_row, threshold, masked,
        inner, count * parts, tokens, scale, scales, k_token, v_token, batch.to(tl.int32), head, BLOCK_K, TILE_K,
        HEAD_DIM, NOTE, LEAVE, TMA, INT8, SCALE_K, True,
    )  # fmt: skip
    if REMAINDER:
        list_row = head * mask_step * q_blocks + tile * TILE_Q // BLOCK_Q
        most, total, mean = _over_means(
            most, total, mean, queries, k_means, v_means, starts, words, batch * heads + head, 0, list_row,
            tl.where(masked, k_blocks, 0), k_blocks, scale, HEAD_DIM,
        )  # fmt: skip

    out += batch * out_batch + head * out_head
    lse += (batch * heads + head) * tokens
    _give(
        _divided(mean, total), most * _LN2 + tl.log(total), place, rows, reused, out, lse, served, served_most,
        out_token, HEAD_DIM, REUSE, WITH_LSE,
    )  # fmt: skip


@triton.jit
def _give(
    mean, logsum, place, rows, reused, out, lse, served, served_most, out_token,
    HEAD_DIM: tl.constexpr, REUSE: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Store what some queries of a head have come to, theirs or that of all tokens that take it."""
    channel = tl.arange(0, HEAD_DIM)
    real = place < rows
    turns = 1
    if REUSE:
        turns = tl.where(reused, served_most, 1)
        gathered = place < tl.where(reused, rows, 0)
    for turn in range(turns):
        token = place
        wanted = real
        if REUSE:
            # a computed row without as many takers is filled up with -1
            token = tl.where(gathered, tl.load(served + place * served_most + turn, mask=gathered, other=-1), place)
            wanted = real & (token >= 0)
        here = out + token[:, None].to(tl.int64) * out_token + channel[None, :]
        tl.store(here, mean.to(out.dtype.element_ty), mask=wanted[:, None])
        if WITH_LSE:
            tl.store(lse + token, logsum, mask=wanted)


@triton.jit
def merge(
    mean, most, total, work, out, lse, kinds, served, shares, tokens, tiles, heads, computed_count, served_most,
    out_batch, out_head, out_token,
    TILE_Q: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, REUSE: tl.constexpr, WITH_LSE: tl.constexpr,
):  # fmt: skip
    """Some queries of a tile whose keys were shared out: each share weighs as much as its part of the sum.

    Maxima are in powers of two; what the shares give is not divided yet.
    """
    item = tl.load(work + tl.program_id(0))
    tile, head, batch = item % tiles, item // tiles % heads, (item // (tiles * heads)).to(tl.int64)
    reused = tl.load(kinds + head) == _REUSED
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, HEAD_DIM)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    sum_of_means = tl.zeros([ROWS, HEAD_DIM], tl.float32)
    for share in range(shares):
        here = (tl.program_id(0) * shares + share) * TILE_Q + row
        own = tl.load(most + here)
        new_top = tl.maximum(top, own)
        old, new = tl.exp2(top - new_top), tl.exp2(own - new_top)
        sums = sums * old + tl.load(total + here) * new
        own_mean = tl.load(mean + here[:, None] * HEAD_DIM + channel[None, :])
        sum_of_means = sum_of_means * old[:, None] + own_mean * new[:, None]
        top = new_top
    rows = tokens
    if REUSE:
        rows = tl.where(reused, computed_count, tokens)
    out += batch * out_batch + head * out_head
    lse += (batch * heads + head) * tokens
    _give(
        _divided(sum_of_means, sums), top * _LN2 + tl.log(sums), tile * TILE_Q + row, rows, reused, out, lse, served,
        served_most, out_token, HEAD_DIM, REUSE, WITH_LSE,
    )  # fmt: skip


@triton.jit
def attend_variable(
    q, k, v, out, lse, query_tiles, key_tiles, counts, k_means, v_means, starts, words, scale, tokens, q_blocks,
    k_blocks, listed_most, heads, mask_step,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, HEAD_DIM: tl.constexpr, WITH_LSE: tl.constexpr, TMA: tl.constexpr,
    REMAINDER: tl.constexpr,
):  # fmt: skip
    """One tile of queries of one block of one head: online softmax over tiles of keys that `expand_variable` lists."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # a mask that all heads share has lists of one
    mask_head = head * mask_step
    given = query_tiles + 3 * (mask_head * tl.num_programs(0) + tile)
    list_row = (mask_head * q_blocks + tl.load(given)).to(tl.int64)
    first, behind = tl.load(given + 1), tl.load(given + 2)
    token = first + tl.arange(0, TILE_Q)
    real = token < behind
    channel = tl.arange(0, HEAD_DIM)
    queries = tl.load(
        q + batch * q_batch + head * q_head + token[:, None].to(tl.int64) * q_token + channel[None, :],
        mask=real[:, None], other=0.0,
    )  # fmt: skip
    # the launch has as many tiles as there can be; those past the last query have no list
    whole = tl.load(counts + 2 * list_row, mask=first < behind, other=0)
    count = tl.load(counts + 2 * list_row + 1, mask=first < behind, other=0)

    if TMA:
        k_here, v_here = k, v
    else:
        k_here = k + batch * k_batch + head * k_head
        v_here = v + batch * v_batch + head * v_head
    most = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    mean = tl.zeros([TILE_Q, HEAD_DIM], tl.float32)
    most, total, mean = _over_tiles(
        most, total, mean, queries, k_here, v_here, key_tiles + list_row * listed_most, 0, whole, scale, k_token,
        v_token, batch.to(tl.int32), head, TILE_K, HEAD_DIM, TMA, False,
    )  # fmt: skip
    most, total, mean = _over_tiles(
        most, total, mean, queries, k_here, v_here, key_tiles + list_row * listed_most, whole, count, scale, k_token,
        v_token, batch.to(tl.int32), head, TILE_K, HEAD_DIM, TMA, True,
    )  # fmt: skip
    if REMAINDER:
        most, total, mean = _over_means(
            most, total, mean, queries, k_means, v_means, starts, words, batch * heads + head, mask_head, list_row,
            tl.where(first < behind, k_blocks, 0), k_blocks, scale, HEAD_DIM,
        )  # fmt: skip

    tl.store(
        out + batch * out_batch + head * out_head + token[:, None].to(tl.int64) * out_token + channel[None, :],
        _divided(mean, total).to(out.dtype.element_ty), mask=real[:, None],
    )  # fmt: skip
    if WITH_LSE:
        tl.store(lse + (batch * heads + head) * tokens + token, most * _LN2 + tl.log(total), mask=real)


@triton.jit
def _over_means(
    most, total, mean, queries, k_means, v_means, starts, words, means_row, starts_row, list_row, last, k_blocks,
    scale, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Go on with the means of key blocks up to the last: one key for each that is not kept, as heavy as its tokens."""
    k_means += means_row * k_blocks * HEAD_DIM
    v_means += means_row * k_blocks * HEAD_DIM
    starts += starts_row * (k_blocks + 1)
    # bits are padded to whole words
    words += list_row * tl.cdiv(k_blocks, 32)
    for first in range(0, last, _MEANS):
        block = first + tl.arange(0, _MEANS)
        there = block < k_blocks
        bit = (tl.load(words + block // 32, mask=there, other=0) >> (block % 32)) & 1
        size = tl.load(starts + block + 1, mask=there, other=0) - tl.load(starts + block, mask=there, other=0)
        weight = tl.where((bit == 0) & (size > 0), tl.log2(tl.maximum(size, 1).to(tl.float32)), float("-inf"))
        scores = _scores(queries, k_means, first, k_blocks, scale, HEAD_DIM, 0, 0, _MEANS, HEAD_DIM, False, True)
        scores += weight[None, :]
        new_most = tl.maximum(most, tl.max(scores, 1))
        values = _values(v_means, first, k_blocks, HEAD_DIM, 0, 0, _MEANS, HEAD_DIM, False, True)
        # queries may have had no key yet, and all of these blocks be kept or empty
        finite = tl.where(new_most == float("-inf"), 0.0, new_most)
        total, mean = _add(scores, values, most, finite, total, mean)
        most = new_most
    return most, total, mean


@triton.jit
def _over_tiles(
    most, total, mean, queries, k, v, tiles, first, last, scale, k_token, v_token, batch, head,
    TILE_K: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Go on with listed tiles of keys, from the first to before the last."""
    for i in range(first, last):
        listed = tl.load(tiles + i)
        start = listed // TILE_K
        end = start + listed % TILE_K
        scores = _scores(queries, k, start, end, scale, k_token, batch, head, TILE_K, HEAD_DIM, TMA, TAIL)
        new_most = tl.maximum(most, tl.max(scores, 1))
        values = _values(v, start, end, v_token, batch, head, TILE_K, HEAD_DIM, TMA, TAIL)
        total, mean = _add(scores, values, most, new_most, total, mean)
        most = new_most
    return most, total, mean


@triton.jit
def _over_keys(
    most, total, mean, queries, real, k, v, blocks, low_row, threshold, masked, first, last, tokens, scale, scales,
    k_token, v_token, batch, head,
    BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, HEAD_DIM: tl.constexpr, NOTE: tl.constexpr, LEAVE: tl.constexpr,
    TMA: tl.constexpr, INT8: tl.constexpr, SCALE_K: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Go on with tiles of keys, from the first to before the last; the softmax is kept in powers of two."""
    parts: tl.constexpr = BLOCK_K // TILE_K
    for i in range(first, last):
        block = i // parts
        block = tl.where(masked, tl.load(blocks + block, mask=masked, other=0), block)
        start = block * BLOCK_K + (i % parts) * TILE_K
        factor = scale
        if INT8:
            factor = scale * tl.load(scales + start // SCALE_K)
        scores = _scores(queries, k, start, tokens, factor, k_token, batch, head, TILE_K, HEAD_DIM, TMA, TAIL)
        here = tl.max(scores, 1)
        # the first tile of a block has at least one real key, so the maximum is finite from then on
        new_most = tl.maximum(most, here)
        values = _values(v, start, tokens, v_token, batch, head, TILE_K, HEAD_DIM, TMA, TAIL)
        matters = True
        if NOTE:
            # rows past the last query have scores too, of zeros
            matters = tl.max(tl.where(real, here - new_most, float("-inf")), 0) > threshold
            tl.atomic_or(low_row + block // 32, tl.where(matters, 0, 1) << (block % 32))
        if LEAVE:
            if matters:
                total, mean = _add(scores, values, most, new_most, total, mean)
        else:
            total, mean = _add(scores, values, most, new_most, total, mean)
        # a block that does not matter does not raise any maximum
        most = new_most
    return most, total, mean


@triton.jit
def _scores(
    queries, k, start, end, scale, k_token, batch, head,
    TILE_K: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Scores with one tile of keys, as powers of two; -inf from the end on, where the tile is a tail."""
    key, channel = start + tl.arange(0, TILE_K), tl.arange(0, HEAD_DIM)
    if TMA:
        keys = k.load([batch, head, start, 0]).reshape([TILE_K, HEAD_DIM]).T
    elif TAIL:
        keys = tl.load(k + key[None, :].to(tl.int64) * k_token + channel[:, None], mask=key[None, :] < end, other=0.0)
    else:
        keys = tl.load(k + key[None, :].to(tl.int64) * k_token + channel[:, None])
    scores = tl.dot(queries, keys) * scale
    if TAIL:
        scores = tl.where(key[None, :] < end, scores, float("-inf"))
    return scores


@triton.jit
def _values(
    v, start, end, v_token, batch, head,
    TILE_K: tl.constexpr, HEAD_DIM: tl.constexpr, TMA: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """One tile of values; those from the end on are of no weight."""
    key, channel = start + tl.arange(0, TILE_K), tl.arange(0, HEAD_DIM)
    if TMA:
        values = v.load([batch, head, start, 0]).reshape([TILE_K, HEAD_DIM])
    elif TAIL:
        values = tl.load(v + key[:, None].to(tl.int64) * v_token + channel[None, :], mask=key[:, None] < end, other=0.0)
    else:
        values = tl.load(v + key[:, None].to(tl.int64) * v_token + channel[None, :])
    return values


@triton.jit
def _divided(mean, total):
    """The output; a query without keys has a sum of 0, an output of zeros and an LSE of -inf."""
    return mean / tl.where(total == 0.0, 1.0, total)[:, None]


@triton.jit
def _add(scores, values, most, new_most, total, mean):
    """One tile more in the online softmax."""
    weights = tl.exp2(scores - new_most[:, None])
    shrink = tl.exp2(most - new_most)
    total = total * shrink + tl.sum(weights, 1)
    mean = tl.dot(weights.to(values.dtype), values, mean * shrink[:, None])
    return total, mean
