"""Device code of the Hopper kernel. `kernels/gluon_hopper.py` launches it, and says what the arguments are.

Two ways to run one algorithm. `attend`: a warp loads tiles for one or two warpgroups that multiply, each 64 queries.
`attend_alone`: one warpgroup that loads for itself, of which more fit a multiprocessor.

Annotations are objects here, which Triton looks at: this file does not import them from the future.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

# Triton 3.7 gave these other names
_copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
_meet = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier

# what a head does; the numbers are those of `expand.KINDS`
_MASKED = gl.constexpr(0)
_REUSED = gl.constexpr(2)
_LN2 = gl.constexpr(0.6931471805599453)
# below any score that is not -inf. A power of two: times the scale it is exact, so that, fused with a subtraction, it
# leaves nothing over, of which exp2 might make an infinity
_LEAST = gl.constexpr(-(2.0**100))
# queries of a warpgroup: the rows of one wgmma
_ROWS = gl.constexpr(64)


@aggregate
class Call:
    """What every function needs to know of a launch."""

    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    k_means: tma.tensor_descriptor
    v_means: tma.tensor_descriptor
    out: tma.tensor_descriptor
    lse: gl.tensor
    logsums: gl.tensor
    indices: gl.tensor
    counts: gl.tensor
    kinds: gl.tensor
    computed: gl.tensor
    served: gl.tensor
    work: gl.tensor
    bonuses: gl.tensor
    parts_mean: gl.tensor
    parts_most: gl.tensor
    parts_total: gl.tensor
    q_pointer: gl.tensor
    out_pointer: gl.tensor
    scale: gl.tensor
    tokens: gl.tensor
    mask_step: gl.tensor
    whole: gl.tensor
    shares: gl.tensor
    tiles: gl.tensor
    served_most: gl.tensor
    q_blocks: gl.tensor
    k_blocks: gl.tensor
    heads: gl.tensor
    computed_count: gl.tensor
    q_batch: gl.tensor
    q_head: gl.tensor
    q_token: gl.tensor
    out_batch: gl.tensor
    out_head: gl.tensor
    out_token: gl.tensor
    BLOCK_Q: gl.constexpr
    BLOCK_K: gl.constexpr
    TILE_K: gl.constexpr
    HEAD_DIM: gl.constexpr
    WARPGROUPS: gl.constexpr
    STAGES: gl.constexpr
    REUSE: gl.constexpr
    WITH_LSE: gl.constexpr
    WITH_LOGSUMS: gl.constexpr
    Q_REGISTERS: gl.constexpr
    SHARED_OUT: gl.constexpr
    REMAINDER: gl.constexpr
    # layouts of a warpgroup's scores, of its outputs, and of its queries and weights in registers
    SCORES: gl.constexpr
    OUTPUTS: gl.constexpr
    QUERIES: gl.constexpr
    WEIGHTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, q, k, v, k_means, v_means, out, lse, logsums, indices, counts, kinds, computed, served, work, bonuses,
        parts_mean, parts_most, parts_total, q_pointer, out_pointer, scale, tokens, mask_step, whole, shares, tiles,
        served_most, q_blocks, k_blocks, heads, computed_count, q_batch, q_head, q_token, out_batch, out_head,
        out_token,
        BLOCK_Q, BLOCK_K, TILE_K, HEAD_DIM, WARPGROUPS, STAGES, REUSE, WITH_LSE, WITH_LOGSUMS, Q_REGISTERS,
        SHARED_OUT, REMAINDER,
    ):  # fmt: skip
        self.q, self.k, self.v, self.out, self.lse, self.logsums = q, k, v, out, lse, logsums
        self.k_means, self.v_means, self.bonuses, self.mask_step = k_means, v_means, bonuses, mask_step
        self.indices, self.counts, self.kinds, self.computed, self.served = indices, counts, kinds, computed, served
        self.work, self.parts_mean, self.parts_most, self.parts_total = work, parts_mean, parts_most, parts_total
        self.q_pointer, self.out_pointer = q_pointer, out_pointer
        self.scale, self.tokens, self.tiles, self.served_most = scale, tokens, tiles, served_most
        self.whole, self.shares = whole, shares
        self.q_blocks, self.k_blocks, self.heads, self.computed_count = q_blocks, k_blocks, heads, computed_count
        self.q_batch, self.q_head, self.q_token = q_batch, q_head, q_token
        self.out_batch, self.out_head, self.out_token = out_batch, out_head, out_token
        self.BLOCK_Q, self.BLOCK_K = gl.constexpr(BLOCK_Q), gl.constexpr(BLOCK_K)
        self.TILE_K, self.HEAD_DIM = gl.constexpr(TILE_K), gl.constexpr(HEAD_DIM)
        self.WARPGROUPS, self.STAGES = gl.constexpr(WARPGROUPS), gl.constexpr(STAGES)
        self.REUSE, self.WITH_LSE = gl.constexpr(REUSE), gl.constexpr(WITH_LSE)
        self.WITH_LOGSUMS = gl.constexpr(WITH_LOGSUMS)
        self.Q_REGISTERS, self.SHARED_OUT = gl.constexpr(Q_REGISTERS), gl.constexpr(SHARED_OUT)
        self.REMAINDER = gl.constexpr(REMAINDER)
        scores = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE_K, 16])
        outputs = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
        self.SCORES, self.OUTPUTS = gl.constexpr(scores), gl.constexpr(outputs)
        self.QUERIES = gl.constexpr(gl.DotOperandLayout(0, scores, 2))
        self.WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, outputs, 2))


@gluon.jit
def attend(
    q, k, v, k_means, v_means, out, lse, logsums, indices, counts, kinds, computed, served, work, bonuses, parts_mean,
    parts_most, parts_total, counter, q_pointer, out_pointer, scale, tokens, mask_step, whole, shares, items,
    tiles, served_most, q_blocks, k_blocks, heads, computed_count, q_batch, q_head, q_token, out_batch, out_head,
    out_token,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, HEAD_DIM: gl.constexpr,
    WARPGROUPS: gl.constexpr, STAGES: gl.constexpr, REUSE: gl.constexpr, WITH_LSE: gl.constexpr,
    WITH_LOGSUMS: gl.constexpr, Q_REGISTERS: gl.constexpr, SHARED_OUT: gl.constexpr, REMAINDER: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """Take one tile of queries after the other until none is left; of the last ones a share of their keys."""
    queries = gl.allocate_shared_memory(q.dtype, [WARPGROUPS, 1, 1, _ROWS, HEAD_DIM], q.layout)
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, TILE_K, HEAD_DIM], k.layout)
    values = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, TILE_K, HEAD_DIM], v.layout)
    outputs = gl.allocate_shared_memory(q.dtype, [WARPGROUPS, 1, 1, _ROWS, HEAD_DIM], out.layout)
    picked = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = _barriers(1, 1)
    q_empty = _barriers(1, WARPGROUPS)
    k_full = _barriers(STAGES, 1)
    k_empty = _barriers(STAGES, WARPGROUPS)
    v_full = _barriers(STAGES, 1)
    v_empty = _barriers(STAGES, WARPGROUPS)
    picked_full = _barriers(2, 1)
    picked_empty = _barriers(2, WARPGROUPS)
    fence_async_shared()

    # integers as tensors: Triton makes constants of those that are 1, and workers take none
    c = Call(
        q, k, v, k_means, v_means, out, lse, logsums, indices, counts, kinds, computed, served, work, bonuses,
        parts_mean, parts_most, parts_total, q_pointer, out_pointer, gl.to_tensor(scale), gl.to_tensor(tokens),
        gl.to_tensor(mask_step), gl.to_tensor(whole),
        gl.to_tensor(shares), gl.to_tensor(tiles), gl.to_tensor(served_most), gl.to_tensor(q_blocks),
        gl.to_tensor(k_blocks), gl.to_tensor(heads), gl.to_tensor(computed_count), gl.to_tensor(q_batch),
        gl.to_tensor(q_head), gl.to_tensor(q_token), gl.to_tensor(out_batch), gl.to_tensor(out_head),
        gl.to_tensor(out_token),
        BLOCK_Q, BLOCK_K, TILE_K, HEAD_DIM, WARPGROUPS, STAGES, REUSE, WITH_LSE, WITH_LOGSUMS, Q_REGISTERS,
        SHARED_OUT, REMAINDER,
    )  # fmt: skip
    full = (q_full, k_full, v_full, picked_full)
    empty = (q_empty, k_empty, v_empty, picked_empty)
    loading = (c, queries, keys, values, picked, full, empty, gl.to_tensor(items), counter)
    computing = (c, queries, keys, values, picked, full, empty, outputs)
    if WARPGROUPS == 2:
        gl.warp_specialize(
            [(_consume_first, computing), (_consume_second, computing), (_produce, loading)],
            [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize([(_consume_first, computing), (_produce, loading)], [1], [PRODUCER_REGISTERS])


@gluon.jit
def _produce(c, queries, keys, values, picked, full, empty, items, counter):
    """Hand out tiles of queries, and load what they need."""
    q_full, k_full, v_full, picked_full = full
    q_empty, k_empty, v_empty, picked_empty = empty
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    place = gl.atomic_add(counter, 1)
    while place < items:
        item = _item_at(c, place)
        # a share is told by its place
        handed = place if c.SHARED_OUT else item
        _hand_out(handed, turn, picked, picked_full, picked_empty, layout)
        tile, head, batch, kind, listed, masked, count = _item(c, item)
        n, start = _last_tile(c, listed, count, masked)
        first, n, start = _share(c, place, n, start, listed, masked)

        mbarrier.wait(q_empty.index(0), (turn & 1) ^ 1)
        if kind == _REUSED:
            # these rows are gathered by those who compute them
            mbarrier.arrive(q_full.index(0), count=1)
        else:
            mbarrier.expect(q_full.index(0), c.WARPGROUPS * _ROWS * c.HEAD_DIM * 2)
            for i in gl.static_range(c.WARPGROUPS):
                row = (tile * c.WARPGROUPS + i) * _ROWS
                _copy_in(c.q, [batch, head, row, 0], q_full.index(0), queries.index(i))

        if c.REMAINDER:
            means = _mean_tiles(c, masked)
            for i in range(means):
                _load(c, c.k_means, [batch, head, i * c.TILE_K, 0], keys, k_full, k_empty, step + i)
                _load(c, c.v_means, [batch, head, i * c.TILE_K, 0], values, v_full, v_empty, step + i)
            step += means
        # keys of a tile come before the values of the one that precedes it, as they are used; lists are read ahead
        if n > 0:
            _load(c, c.k, [batch, head, start, 0], keys, k_full, k_empty, step)
        coming = _start(c, listed, first + n - 2, masked)
        for i in range(1, n):
            following = _start(c, listed, first + n - 2 - i, masked)
            _load(c, c.k, [batch, head, coming, 0], keys, k_full, k_empty, step + i)
            _load(c, c.v, [batch, head, start, 0], values, v_full, v_empty, step + i - 1)
            start = coming
            coming = following
        if n > 0:
            _load(c, c.v, [batch, head, start, 0], values, v_full, v_empty, step + n - 1)
        step += n
        turn += 1
        place = gl.atomic_add(counter, 1)
    _hand_out(-1, turn, picked, picked_full, picked_empty, layout)


@gluon.jit
def _consume_first(c, queries, keys, values, picked, full, empty, outputs):
    _consume(c, queries, keys, values, picked, full, empty, outputs, 0)


@gluon.jit
def _consume_second(c, queries, keys, values, picked, full, empty, outputs):
    _consume(c, queries, keys, values, picked, full, empty, outputs, 1)


@gluon.jit
def _consume(c, queries, keys, values, picked, full, empty, outputs, ME: gl.constexpr):
    """Compute 64 queries of every tile that is handed out."""
    q_full, k_full, v_full, picked_full = full
    q_empty, k_empty, v_empty, picked_empty = empty
    PING_PONG: gl.constexpr = c.WARPGROUPS == 2
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])

    buffer = queries.index(ME).reshape([_ROWS, c.HEAD_DIM])
    step = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    if PING_PONG and ME == 1:
        _let_other_multiply(ME)
    running = gl.to_tensor(True)
    while running:
        slot = turn % 2
        mbarrier.wait(picked_full.index(slot), (turn // 2) & 1)
        handed = gl.sum(picked.index(slot).load(layout), 0)
        mbarrier.arrive(picked_empty.index(slot), count=1)
        running = handed >= 0
        if running:
            item = _item_at(c, handed) if c.SHARED_OUT else handed
            tile, head, batch, kind, listed, masked, count = _item(c, item)
            n, start = _last_tile(c, listed, count, masked)
            first, n, start = _share(c, handed, n, start, listed, masked)
            row = (tile * c.WARPGROUPS + ME) * _ROWS
            mbarrier.wait(q_full.index(0), turn & 1)
            if c.REUSE:
                if kind == _REUSED:
                    _gather(c, buffer, row, batch, head)
            if c.Q_REGISTERS:
                mine = buffer.load(c.QUERIES)
                mbarrier.arrive(q_empty.index(0), count=1)
            else:
                mine = buffer
            most, total, mean = _nothing(c)
            if c.REMAINDER:
                # a few tiles, whose products of two warpgroups need not take turns
                means = _mean_tiles(c, masked)
                for i in range(means):
                    stage = (step + i) % c.STAGES
                    parity = ((step + i) // c.STAGES) & 1
                    mbarrier.wait(k_full.index(stage), parity)
                    s = warpgroup_mma_wait(0, deps=(_scores(c, mine, keys.index(stage)),))
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    most, total, mean, p = _weigh_means(c, s, most, total, mean, i, tile, head)
                    mbarrier.wait(v_full.index(stage), parity)
                    mean = warpgroup_mma_wait(0, deps=(_add(c, mean, p, values.index(stage)),))
                    mbarrier.arrive(v_empty.index(stage), count=1)
                step += means
            if n > 0:
                stage = step % c.STAGES
                parity = (step // c.STAGES) & 1
                mbarrier.wait(k_full.index(stage), parity)
                s = warpgroup_mma_wait(0, deps=(_scores(c, mine, keys.index(stage)),))
                mbarrier.arrive(k_empty.index(stage), count=1)
                # only this tile, the first one, can reach past the last token
                s = gl.where(_real_keys(c, start)[None, :], s, float("-inf"))
                most, total, shrink, w = _weigh(s, most, total, c.scale)
                _keep_logsums(c, w, most, first + n - 1, row, batch, head)
                if c.REMAINDER:
                    mean = mean * _of_outputs(c, shrink)[:, None]
                p = _rounded(c, w)
                for i in range(1, n):
                    before, parity_before = stage, parity
                    stage = (step + i) % c.STAGES
                    parity = ((step + i) // c.STAGES) & 1
                    mbarrier.wait(k_full.index(stage), parity)
                    if PING_PONG:
                        _wait_to_multiply(ME)
                    s_next = _scores(c, mine, keys.index(stage))
                    mbarrier.wait(v_full.index(before), parity_before)
                    mean_next = _add(c, mean, p, values.index(before))
                    if PING_PONG:
                        _let_other_multiply(ME)
                    s = warpgroup_mma_wait(1, deps=(s_next,))
                    mbarrier.arrive(k_empty.index(stage), count=1)
                    most, total, shrink, w = _weigh(s, most, total, c.scale)
                    _keep_logsums(c, w, most, first + n - 1 - i, row, batch, head)
                    total = _done_before(total)
                    mean = warpgroup_mma_wait(0, deps=(mean_next,))
                    mbarrier.arrive(v_empty.index(before), count=1)
                    mean = mean * _of_outputs(c, shrink)[:, None]
                    p = _rounded(c, w)
                mbarrier.wait(v_full.index(stage), parity)
                mean = warpgroup_mma_wait(0, deps=(_add(c, mean, p, values.index(stage)),))
                mbarrier.arrive(v_empty.index(stage), count=1)
                step += n
            if not c.Q_REGISTERS:
                mbarrier.arrive(q_empty.index(0), count=1)
            if not c.SHARED_OUT or handed < c.whole:
                _write(c, mean, most, total, outputs.index(ME), row, batch, head, kind)
            if c.SHARED_OUT:
                if handed >= c.whole:
                    _write_part(c, mean, most, total, (handed - c.whole) * c.WARPGROUPS + ME)
            turn += 1
    tma.store_wait(0)


@gluon.jit
def attend_alone(
    q, k, v, k_means, v_means, out, lse, logsums, indices, counts, kinds, computed, served, work, bonuses, q_pointer,
    out_pointer, scale, tokens, mask_step, tiles, served_most, q_blocks, k_blocks, heads, computed_count,
    q_batch, q_head, q_token, out_batch, out_head, out_token,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, TILE_K: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, REUSE: gl.constexpr, WITH_LSE: gl.constexpr, WITH_LOGSUMS: gl.constexpr,
    Q_REGISTERS: gl.constexpr, REMAINDER: gl.constexpr,
):  # fmt: skip
    """One tile of 64 queries."""
    buffer = gl.allocate_shared_memory(q.dtype, [1, 1, _ROWS, HEAD_DIM], q.layout)
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, TILE_K, HEAD_DIM], k.layout)
    values = gl.allocate_shared_memory(q.dtype, [STAGES, 1, 1, TILE_K, HEAD_DIM], v.layout)
    q_full = _barriers(1, 1)
    k_full = _barriers(STAGES, 1)
    v_full = _barriers(STAGES, 1)
    fence_async_shared()
    # nothing is shared out here: the numbers and tensors for that stand for nothing
    c = Call(
        q, k, v, k_means, v_means, out, lse, logsums, indices, counts, kinds, computed, served, work, bonuses, work,
        work, work, q_pointer, out_pointer, gl.to_tensor(scale), gl.to_tensor(tokens), gl.to_tensor(mask_step),
        gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(tiles), gl.to_tensor(served_most), gl.to_tensor(q_blocks),
        gl.to_tensor(k_blocks), gl.to_tensor(heads), gl.to_tensor(computed_count), gl.to_tensor(q_batch),
        gl.to_tensor(q_head), gl.to_tensor(q_token), gl.to_tensor(out_batch), gl.to_tensor(out_head),
        gl.to_tensor(out_token),
        BLOCK_Q, BLOCK_K, TILE_K, HEAD_DIM, 1, STAGES, REUSE, WITH_LSE, WITH_LOGSUMS, Q_REGISTERS, False, REMAINDER,
    )  # fmt: skip

    tile, head, batch, kind, listed, masked, count = _item(c, gl.load(work + gl.program_id(0)))
    n, start = _last_tile(c, listed, count, masked)
    # means come before the tiles of the list
    means = _mean_tiles(c, masked)
    steps = means + n
    row = tile * _ROWS
    mine = buffer.reshape([_ROWS, HEAD_DIM])
    mbarrier.expect(q_full.index(0), _ROWS * HEAD_DIM * 2, pred=kind != _REUSED)
    _copy_in(q, [batch, head, row, 0], q_full.index(0), buffer, pred=kind != _REUSED)
    for ahead in gl.static_range(STAGES):
        _fill_either(c, k, k_means, batch, head, listed, masked, keys, k_full, ahead, means, steps)
        _fill_either(c, v, v_means, batch, head, listed, masked, values, v_full, ahead, means, steps)
    mbarrier.wait(q_full.index(0), 0, pred=kind != _REUSED)
    if REUSE:
        if kind == _REUSED:
            _gather(c, mine, row, batch, head)
    if Q_REGISTERS:
        mine = mine.load(c.QUERIES)
    most, total, mean = _nothing(c)
    if REMAINDER:
        for i in range(means):
            stage = i % STAGES
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            s = warpgroup_mma_wait(0, deps=(_scores(c, mine, keys.index(stage)),))
            _meet()
            _fill_either(c, k, k_means, batch, head, listed, masked, keys, k_full, i + STAGES, means, steps)
            most, total, mean, p = _weigh_means(c, s, most, total, mean, i, tile, head)
            mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)
            mean = warpgroup_mma_wait(0, deps=(_add(c, mean, p, values.index(stage)),))
            _meet()
            _fill_either(c, v, v_means, batch, head, listed, masked, values, v_full, i + STAGES, means, steps)
    # where the keys of the next step to load start; those of the step before have been loaded, its values not yet
    coming = _start(c, listed, n - 1 - STAGES, masked)
    if n > 0:
        mbarrier.wait(k_full.index(means % STAGES), (means // STAGES) & 1)
        s = warpgroup_mma_wait(0, deps=(_scores(c, mine, keys.index(means % STAGES)),))
        _meet()
        _fill(c, k, [batch, head, coming, 0], keys, k_full, means + STAGES, steps)
        s = gl.where(_real_keys(c, start)[None, :], s, float("-inf"))
        most, total, shrink, w = _weigh(s, most, total, c.scale)
        _keep_logsums(c, w, most, n - 1, row, batch, head)
        if REMAINDER:
            mean = mean * _of_outputs(c, shrink)[:, None]
        p = _rounded(c, w)
        for i in range(means + 1, steps):
            stage = i % STAGES
            before = (i - 1) % STAGES
            following = _start(c, listed, steps - 1 - STAGES - i, masked)
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            s_next = _scores(c, mine, keys.index(stage))
            mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
            mean_next = _add(c, mean, p, values.index(before))
            s = warpgroup_mma_wait(1, deps=(s_next,))
            _meet()
            _fill(c, k, [batch, head, following, 0], keys, k_full, i + STAGES, steps)
            most, total, shrink, w = _weigh(s, most, total, c.scale)
            _keep_logsums(c, w, most, steps - 1 - i, row, batch, head)
            total = _done_before(total)
            mean = warpgroup_mma_wait(0, deps=(mean_next,))
            _meet()
            _fill(c, v, [batch, head, coming, 0], values, v_full, i - 1 + STAGES, steps)
            coming = following
            mean = mean * _of_outputs(c, shrink)[:, None]
            p = _rounded(c, w)
        last = (steps - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((steps - 1) // STAGES) & 1)
        mean = warpgroup_mma_wait(0, deps=(_add(c, mean, p, values.index(last)),))
    _meet()
    _write(c, mean, most, total, buffer, row, batch, head, kind)
    tma.store_wait(0)


@gluon.jit
def _fill(c, tensor, where, buffers, full, step, steps):
    """Copy a tile into the buffer of this step, if there is such a step; what was there has been used."""
    stage = step % c.STAGES
    mbarrier.expect(full.index(stage), c.TILE_K * c.HEAD_DIM * 2, pred=step < steps)
    _copy_in(tensor, where, full.index(stage), buffers.index(stage), pred=step < steps)


@gluon.jit
def _fill_either(c, tensor, of_means, batch, head, listed, masked, buffers, full, step, means, steps):
    """The same where the step may be one of those of means, which come before those of the list."""
    real = gl.to_tensor(True)
    if c.REMAINDER:
        real = step >= means
        if not real:
            stage = step % c.STAGES
            where = [batch, head, step * c.TILE_K, 0]
            mbarrier.expect(full.index(stage), c.TILE_K * c.HEAD_DIM * 2)
            _copy_in(of_means, where, full.index(stage), buffers.index(stage))
    if real:
        start = _start(c, listed, steps - 1 - step, masked)
        _fill(c, tensor, [batch, head, start, 0], buffers, full, step, steps)


@gluon.jit
def _start(c, listed, tile, masked):
    """The first key of a tile of a list."""
    PARTS: gl.constexpr = c.BLOCK_K // c.TILE_K
    return _listed(listed, tile // PARTS, masked) * c.BLOCK_K + tile % PARTS * c.TILE_K


@gluon.jit
def _barriers(number: gl.constexpr, arrivals: gl.constexpr):
    made = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def _item_at(c, place):
    """The item of work at a place; those that are shared out have as many places as shares."""
    index = place
    if c.SHARED_OUT:
        index = gl.where(place < c.whole, place, c.whole + (place - c.whole) // c.shares)
    return gl.load(c.work + index)


@gluon.jit
def _share(c, place, n, start, listed, masked):
    """The share of a list's n tiles that a place has: the first of them, how many they are, where the last starts."""
    first = gl.to_tensor(0)
    if c.SHARED_OUT:
        out = place >= c.whole
        shares = gl.where(out, c.shares, 1)
        mine = gl.where(out, (place - c.whole) % c.shares, 0)
        first = n * mine // shares
        behind = n * (mine + 1) // shares
        start = gl.where(behind == n, start, _start(c, listed, behind - 1, masked))
        n = behind - first
    return first, n, start


