"""One pass over the pairs of frames of a clip: a relation loss and its gradient, never an N×N array.

With unit tokens x, A = x xᵀ and a loss Σ ℓ(A_student, A_teacher), the gradient is (Γ + Γᵀ) x with Γ = dL/dA.
The block of Γ that belongs to a pair of frames needs no more than that pair's two blocks of cosines, so one
visit gives its share of the value and, by two further products, of the gradient: nothing is stored, nothing
computed twice. And A_gf is A_fg transposed, so the visit to (f, g) serves (g, f) too. Value and gradient cost
4N²d flops, N²d for each side's cosines and 2N²d for the gradient: half of all rows against all columns.

  pair_sweep  unordered pairs of tiles; a tile is one frame or several whole ones
  row_sweep   chosen rows (M-TSA's queries) against whole frames: there is no symmetry to use. It also takes
              over where a single frame has too many positions for one block.

Both scan over a table of visits and carry the value [b] and fp32 gradient buffers. Tokens are flat: frame f
is rows f·n … (f+1)·n, and rows beyond t·n are filling that no visit touches.

`relation` has t, n, `visited` (bool [t, t] as tuples: pairs of frames that count; None for all) and the
function block(a_s, a_r, weights, both, share) -> value [b], slope. It gets two blocks of cosines [b, F, i, G, j],
position i of row frame F against position j of column frame G, and weights that broadcast against them; with
`both` it also counts the transposed block, and the slope is Γ_fg + Γ_gfᵀ. `share`: None, or the other rows of
the frame are on other devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# Entries of a block of cosines, where frames and batch are small enough to choose. A CPU is fastest with
# blocks that stay in its cache (measured: 600 to 700 tokens a side), an accelerator with few large products.
BLOCK = {"cpu": 2**19, "gpu": 2**24, "tpu": 2**24}
# A tile of m tokens reaches about m / (m + OVERHEAD) of the rate of large matrix products.
OVERHEAD = {"cpu": 150, "gpu": 2000, "tpu": 2000}
# Larger blocks than this (256 MB in fp32, of which a few live at once) are never made.
LARGEST_BLOCK = 2**26


class Tokens(NamedTuple):
    """Flat tokens as they came, and 1/‖x‖ of each.

    A_ij = x_i·x_j/(‖x_i‖‖x_j‖) needs no normalised copy in memory and, in bf16, no rounding of one: the sign of
    A_s − A_r would not survive it.
    """

    x: Float[Array, "b N d"]
    scale: Float[Array, "b N"]


class Share(NamedTuple):
    """A device's rows i of a frame whose rows are dealt out over the mesh axes `axes`, `parts` devices in all.

    Rows that are not `real` repeat another device's, to make all hands equally long.
    """

    real: Bool[Array, "i 1 1"]
    axes: tuple[str, ...]
    parts: int

    def sum(self, block: Float[Array, "b F i G j"]) -> Float[Array, "b F 1 G j"]:
        """The sum over all rows of the frame."""
        return jax.lax.psum(jnp.where(self.real, block, 0).sum(2, keepdims=True), self.axes)

    def max(self, block: Float[Array, "b F i G j"]) -> Float[Array, "b F 1 G j"]:
        """The maximum over all rows of the frame."""
        return jax.lax.pmax(block.max(2, keepdims=True), self.axes)


def pair_sweep(
    relation,
    student: Tokens,
    teacher: Tokens,
    weights: Float[Array, "t t"],
    *,
    part: int | Int[Array, ""] = 0,
    parts: int = 1,
    axes: tuple[str, ...] = (),
    gradient: bool = True,
) -> tuple[Float[Array, " b"], Float[Array, "b N d"] | None]:
    """Value [b] and gradient of a loss over all pairs; 1/‖x‖ is taken for a constant in the gradient.

    The gradient, Σ_j dL/d(x_i·x_j) x_j in fp32, is None unless asked for.

    weights: symmetric; entry (f, g) weighs the pair of frames (f, g), and (g, f) once more. part, parts: the
    work is dealt out to `parts` devices; this is what `part` finds, the result is the sum over the parts. Dealt
    out are the visits or, where one pair of frames is more than a block, the rows of each visit, so that what a
    visit holds falls with the devices; the devices then sum their columns over the mesh axes `axes`.
    """
    b, n = len(student.x), relation.n
    visited = np.array(relation.visited) if relation.visited else np.ones((relation.t, relation.t), bool)
    share, first = None, 0
    if parts > 1 and n * n > _here(BLOCK):
        count = -(-n // parts)
        first = jnp.minimum(part * count, n - count)
        share = Share((first + jnp.arange(count) >= part * count)[:, None, None], axes, parts)
        part, parts = 0, 1
    group = choose_group(visited, n, b, parts)
    tile = group * n
    rows = tile if share is None else count
    diagonals, pairs = _tiles(visited, group)

    def visit(f, g, weight):
        s_f, s_g = _rows(student, f * tile + first, rows), _rows(student, g * tile, tile)
        r_f, r_g = _rows(teacher, f * tile + first, rows), _rows(teacher, g * tile, tile)
        w = weight * jax.lax.dynamic_slice(weights, (f * group, g * group), (group, group))
        frames = (b, group, rows // group, group, n)
        value, slope = _visit(relation, frames, s_f, s_g, r_f, r_g, w[:, None, :, None], both=True, share=share)
        return value, slope, s_f.x, s_g.x

    def pair(carry, item):
        (f, g), weight = item
        value, slope, x_f, x_g = visit(f, g, weight)
        total, grad = carry
        if gradient:
            grad = _add(grad, f * tile + first, _product("bij,bjd->bid", slope, x_g))
            grad = _add(grad, g * tile, _product("bij,bid->bjd", slope, x_f))
        return (total + value, grad), None

    def diagonal(carry, item):
        # The tile is its own transpose: `both` counts it twice, and Γ + Γᵀ is already the whole slope.
        f, weight = item
        value, slope, _, x_f = visit(f, f, weight)
        total, grad = carry
        if gradient:
            grad = _add(grad, f * tile + first, _product("bij,bjd->bid", slope, x_f))
        return (total + value / 2, grad), None

    carry = _zeros((b,)), _zeros(student.x.shape) if gradient else None
    for body, items in ((diagonal, diagonals), (pair, pairs)):
        if len(items):
            carry, _ = jax.lax.scan(body, carry, _deal(items, part, parts))
    return carry


def row_sweep(
    relation,
    rows: Int[Array, "b R"],
    student: Tokens,
    teacher: Tokens,
    weights: Float[Array, "R t"],
    *,
    parts: int = 1,
    gradient: bool = True,
) -> tuple[Float[Array, " b"], Float[Array, "b N d"] | None]:
    """Value [b] and gradient of a loss over some of the tokens, `rows`, × all tokens; as pair_sweep otherwise.

    weights: one entry a row and frame. parts: on how many devices the rows are dealt out; a block falls with them.
    """
    count, t = weights.shape
    b, n = len(student.x), relation.n
    chunk = max(64, _here(BLOCK) // (b * n * parts))
    chunks = -(-count // chunk)
    chunk = -(-count // chunks)
    fill = chunks * chunk - count  # rows of weight 0, fewer than there are chunks
    rows = jnp.pad(rows, ((0, 0), (0, fill))).reshape(b, chunks, chunk).swapaxes(0, 1)
    weights = jnp.pad(weights, ((0, fill), (0, 0))).reshape(chunks, chunk, t)
    sample = jnp.arange(b)[:, None]

    def some(carry, item):
        mine, weights = item
        s_c, r_c = jax.tree.map(lambda x: x[sample, mine], (student, teacher))

        def visit(carry, f):
            s_f, r_f = _rows(student, f * n, n), _rows(teacher, f * n, n)
            w = jax.lax.dynamic_slice_in_dim(weights, f, 1, axis=1)[:, :, None]
            value, slope = _visit(relation, (b, 1, chunk, 1, n), s_c, s_f, r_c, r_f, w, both=False)
            total, grad_rows, grad = carry
            if gradient:
                grad_rows += _product("bij,bjd->bid", slope, s_f.x)
                grad = _add(grad, f * n, _product("bij,bid->bjd", slope, s_c.x))
            return (total + value, grad_rows, grad), None

        total, grad = carry
        grad_rows = _zeros(s_c.x.shape) if gradient else None
        (total, grad_rows, grad), _ = jax.lax.scan(visit, (total, grad_rows, grad), jnp.arange(t))
        return (total, grad.at[sample, mine].add(grad_rows) if gradient else None), None

    carry = _zeros((b,)), _zeros(student.x.shape) if gradient else None
    return jax.lax.scan(some, carry, (rows, weights))[0]


def _visit(relation, frames, s_i, s_j, r_i, r_j, weights, *, both, share=None):
    """Value [b] of a block, and its slope with respect to the plain products x_i·x_j of the student [b, i, j]."""

    def cosines(i, j):
        products = _product("bid,bjd->bij", i.x, j.x)
        return (products * (i.scale[:, :, None] * j.scale[:, None, :])).reshape(frames)

    value, slope = relation.block(cosines(s_i, s_j), cosines(r_i, r_j), weights, both=both, share=share)
    slope = slope.reshape(len(s_i.x), s_i.x.shape[1], s_j.x.shape[1])
    return value, (slope * (s_i.scale[:, :, None] * s_j.scale[:, None, :])).astype(s_i.x.dtype)


def choose_batch(b: int, n: int) -> int:
    """How many of b samples with frames of n positions are swept at once; a divisor of b."""
    return max(c for c in range(1, b + 1) if b % c == 0 and (c == 1 or c * n * n <= _here(BLOCK)))


def choose_pieces(n: int) -> int:
    """Into how many equal pieces a frame of n positions is cut where nothing needs it whole: for half of BLOCK or less.

    Smaller than what choose_group takes: pieces of 450 for 1350 positions cost 2 % of the time and save a third of the
    memory (measured at N = 17,550).
    """
    fitting = [n // k for k in range(1, n + 1) if n % k == 0 and (n // k) ** 2 <= _here(BLOCK) // 2]
    # Where n has no divisor of a useful size (a prime), small pieces would cost more than a large block.
    return n // fitting[0] if fitting and fitting[0] ** 2 * 16 >= _here(BLOCK) else 1


def choose_group(visited: np.ndarray, n: int, b: int, parts: int) -> int:
    """How many frames of n positions make a tile: a divisor of t, by the cost of the slowest of `parts` devices.

    Larger tiles run nearer to the matrix-product rate; smaller ones waste less on the diagonal (3 products
    for one ordered pair of tiles, not 4 for two), skip more, and can be dealt out evenly.
    """
    t = len(visited)

    def cost(group):
        diagonals, pairs = _tiles(visited, group)
        products = 3 * -(-len(diagonals) // parts) + 4 * -(-len(pairs) // parts)
        return products * group * n * (group * n + _here(OVERHEAD))

    divisors = [group for group in range(1, t + 1) if t % group == 0]
    return min((g for g in divisors if g == 1 or b * (g * n) ** 2 <= _here(BLOCK)), key=cost)


def _here(table: dict[str, int]) -> int:
    return table.get(jax.default_backend(), table["gpu"])


def _tiles(visited: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The tiles on the diagonal [·] and the unordered pairs off it [·, 2] that have something to visit."""
    tiles = len(visited) // group
    some = (visited | visited.T).reshape(tiles, group, tiles, group).any(axis=(1, 3))
    return np.flatnonzero(np.diag(some)).astype(np.int32), np.argwhere(np.triu(some, 1)).astype(np.int32)


def _deal(items: np.ndarray, part, parts: int) -> tuple[Array, Array]:
    """Every parts-th item from `part` on, each with weight 1; repeats of weight 0 make the hands equally long."""
    hand = -(-len(items) // parts)
    table = np.concatenate([items, np.repeat(items[:1], hand * parts - len(items), axis=0)])
    weight = (np.arange(hand * parts) < len(items)).astype(np.float32)
    return tuple(jnp.asarray(x.reshape(hand, parts, *x.shape[1:]))[:, part] for x in (table, weight))


def _product(equation: str, a, b):
    """A matrix product accumulated in fp32; for fp32 operands true fp32, neither TF32 nor bf16 passes."""
    precision = "highest" if a.dtype == jnp.float32 else "default"
    return jnp.einsum(equation, a, b, precision=precision, preferred_element_type=jnp.float32)


def _zeros(shape):
    return jnp.zeros(shape, jnp.float32)


def _rows(tokens, start, size):
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size, axis=1), tokens)


def _add(x, start, update):
    rows = _rows(x, start, update.shape[1]) + update
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis=1)
