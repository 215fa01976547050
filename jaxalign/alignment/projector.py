"""The head that brings student tokens to the teacher's width and grid: MLP on tokens, then time, then space.

The order is VideoREPA's (methods.md §2): the MLP runs before any resize. `ProjectorConfig.grid` says which
grid comes out; `check_grids` stops a run whose student and teacher cannot meet, before anything is compiled.
"""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxalign.alignment.grids import Grid, resample_time

# name -> kernel, stride, padding over (t, h, w); None for no convolution.
CONVS = {
    "none": None,
    "trd": ((1, 3, 3), (1, 3, 3), (0, 0, 0)),  # per frame, strided: VideoREPA (methods.md §2)
    "tsa": ((3, 3, 3), (1, 3, 3), (1, 0, 0)),  # 3-D, strided in space: TSA (§3)
    "same": ((3, 3, 3), (1, 1, 1), (1, 1, 1)),  # 3-D on one grid, where student and teacher already meet
    "frame": ((1, 3, 3), (1, 1, 1), (0, 1, 1)),  # per frame on one grid: iREPA (§1)
}


# Path regex -> sharding of a head inside {'heads': {name: Projector}}, as models have theirs.
SHARDING_RULES = [
    (r"heads\.\w+\.[024]\.kernel", PartitionSpec("fsdp", "tensor")),
    (r"heads\.\w+\.conv\.kernel", PartitionSpec(None, None, None, "fsdp", "tensor")),
]


@dataclasses.dataclass(frozen=True)
class ProjectorConfig:
    """Static settings of a Projector. Raises ValueError for an unknown conv, a scale below 1 or no layer at all."""

    student_width: int
    teacher_width: int
    hidden: int = 2048  # width of the MLP; 0 leaves the MLP out (iREPA: the convolution alone)
    drop_first: bool = False  # drop latent frame 0, which a causal video VAE makes from a single frame
    time_scale: int = 1  # linear resampling in time, after the drop
    conv: str = "none"  # a name in CONVS

    def __post_init__(self):
        if self.conv not in CONVS:
            raise ValueError(f"ProjectorConfig: no conv {self.conv!r}; there are {', '.join(CONVS)}")
        if self.time_scale < 1:
            raise ValueError(f"ProjectorConfig: time_scale = {self.time_scale}; expected a whole number >= 1")
        if not self.hidden and CONVS[self.conv] is None:
            raise ValueError("ProjectorConfig: hidden = 0 and conv = 'none' leave no layer; set one")

    def grid(self, student_grid: Grid) -> Grid:
        """The token grid (t, h, w) that comes out for a student grid; 0 where nothing is left."""
        t, h, w = student_grid
        grid = ((t - self.drop_first) * self.time_scale, h, w)
        if CONVS[self.conv] is None:
            return grid
        sizes = zip(grid, *CONVS[self.conv], strict=True)
        return tuple(max(0, (size + 2 * pad - kernel) // stride + 1) for size, kernel, stride, pad in sizes)


def check_grids(student_grid: Grid, teacher_grid: Grid, config: ProjectorConfig) -> None:
    """Raise ValueError, with both grids and what to change, unless the projector meets the teacher."""
    found, wanted = tuple(config.grid(student_grid)), tuple(teacher_grid)
    if found == wanted:
        return
    change = []
    if found[0] != wanted[0]:
        change.append("drop_first, time_scale or the number of frames that the teacher sees")
    if found[1:] != wanted[1:]:
        change.append("conv or the size at which the teacher sees the frames")
    raise ValueError(
        f"the projector turns the student's grid {tuple(student_grid)} into {found}, but the teacher's is "
        f"{wanted} (frames, height, width); it has drop_first={config.drop_first}, time_scale={config.time_scale}, "
        f"conv={config.conv!r}: change {' and '.join(change)}"
    )


class Projector(nnx.Module):
    """tokens[b, t, h, w, student_width] -> tokens on `config.grid((t, h, w))`, teacher_width wide.

    It begins as Flax's layers do, LeCun normal and no bias: our own choice. REPA's heads begin Xavier uniform, those of
    VideoREPA as PyTorch's layers, 1/√3 as wide and with a bias.
    """

    def __init__(self, config: ProjectorConfig, *, rngs: nnx.Rngs):
        self.config = config
        width = config.student_width
        if config.hidden:
            # Named as by PyTorch's Sequential(Linear, SiLU, Linear, SiLU, Linear), VideoREPA's MLP.
            for name, out in (("0", config.hidden), ("2", config.hidden), ("4", config.teacher_width)):
                setattr(self, name, nnx.Linear(width, out, rngs=rngs))
                width = out
        if CONVS[config.conv] is not None:
            kernel, stride, padding = CONVS[config.conv]
            pads = [(pad, pad) for pad in padding]
            self.conv = nnx.Conv(width, config.teacher_width, kernel, stride, padding=pads, rngs=rngs)

    def __call__(self, tokens: Float[Array, "b t h w d"]) -> Float[Array, "b s i j c"]:
        if self.config.hidden:
            for name in ("0", "2"):
                tokens = jax.nn.silu(getattr(self, name)(tokens))
            tokens = getattr(self, "4")(tokens)
        tokens = resample_time(tokens[:, int(self.config.drop_first) :], self.config.time_scale)
        if CONVS[self.config.conv] is None:
            return tokens
        _, stride, padding = CONVS[self.config.conv]
        if stride[1:] == (1, 1):
            return self.conv(tokens)
        return _strided_conv(tokens, self.conv.kernel[...], self.conv.bias[...], padding[0])


def _strided_conv(tokens, kernel, bias, time_padding: int):
    """A convolution whose stride in space is its kernel size, as matrix products over disjoint patches.

    XLA's own is 5 to 7 times slower on a CPU (measured at 4×30×45×768, gradients included).
    """
    taps, p, q, _, _ = kernel.shape
    h, w = tokens.shape[2] // p, tokens.shape[3] // q  # what fills no patch is left out, as the stride does
    patches = rearrange(tokens[:, :, : h * p, : w * q], "b t (h p) (w q) c -> b t h w (p q c)", p=p, q=q)
    patches = jnp.pad(patches, ((0, 0), (time_padding, time_padding), (0, 0), (0, 0), (0, 0)))
    frames = patches.shape[1] - taps + 1
    product = sum(
        jnp.matmul(
            patches[:, tap : tap + frames],
            rearrange(kernel[tap], "p q c o -> (p q c) o"),
            preferred_element_type=jnp.float32,
        )
        for tap in range(taps)
    )
    return product.astype(tokens.dtype) + bias
