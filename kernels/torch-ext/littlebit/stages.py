"""The kernels of decode.py: a few tokens times words, in two stages; formulas and reasons there.

Every program is a block of a layer's ranks (stage one) or outputs (stage two). Its warps are the matrices of a batch: a warp sums
WORDS words of every column of the block in a round, and ROUNDS rounds, of which all but the large layers have one. Layers lie
side by side along the grid's first axis and in `partial`, where a path takes a multiple of PAD slots.
"""

import triton
import triton.language as tl

from .signs import pair_of, path_of, place, segment, segments, sign_pairs, wait
from .tiles import OPERAND, rank_sum

__all__ = ["stage_one", "stage_two"]


@triton.jit
def _signs(words, PTX: tl.constexpr):
    """int32 [batch, columns, words] -> ±1 in bf16 [batch, columns, places in pair order]."""
    BATCH: tl.constexpr = words.shape[0]
    COLUMNS: tl.constexpr = words.shape[1]
    PLACES: tl.constexpr = words.shape[2] * 32
    shifts = 15 - tl.arange(0, 16)
    ones = pair_of(tl.full([1], 1.0, tl.float32))
    pairs = sign_pairs(words[:, :, :, None], shifts[None, None, None, :], ones[:, None, None, None], PTX)
    halves = tl.interleave(pairs.to(tl.int16), (pairs >> 16).to(tl.int16))
    return tl.reshape(halves, [BATCH, COLUMNS, PLACES]).to(tl.bfloat16, bitcast=True)