@gluon.jit
def _item(c, item):
    """What an item of work is: its tile, head and batch, the head's kind, and its list of key blocks."""
    tile = item % c.tiles
    head = item // c.tiles % c.heads
    batch = item // (c.tiles * c.heads)
    kind = gl.load(c.kinds + head)
    masked = kind == _MASKED
    list_row = head * c.q_blocks + tile * (c.WARPGROUPS * _ROWS) // c.BLOCK_Q
    count = gl.where(masked, gl.load(c.counts + list_row, mask=masked, other=0), c.k_blocks)
    return tile, head, batch, kind, c.indices + list_row.to(gl.int64) * c.k_blocks, masked, count


@gluon.jit
def _listed(listed, place, masked):
    """The key block at this place of a list, or of all blocks where a head has no list."""
    return gl.where(masked, gl.load(listed + place, mask=masked & (place >= 0), other=0), place)


@gluon.jit
def _last_tile(c, listed, count, masked):
    """How many tiles of keys a list has, and where the last of them starts.

    Tiles of the last block that lie past the last token do not count.
    """
    PARTS: gl.constexpr = c.BLOCK_K // c.TILE_K
    block = _listed(listed, count - 1, masked)
    parts = gl.minimum((c.tokens - block * c.BLOCK_K + c.TILE_K - 1) // c.TILE_K, PARTS)
    n = gl.where(count > 0, (count - 1) * PARTS + parts, 0)
    return n, block * c.BLOCK_K + (parts - 1) * c.TILE_K


@gluon.jit
def _mean_tiles(c, masked):
    """How many tiles of means there are beside a list: all blocks have one, and a head without a list needs none."""
    tiles = gl.to_tensor(0)
    if c.REMAINDER:
        tiles = gl.where(masked, (c.k_blocks + c.TILE_K - 1) // c.TILE_K, 0)
    return tiles


@gluon.jit
def _hand_out(item, turn, picked, full, empty, layout: gl.constexpr):
    slot = turn % 2
    mbarrier.wait(empty.index(slot), ((turn // 2) & 1) ^ 1)
    picked.index(slot).store(gl.full([1], item, gl.int32, layout))
    mbarrier.arrive(full.index(slot), count=1)


@gluon.jit
def _load(c, tensor, where, buffers, full, empty, step):
    """Copy a tile into the buffer of this step, once what was there has been used."""
    stage = step % c.STAGES
    mbarrier.wait(empty.index(stage), ((step // c.STAGES) & 1) ^ 1)
    mbarrier.expect(full.index(stage), c.TILE_K * c.HEAD_DIM * 2)
    _copy_in(tensor, where, full.index(stage), buffers.index(stage))


@gluon.jit
def _gather(c, buffer, row, batch, head):
    """Fetch the queries that a reused head computes: they lie apart."""
    place = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, c.OUTPUTS))
    channel = gl.arange(0, c.HEAD_DIM, layout=gl.SliceLayout(0, c.OUTPUTS))
    token = gl.load(c.computed + place, mask=place < c.computed_count, other=0)
    here = c.q_pointer + batch.to(gl.int64) * c.q_batch + head.to(gl.int64) * c.q_head
    buffer.store(gl.load(here + token[:, None].to(gl.int64) * c.q_token + channel[None, :]))
    fence_async_shared()
    _meet()


@gluon.jit
def _nothing(c):
    """Maximum, sum and mean of no keys."""
    most = gl.full([_ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, c.SCORES))
    total = _sums(gl.full([_ROWS, c.TILE_K], 0.0, gl.float32, c.SCORES))
    return most, total, gl.full([_ROWS, c.HEAD_DIM], 0.0, gl.float32, c.OUTPUTS)


@gluon.jit
def _scores(c, mine, keys):
    keys = keys.reshape([c.TILE_K, c.HEAD_DIM]).permute((1, 0))
    zeros = gl.full([_ROWS, c.TILE_K], 0.0, gl.float32, c.SCORES)
    return warpgroup_mma(mine, keys, zeros, use_acc=False, is_async=True)


@gluon.jit
def _add(c, mean, p, values):
    return warpgroup_mma(p, values.reshape([c.TILE_K, c.HEAD_DIM]), mean, is_async=True)


@gluon.jit
def _real_keys(c, start):
    return start + gl.arange(0, c.TILE_K, layout=gl.SliceLayout(0, c.SCORES)) < c.tokens


@gluon.jit
def _weigh(s, most, total, scale):
    """One step of the online softmax, in powers of two: new maximum and sum, what the old ones shrink by, weights."""
    # pairs first: one long chain of maxima would be waited for
    # in parts that do not wait for each other, those of a thread first
    parts = gl.max(gl.max(gl.reshape(s, [s.shape[0], s.shape[1] // 32, 4, 4, 2]), 4), 1)
    new_most = gl.maximum(most, gl.convert_layout(gl.max(gl.max(parts, 1), 1), most.type.layout))
    shift = new_most * scale
    weights = gl.exp2(s * scale - shift[:, None])
    shrink = gl.exp2(most * scale - shift)
    total = total * gl.convert_layout(shrink, gl.SliceLayout(1, total.type.layout))[:, None] + _sums(weights)
    return new_most, total, shrink, weights


@gluon.jit
def _keep_logsums(c, weights, most, tile, row, batch, head):
    """Store the log-sum-exps of scores with the keys of a tile, of a head without a list: in powers of two.

    A tile so far below a query's largest score that its sum is 0 has no weight in all of the attention either.
    """
    if c.WITH_LOGSUMS:
        sums = _of_outputs(c, gl.sum(_sums(weights), 1))
        place = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, c.OUTPUTS))
        tiles = (c.tokens + c.TILE_K - 1) // c.TILE_K
        here = c.logsums + ((batch * c.heads + head) * tiles + tile).to(gl.int64) * c.tokens
        gl.store(here + place, _of_outputs(c, most) * c.scale + _log2(sums), mask=place < c.tokens)


@gluon.jit
def _log2(x):
    """By the hardware, to 2⁻²² of the result's range (PTX: lg2.approx); Triton's takes 35 instructions."""
    return gl.inline_asm_elementwise("lg2.approx.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _weigh_means(c, s, most, total, mean, i, tile, head):
    """The same for a tile of means, each as heavy as its block's tokens, and of no weight where that is computed."""
    row = head * c.mask_step * c.q_blocks + tile * (c.WARPGROUPS * _ROWS) // c.BLOCK_Q
    place = i * c.TILE_K + gl.arange(0, c.TILE_K, layout=gl.SliceLayout(0, c.SCORES))
    bonus = gl.load(c.bonuses + row.to(gl.int64) * (_mean_tiles(c, True) * c.TILE_K) + place)
    s = s + bonus[None, :]
    # nothing may have been left out so far: a finite maximum then, below any other, under which all weights are 0
    most, total, shrink, w = _weigh(s, gl.maximum(most, _LEAST), total, c.scale)
    return most, total, mean * _of_outputs(c, shrink)[:, None], _rounded(c, w)


@gluon.jit
def _sums(weights):
    """Of every row, the sums over the four parts that as many threads hold: they meet at the end only."""
    parts = gl.reshape(weights, [weights.shape[0], weights.shape[1] // 32, 4, 4, 2])
    return gl.sum(gl.sum(gl.sum(parts, 4), 1), 1)


@gluon.jit
def _of_outputs(c, x):
    return gl.convert_layout(x, gl.SliceLayout(1, c.OUTPUTS))


@gluon.jit
def _rounded(c, weights):
    return gl.convert_layout(weights.to(c.q.dtype), c.WEIGHTS)


@gluon.jit
def _write(c, mean, most, total, staged, row, batch, head, kind):
    """Divide by the sums and store: a query without keys has a sum of 0, an output of zeros and an LSE of -inf."""
    sums = _of_outputs(c, gl.sum(total, 1))
    mean = (mean * (1.0 / gl.where(sums == 0.0, 1.0, sums))[:, None]).to(c.out.dtype)
    logsum = gl.where(sums == 0.0, float("-inf"), _of_outputs(c, most) * (c.scale * _LN2) + gl.log(sums))
    lse = c.lse + (batch * c.heads + head).to(gl.int64) * c.tokens
    place = row + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, c.OUTPUTS))
    spread = kind == _REUSED
    if c.REUSE:
        if spread:
            channel = gl.arange(0, c.HEAD_DIM, layout=gl.SliceLayout(0, c.OUTPUTS))
            out = c.out_pointer + batch.to(gl.int64) * c.out_batch + head.to(gl.int64) * c.out_head
            for i in range(c.served_most):
                # an output that fewer tokens take is filled up with -1
                token = gl.load(c.served + place * c.served_most + i, mask=place < c.computed_count, other=-1)
                wanted = token >= 0
                here = out + token[:, None].to(gl.int64) * c.out_token + channel[None, :]
                gl.store(here, mean, mask=wanted[:, None])
                if c.WITH_LSE:
                    gl.store(lse + token, logsum, mask=wanted)
    if not c.REUSE or not spread:
        # what was staged last must have left before it is written over
        tma.store_wait(0)
        _meet()
        staged.reshape([_ROWS, c.HEAD_DIM]).store(mean)
        fence_async_shared()
        _copy_out(c.out, [batch, head, row, 0], staged)
        if c.WITH_LSE:
            gl.store(lse + place, logsum, mask=place < c.tokens)


@gluon.jit
def _write_part(c, mean, most, total, part):
    """Store what a share of the keys gives, for `triton_code.merge`: what is not yet divided, maximum, sum."""
    row = part * _ROWS + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, c.OUTPUTS))
    channel = gl.arange(0, c.HEAD_DIM, layout=gl.SliceLayout(0, c.OUTPUTS))
    gl.store(c.parts_mean + row[:, None] * c.HEAD_DIM + channel[None, :], mean)
    gl.store(c.parts_most + row, _of_outputs(c, most) * c.scale)
    gl.store(c.parts_total + row, _of_outputs(c, gl.sum(total, 1)))


@gluon.jit
def _done_before(x):
    """Nothing that x is made of is put off past this place: were x negative, which it never is, something would happen.

    Otherwise the assembler moves the softmax behind the wait for the product that it is to go on beside. What would
    happen is an event for performance monitors: harmless, and unlike a trap no branch, for the sake of which addresses
    would be kept out of uniform registers (a sixth of the loop's instructions).
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; @p pmevent 1; mov.b32 $0, $1; }", "=r,r", [x],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _wait_to_multiply(ME: gl.constexpr):
    """The two warpgroups issue their products in turns, so that the softmax of one goes on beside those of the other.

    By named barriers 8 and 9, which Triton leaves free.
    """
    if ME == 0:
        _every_thread("bar.sync 8, 256; mov.b32 $0, $1;")
    else:
        _every_thread("bar.sync 9, 256; mov.b32 $0, $1;")


@gluon.jit
def _let_other_multiply(ME: gl.constexpr):
    if ME == 0:
        _every_thread("bar.arrive 9, 256; mov.b32 $0, $1;")
    else:
        _every_thread("bar.arrive 8, 256; mov.b32 $0, $1;")


@gluon.jit
def _every_thread(code: gl.constexpr):
    """Run assembly once in each of the 128 threads of a warpgroup."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    gl.inline_asm_elementwise(
        code, "=r,r", [gl.full([128], 0, gl.int32, layout)], dtype=gl.int32, is_pure=False, pack=1
    )
