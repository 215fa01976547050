"""LoRA (Hu et al. 2022) as pure functions on parameter trees: W + alpha/rank · A·B, and only A and B are trained.

    adapters = {"blocks.0.attn.qkv": {"lora_A": {"kernel": a [.., in, rank]}, "lora_B": {"kernel": b [.., rank, out]}}}

A site is the dotted path of a Linear. Where equal blocks are stacked their adapters are too, with the same leading
axis, so that the layer scan takes them along. The names are those of the peft library: the engine in interop writes
`blocks.0.attn.qkv.lora_A.weight` of them and reads it back (interop/lora_file.py).
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

Adapters = dict[str, dict[str, dict[str, Any]]]

# Where adapters go when nothing else is said, by the student's name: every projection of the attention.
SITES = {
    "cogvideox": r"transformer_blocks\.attn1\.to_(q|k|v|out\.0)",
    "vdit": r"blocks\.[01]\.attn\.(qkv|proj)",
}
PARAMETER_AXES = ("fsdp", "tensor")  # the mesh axes that cut a parameter


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Static settings. `sites`: a regex that a Linear's whole dotted path must match. Raises ValueError."""

    rank: int
    alpha: float
    sites: str

    def __post_init__(self):
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(f"config.lora: rank {self.rank} and alpha {self.alpha} must be positive (rank 0: no LoRA)")
        try:
            re.compile(self.sites)
        except re.error as error:
            raise ValueError(f"config.lora.sites = {self.sites!r} is no regular expression: {error}") from None

    @property
    def scale(self) -> float:
        """What A·B counts."""
        return self.alpha / self.rank


# ---- where ---------------------------------------------------------------------------------------------------------


def find_sites(model: Any, pattern: str) -> list[str]:
    """The dotted paths of the Linears that the regex matches whole, sorted: a module's own order is not kept for ever.

    Raises ValueError, with some that there are, when it matches none.
    """
    linears = sorted(path for path, _ in _linears(model))
    found = [path for path in linears if re.fullmatch(pattern, path)]
    if not found:
        raise ValueError(
            f"config.lora.sites = {pattern!r} matches none of the {len(linears)} Linears, which are e.g. "
            f"{', '.join(linears[:6])}"
        )
    return found


