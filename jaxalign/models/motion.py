"""MoAlign's two small networks (methods.md §4): tokens of a frozen teacher -> motion subspace -> optical flow.

    M = M_ψ(S)   Conv3d width -> hidden, kernel (3, k, k), SiLU, Conv3d hidden -> 64, kernel 1, no last activation
    Ô = F_ω(M)   three 3-D convolutions or one matrix, then bilinear upsampling to the grid of the flow. Nothing bends
                 between them: relations are cosines of M, so motion has to stand in M itself and not in what a decoder
                 makes of it

There is no public code and the paper leaves these shapes open, so they are chosen here; attributes are named as by
PyTorch's Sequential. M_ψ fits any number of tokens; what it makes of time is its one kernel of three token frames.
k is 1 where the teacher is a video network, whose tokens have met their neighbours in space and time. Tokens of an
image network have not: where a thing went shows in how its neighbourhood differs from the frames beside it, and from
one position alone hardly any flow can be learnt (benchmarks/RESULTS.md). There k is 3.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxalign.models.layers import layer_norm

SHARDING_RULES = [(r"(projection|decoder)\.\w+\.kernel", PartitionSpec(None, None, None, "fsdp", "tensor"))]
FLOW = 2  # channels: right, down


@dataclasses.dataclass(frozen=True)
class MotionConfig:
    """Static settings; `grid` (t, h, w) of the tokens, `flow_grid` (rows, columns) of what is predicted from them."""

    teacher_width: int
    grid: tuple[int, int, int]
    flow_grid: tuple[int, int]
    hidden: int = 256
    width: int = 64
    decoder: int = 128  # hidden channels of F_ω; 0: one matrix, which reads the flow of every token from it alone
    kernel: int = 1  # rows and columns of M_ψ's first kernel
    norm: bool = False  # each token has mean 0 and variance 1 before M_ψ
    unit: float | int = 1.0  # F_ω counts in this fraction of the frame

    def __post_init__(self):
        if min(self.hidden, self.width) < 1 or self.decoder < 0:
            raise ValueError(f"config.motion: hidden and width must be at least 1, decoder at least 0, not {self}")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"config.motion.kernel = {self.kernel}: write an odd number, 1 or 3")
        if not self.unit > 0:
            raise ValueError(f"config.motion.unit = {self.unit}: write a positive fraction of the frame, or 1")


class MotionProjection(nnx.Module):
    """M_ψ: teacher's tokens [b, t, h, w, d] -> the motion subspace [b, t, h, w, width], on the same grid.

    `norm`: tokens go through a LayerNorm without parameters first. A raw convolutional stage has channels of 5 to 10
    times unit size with as large means; of a LayerNorm nothing has to be kept beside the weights.
    """

    def __init__(
        self,
        teacher_width: int,
        hidden: int = 256,
        width: int = 64,
        *,
        kernel: int = 1,
        norm: bool = False,
        rngs: nnx.Rngs,
    ):
        self.norm = norm
        setattr(self, "0", nnx.Conv(teacher_width, hidden, (3, kernel, kernel), rngs=rngs))
        setattr(self, "2", nnx.Conv(hidden, width, (1, 1, 1), rngs=rngs))

    def __call__(self, tokens: Float[Array, "b t h w d"]) -> Float[Array, "b t h w m"]:
        tokens = layer_norm(tokens) if self.norm else tokens
        return _convolve(jax.nn.silu(_convolve(tokens, getattr(self, "0"))), getattr(self, "2"))


def _convolve(x: Float[Array, "b t h w c"], conv: nnx.Conv) -> Float[Array, "b t h w d"]:
    """A convolution of one or three frames, zeros outside, without one of three dimensions.

    One position's is matrix products of shifted frames, a larger one's a 2-D one of three frames' channels side by
    side: XLA's own takes three times as long on a CPU, above all its gradient.
    """
    kernel = conv.kernel[...]
    (b, t, h, w, c), (times, rows, columns) = x.shape, kernel.shape[:3]
    padded = jnp.pad(x.astype(kernel.dtype), ((0, 0), (times // 2, times // 2), (0, 0), (0, 0), (0, 0)))
    shifted = [padded[:, k : k + t] for k in range(times)]
    if rows == columns == 1:
        return sum(frames @ weight[0, 0] for frames, weight in zip(shifted, kernel, strict=True)) + conv.bias[...]
    frames = jnp.concatenate(shifted, axis=-1).reshape(b * t, h, w, times * c)
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(rows, columns, times * c, -1)
    out = jax.lax.conv_general_dilated(frames, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out.reshape(b, t, h, w, -1) + conv.bias[...]


class FlowDecoder(nnx.Module):
    """F_ω: the motion subspace [b, t, h, w, width] -> flow [b, t, *flow_grid, 2], fp32, in fractions of the frame."""

    def __init__(self, width: int, hidden: int, flow_grid: tuple[int, int], unit: float | int = 1.0, *, rngs: nnx.Rngs):
        self.flow_grid, self.unit = flow_grid, unit
        # Flow is a few hundredths of the frame: the first predictions are of that size too.
        small = nnx.initializers.variance_scaling(1e-2, "fan_in", "normal")
        if not hidden:
            setattr(self, "0", nnx.Conv(width, FLOW, (1, 1, 1), kernel_init=small, rngs=rngs))
            return
        for name, inputs, outputs in (("0", width, hidden), ("2", hidden, hidden)):
            setattr(self, name, nnx.Conv(inputs, outputs, (3, 3, 3), rngs=rngs))
        setattr(self, "4", nnx.Conv(hidden, FLOW, (3, 3, 3), kernel_init=small, rngs=rngs))

    def __call__(self, motion: Float[Array, "b t h w m"]) -> Float[Array, "b t i j 2"]:
        x = motion
        for name in ("0", "2", "4"):
            x = _convolve(x, getattr(self, name)) if hasattr(self, name) else x
        x = x.astype(jnp.float32) * self.unit
        b, t = x.shape[:2]
        shape = (b, t, *self.flow_grid, FLOW)
        return jax.image.resize(x, shape, "bilinear", antialias=False)


class MotionSubspace(nnx.Module):
    """What stage 1 trains: projection and decoder, of which the projection is kept."""

    def __init__(self, config: MotionConfig, *, rngs: nnx.Rngs):
        self.projection = MotionProjection(
            config.teacher_width, config.hidden, config.width, kernel=config.kernel, norm=config.norm, rngs=rngs
        )
        self.decoder = FlowDecoder(config.width, config.decoder, config.flow_grid, config.unit, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "b t h w d"]
    ) -> tuple[Float[Array, "b t h w m"], Float[Array, "b t i j 2"]]:
        """(motion subspace, predicted flow)."""
        motion = self.projection(tokens)
        return motion, self.decoder(motion)