@triton.jit
def _terms(values, BATCH: tl.constexpr, TOKENS: tl.constexpr, PLANES: tl.constexpr, COLUMNS: tl.constexpr):
    """fp32 [places of all warps, TOKENS] -> bf16 [warps, places, COLUMNS]: the terms of every token, repeated."""
    ALL: tl.constexpr = values.shape[0]
    first = values.to(tl.bfloat16)
    rest = values - first.to(tl.float32)
    second = rest.to(tl.bfloat16)
    if PLANES == 4:
        third = (rest - second.to(tl.float32)).to(tl.bfloat16)
        # Pairs of pairs: a term of zeros is the fourth.
        terms = tl.join(tl.join(first, third), tl.join(second, tl.zeros_like(third)))
        terms = tl.reshape(terms, [ALL, TOKENS, 4])
    else:
        terms = tl.join(first, second)
    # Before it is repeated: so the compiler moves two or four numbers between threads, and not eight.
    terms = tl.broadcast_to(terms[:, None, :, :], [ALL, COLUMNS // (TOKENS * PLANES), TOKENS, PLANES])
    return tl.reshape(terms, [BATCH, ALL // BATCH, COLUMNS])


@triton.jit
def _sums(result, TOKENS: tl.constexpr, PLANES: tl.constexpr):
    """The sums of the terms: [batch, outputs, COLUMNS] -> [batch, outputs, TOKENS]."""
    BATCH: tl.constexpr = result.shape[0]
    OUTPUTS: tl.constexpr = result.shape[1]
    REPEATS: tl.constexpr = result.shape[2] // (TOKENS * PLANES)
    terms = tl.reshape(result, [BATCH, OUTPUTS, REPEATS, TOKENS, PLANES])
    return tl.sum(tl.sum(terms, axis=4), axis=2) * (1.0 / REPEATS)


@triton.jit
def _tails(tail, columns, width, left, stride):
    """The tail bytes of `columns` as one word each; `left` signs are in it."""
    word = columns * 0 + left * 0
    for index in tl.static_range(4):
        # No columns in the rows that are not there; written so that the mask is a comparison of blocks.
        live = columns < tl.where(8 * index < left, width, 0)
        word |= tl.load(tail + index * stride + columns, mask=live, other=0).to(tl.int32) << (8 * index)
    return word


@triton.jit
def _words(words, tails, rows, whole, columns, width, stride, TAIL: tl.constexpr):
    """int32 [batch, columns, words] of a factor whose bits run along the rows.

    Args:
        rows: [batch, words], the word rows. Those before `whole`, [1 or batch, 1] or a number, hold 32 signs; with TAIL the
            next one holds those of `tails`, [1 or batch, columns], as `_tails` gives them.
        columns: [columns], below `width` where they mean something; `stride` lies between two word rows.
    """
    live = (rows < whole)[:, None, :] & (columns < width)[None, :, None]
    found = tl.load(words + rows[:, None, :] * stride + columns[None, :, None], mask=live, other=0)
    if TAIL:
        found = tl.where((rows == whole)[:, None, :], tails[:, :, None], found)
    return found


@triton.jit
def _layer_one(
    block,
    x,
    layers,
    partial,
    in_features,
    stride_x,
    tokens,
    ranks,
    before,
    width,
    UNITS: tl.constexpr,
    LAYER: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    WARPS: tl.constexpr,
    WORDS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PTX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Stage one of a block of a layer's columns, whose slots begin at `before` of `width`."""
    v, v_tail, scale_in = layers[LAYER]
    split = tl.program_id(1)
    path, rank, ranks_before, _, slots, inside = segment(block, ranks[LAYER], UNITS[LAYER], BLOCK, PAD)
    total = rank_sum(ranks[LAYER], UNITS[LAYER])
    columns = inside + tl.arange(0, BLOCK)
    v += ranks_before
    tails = columns[None, :]
    if v_tail is not None:
        tails = _tails(v_tail + ranks_before, columns, rank, in_features % 32, total)[None, :]
    scale_in += path * in_features
    first = split * (ROUNDS * WARPS * WORDS)
    rows = first + tl.arange(0, WARPS)[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    k = first * 32 + place(tl.arange(0, WARPS * WORDS * 32))
    t = tl.arange(0, TOKENS)
    words = _words(v, tails, rows, in_features // 32, columns, rank, total, v_tail is not None)
    gain = tl.load(scale_in + k, mask=k < in_features, other=0.0).to(tl.float32)
    wait(EARLY)
    sums = tl.zeros([BLOCK, TOKENS], tl.float32)
    for turn in tl.static_range(ROUNDS):
        live = (k < in_features)[:, None] & (t < tokens)[None, :]
        values = tl.load(x + t.to(tl.int64)[None, :] * stride_x + k[:, None], mask=live, other=0.0).to(tl.float32)
        right = _terms(values * gain[:, None], WARPS, TOKENS, PLANES, COLUMNS)
        left = _signs(words, PTX)
        if turn + 1 < ROUNDS:
            rows += WARPS * WORDS
            k += WARPS * WORDS * 32
            words = _words(v, tails, rows, in_features // 32, columns, rank, total, v_tail is not None)
            gain = tl.load(scale_in + k, mask=k < in_features, other=0.0).to(tl.float32)
        result = tl.dot(left.to(OPERAND), right.to(OPERAND))
        sums += tl.sum(_sums(result, TOKENS, PLANES), axis=0)
    within = columns % 32
    slot = columns - within + tl.where(within < 16, 2 * within, 2 * within - 31)
    # Zeros behind the last rank, up to a multiple of 32: stage two reads them.
    sums = tl.where((columns < rank)[:, None], sums, 0.0)
    target = partial + (split * TOKENS + t)[None, :] * width + (before + slots + slot)[:, None]
    tl.store(target, sums, mask=(columns < tl.cdiv(rank, 32) * 32)[:, None])


@triton.jit(do_not_specialize=["tokens"])
def stage_one(
    x,
    layers,
    partial,
    in_features,
    stride_x,
    tokens,
    ranks,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    WARPS: tl.constexpr,
    WORDS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PTX: tl.constexpr,
    EARLY: tl.constexpr,
):
    block = tl.program_id(0)
    width = 0
    for layer in tl.static_range(len(ranks)):
        width += segments(ranks[layer], UNITS[layer], PAD)
    before = 0
    for layer in tl.static_range(len(ranks)):
        own = segments(ranks[layer], UNITS[layer], PAD)
        if len(ranks) == 1 or (block >= 0) & (block < own // BLOCK):
            _layer_one(
                block,
                x,
                layers,
                partial,
                in_features,
                stride_x,
                tokens,
                ranks,
                before,
                width,
                UNITS,
                layer,
                TOKENS,
                PLANES,
                COLUMNS,
                BLOCK,
                PAD,
                WARPS,
                WORDS,
                ROUNDS,
                PTX,
                EARLY,
            )
        block -= own // BLOCK
        before += own


@triton.jit
def _layer_two(
    block,
    partial,
    layers,
    tokens,
    ranks,
    before,
    width,
    UNITS: tl.constexpr,
    LAYER: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    WARPS: tl.constexpr,
    SHARE: tl.constexpr,
    WORDS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PTX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Stage two of a block of a layer's outputs. Every path has SHARE warps."""
    u, u_tail, scale_out, scale_rank, bias, y, out_features = layers[LAYER]
    UNIT: tl.constexpr = UNITS[LAYER]
    columns = block * BLOCK + tl.arange(0, BLOCK)
    inside = columns < out_features
    batch = tl.arange(0, WARPS)[:, None]
    path = batch // SHARE
    rank, _, words_before, tails_before, _ = path_of(ranks[LAYER], UNIT, PAD, path)
    t = tl.arange(0, TOKENS)
    known = (path < len(ranks[LAYER])) & inside[None, :]
    gains = tl.load(scale_out + path * out_features + columns[None, :], mask=known, other=0.0).to(tl.float32)
    tails = columns[None, :]
    if u_tail is not None:
        tails = _tails(u_tail + tails_before * out_features, columns[None, :], out_features, rank % 32, out_features)
    start = (batch % SHARE) * WORDS
    rows = words_before + start + tl.arange(0, WORDS)[None, :]
    end = words_before + rank // 32
    # The same of every slot of every warp, one after the other.
    flat = tl.arange(0, WARPS * WORDS * 32)
    of = flat // (SHARE * WORDS * 32)
    slot = flat
    flat_rank = ranks[LAYER][0] * UNIT
    flat_before = 0
    flat_slots = 0
    if len(ranks[LAYER]) > 1:
        slot = flat % (SHARE * WORDS * 32)
        flat_rank, flat_before, _, _, flat_slots = path_of(ranks[LAYER], UNIT, PAD, of)
    # A path's zeros behind its last rank are read as well, so that whole vectors are.
    filled = tl.cdiv(flat_rank, 32) * 32
    sums = tl.zeros([WARPS, BLOCK, TOKENS], tl.float32)
    for turn in tl.static_range(ROUNDS):
        words = _words(u, tails, rows, end, columns, out_features, out_features, u_tail is not None)
        j = place(slot)
        gain = tl.load(scale_rank + flat_before + j, mask=j < flat_rank, other=0.0).to(tl.float32)
        if turn == 0:
            wait(EARLY)
        rank_acts = tl.zeros([WARPS * WORDS * 32, TOKENS], tl.float32)
        source = partial + before + flat_slots + slot
        for split in tl.static_range(SPLITS):
            pointers = source[:, None] + (split * TOKENS + t)[None, :] * width
            rank_acts += tl.load(pointers, mask=(slot < filled)[:, None], other=0.0)
        right = _terms(rank_acts * gain[:, None], WARPS, TOKENS, PLANES, COLUMNS)
        result = tl.dot(_signs(words, PTX).to(OPERAND), right.to(OPERAND))
        sums += _sums(result, TOKENS, PLANES)
        rows += SHARE * WORDS
        slot += SHARE * WORDS * 32
    result = tl.sum(sums * gains[:, :, None], axis=0)
    if bias is not None:
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)[:, None]
    target = y + t[None, :].to(tl.int64) * out_features + columns[:, None]
    tl.store(target, result.to(y.dtype.element_ty), mask=inside[:, None] & (t < tokens)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def stage_two(
    partial,
    layers,
    tokens,
    ranks,
    UNITS: tl.constexpr,
    TOKENS: tl.constexpr,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PAD: tl.constexpr,
    WARPS: tl.constexpr,
    SHARES: tl.constexpr,
    WORDS: tl.constexpr,
    ROUNDS: tl.constexpr,
    PTX: tl.constexpr,
    EARLY: tl.constexpr,
):
    block = tl.program_id(0)
    width = 0
    for layer in tl.static_range(len(ranks)):
        width += segments(ranks[layer], UNITS[layer], PAD)
    before = 0
    for layer in tl.static_range(len(ranks)):
        blocks = tl.cdiv(layers[layer][6], BLOCK)
        if len(ranks) == 1 or (block >= 0) & (block < blocks):
            _layer_two(
                block,
                partial,
                layers,
                tokens,
                ranks,
                before,
                width,
                UNITS,
                layer,
                TOKENS,
                PLANES,
                COLUMNS,
                SPLITS,
                BLOCK,
                PAD,
                WARPS,
                SHARES[layer],
                WORDS,
                ROUNDS[layer],
                PTX,
                EARLY,
            )
        block -= blocks
        before += segments(ranks[layer], UNITS[layer], PAD)