def _linears(module: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in vars(module).items():
        if isinstance(child, nnx.Linear):
            yield prefix + name, child
        elif isinstance(child, nnx.Module):
            yield from _linears(child, f"{prefix}{name}.")


def _at(module: Any, site: str) -> tuple[Any, str]:
    """(the module that has the site, its attribute there). An attribute's name may be digits, none has a dot."""
    *parents, name = site.split(".")
    for parent in parents:
        module = getattr(module, parent)
    return module, name


# ---- what is trained -----------------------------------------------------------------------------------------------


def init(model: Any, settings: LoRA, key: Any) -> Adapters:
    """Fresh adapters of a module, abstract or not, fp32: A as peft draws it, B zero, so that nothing changes yet.

    A is uniform within ± 1/√in: Kaiming's with a = √5 (peft tuners/lora/layer.py, reset_lora_parameters).
    """
    adapters = {}
    sites = find_sites(model, settings.sites)
    for site, k in zip(sites, jax.random.split(key, len(sites)), strict=True):
        parent, name = _at(model, site)
        *stack, wide, out = getattr(parent, name).kernel.shape
        bound = wide**-0.5
        a = jax.random.uniform(k, (*stack, wide, settings.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, settings.rank, out), jnp.float32)
        adapters[site] = {"lora_A": {"kernel": a}, "lora_B": {"kernel": b}}
    return adapters


def sharding_rules(adapters: Adapters) -> list[tuple[str, PartitionSpec]]:
    """(path regex, PartitionSpec) of each adapter: its wide axis is cut over all that cuts parameters, rank and stack
    stay whole. The products with A and B are small; what counts is that nobody holds all moments of them."""
    rules = []
    for site, pair in adapters.items():
        stack = (None,) * (pair["lora_A"]["kernel"].ndim - 2)
        rules.append((rf"{re.escape(site)}\.lora_A\.kernel", PartitionSpec(*stack, PARAMETER_AXES, None)))
        rules.append((rf"{re.escape(site)}\.lora_B\.kernel", PartitionSpec(*stack, None, PARAMETER_AXES)))
    return rules


# ---- the adapted network -------------------------------------------------------------------------------------------


class LoRALinear(nnx.Module):
    """x·W + bias + scale · (x·A)·B: the product A·B is never formed, and so its gradient, as large as W, neither."""

    def __init__(self, base_layer: nnx.Module, a: Float[Array, "*n d r"], b: Float[Array, "*n r out"], scale: float):
        self.base_layer, self.scale = base_layer, scale
        self.lora_A, self.lora_B = nnx.Param(a), nnx.Param(b)

    @property
    def kernel(self) -> nnx.Param:
        """The frozen one, for code that asks a Linear for its dtype or its sizes."""
        return self.base_layer.kernel

    @property
    def bias(self) -> nnx.Param:
        """The frozen one."""
        return self.base_layer.bias

    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch out"]:
        return self.base_layer(x) + self.scale * ((x @ self.lora_A[...]) @ self.lora_B[...])


def combine(base: Any, adapters: Adapters, scale: float) -> Any:
    """The network with adapters at their sites, a new module; the base gets no gradient and stays as it is.

    Raises ValueError for adapters that are not this network's.
    """
    module = jax.tree.map(jax.lax.stop_gradient, base)
    for parent, name, a, b in _pairs(module, adapters):
        setattr(parent, name, LoRALinear(getattr(parent, name), a, b, scale))
    return module


def merge(base: Any, adapters: Adapters, scale: float) -> Any:
    """The network with W + scale · A·B for W, computed in fp32 and rounded once to W's dtype; all else is shared.

    For export: the same function as `combine`'s up to rounding. Raises as it.
    """
    return _added(base, adapters, scale)


def unmerge(merged: Any, adapters: Adapters, scale: float) -> Any:
    """What was merged, up to rounding.

    Leaves outside the sites are the very same arrays. A weight at a site differs from what it was by at most one unit
    in the last place, in its dtype, of the larger of |W| and |W + scale · A·B|, for each way rounds once: 1.2e-7 of it
    in fp32, 1/128 in bf16. Where bits matter, keep the base.
    """
    return _added(merged, adapters, -scale)


def _added(base: Any, adapters: Adapters, scale: float) -> Any:
    @jax.jit
    def add(kernel, a, b):
        product = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    module = jax.tree.map(lambda leaf: leaf, base)  # other objects, the same arrays
    for parent, name, a, b in _pairs(module, adapters):
        linear = getattr(parent, name)
        linear.kernel = nnx.Param(add(linear.kernel[...], a, b))
    return module


def _pairs(module: Any, adapters: Mapping) -> Iterator[tuple[Any, str, Any, Any]]:
    """(the module that has the site, its attribute, A, B) of each site; ValueError where they do not fit."""
    for site, pair in adapters.items():
        a, b = pair["lora_A"]["kernel"], pair["lora_B"]["kernel"]
        try:
            parent, name = _at(module, site)
            linear = getattr(parent, name)
        except AttributeError:
            raise ValueError(f"these adapters are another network's: this one has no {site}") from None
        if not isinstance(linear, nnx.Linear):
            raise ValueError(f"the adapters of {site} want a Linear there, and it is a {type(linear).__name__}")
        if (*a.shape[:-1], b.shape[-1]) != linear.kernel.shape:
            raise ValueError(f"the adapters {a.shape} and {b.shape} of {site} do not fit its {linear.kernel.shape}")
        yield parent, name, a, b
