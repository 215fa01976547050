"""MoAlign's two small networks (methods.md §4): tokens of a frozen teacher -> motion subspace -> optical flow.

    M = M_ψ(S)   Conv3d width -> hidden, kernel (3, 1, 1), SiLU, Conv3d hidden -> 64, kernel 1, no last activation
    Ô = F_ω(M)   three 3-D convolutions, then bilinear upsampling to the grid of the flow. Nothing bends between them:
                 relations are cosines of M, so motion has to stand in M itself and not in what a decoder makes of it

There is no public code; attributes are named as by PyTorch's Sequential. M_ψ mixes no positions of a frame, so it fits
any number of tokens; what it makes of time is its one kernel of three token frames.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

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
    decoder: int = 128  # hidden channels of F_ω

    def __post_init__(self):
        if min(self.hidden, self.width, self.decoder) < 1:
            raise ValueError(f"config.motion: hidden, width and decoder must be at least 1, not {self}")


class MotionProjection(nnx.Module):
    """M_ψ: teacher's tokens [b, t, h, w, d] -> the motion subspace [b, t, h, w, width], on the same grid."""

    def __init__(self, teacher_width: int, hidden: int = 256, width: int = 64, *, rngs: nnx.Rngs):
        setattr(self, "0", nnx.Conv(teacher_width, hidden, (3, 1, 1), rngs=rngs))
        setattr(self, "2", nnx.Conv(hidden, width, (1, 1, 1), rngs=rngs))

    def __call__(self, tokens: Float[Array, "b t h w d"]) -> Float[Array, "b t h w m"]:
        first, second = getattr(self, "0"), getattr(self, "2")
        kernel, frames = first.kernel[...], tokens.shape[1]
        # As matrix products of shifted frames: XLA's own is slower on a CPU, above all its gradient.
        padded = jnp.pad(tokens.astype(kernel.dtype), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
        hidden = sum(padded[:, k : k + frames] @ kernel[k, 0, 0] for k in range(3)) + first.bias[...]
        return jax.nn.silu(hidden) @ second.kernel[0, 0, 0] + second.bias[...]


def _convolve(x: Float[Array, "b t h w c"], conv: nnx.Conv) -> Float[Array, "b t h w d"]:
    """A 3x3x3 convolution as a 2-D one of three frames' channels side by side: on a CPU a third of the time."""
    kernel = conv.kernel[...]
    b, t, h, w, c = x.shape
    padded = jnp.pad(x.astype(kernel.dtype), ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    frames = jnp.concatenate([padded[:, k : k + t] for k in range(3)], axis=-1).reshape(b * t, h, w, 3 * c)
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, 3 * c, -1)
    out = jax.lax.conv_general_dilated(frames, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return out.reshape(b, t, h, w, -1) + conv.bias[...]


class FlowDecoder(nnx.Module):
    """F_ω: the motion subspace [b, t, h, w, width] -> flow [b, t, *flow_grid, 2], fp32, in fractions of the frame."""

    def __init__(self, width: int, hidden: int, flow_grid: tuple[int, int], *, rngs: nnx.Rngs):
        self.flow_grid = flow_grid
        for name, inputs, outputs in (("0", width, hidden), ("2", hidden, hidden)):
            setattr(self, name, nnx.Conv(inputs, outputs, (3, 3, 3), rngs=rngs))
        # Flow is a few hundredths of the frame: the first predictions are of that size too.
        small = nnx.initializers.variance_scaling(1e-2, "fan_in", "normal")
        setattr(self, "4", nnx.Conv(hidden, FLOW, (3, 3, 3), kernel_init=small, rngs=rngs))

    def __call__(self, motion: Float[Array, "b t h w m"]) -> Float[Array, "b t i j 2"]:
        x = motion
        for name in ("0", "2", "4"):
            x = _convolve(x, getattr(self, name))
        b, t = x.shape[:2]
        shape = (b, t, *self.flow_grid, FLOW)
        return jax.image.resize(x.astype(jnp.float32), shape, "bilinear", antialias=False)


class MotionSubspace(nnx.Module):
    """What stage 1 trains: projection and decoder, of which the projection is kept."""

    def __init__(self, config: MotionConfig, *, rngs: nnx.Rngs):
        self.projection = MotionProjection(config.teacher_width, config.hidden, config.width, rngs=rngs)
        self.decoder = FlowDecoder(config.width, config.decoder, config.flow_grid, rngs=rngs)

    def __call__(
        self, tokens: Float[Array, "b t h w d"]
    ) -> tuple[Float[Array, "b t h w m"], Float[Array, "b t i j 2"]]:
        """(motion subspace, predicted flow)."""
        motion = self.projection(tokens)
        return motion, self.decoder(motion)
