"""Flops on the jaxpr against formulas, and what recomputation, loops and kernels add to them."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxalign.models import MODELS
from jaxalign.training import chips
from jaxalign.training.flops import Flops, _own_flops, count, matmul_flops


def counted(function, *shapes):
    return count(jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)))


def test_products_and_convolutions():
    assert counted(jnp.matmul, (3, 4, 5), (5, 7)) == Flops(2 * 3 * 4 * 5 * 7, 0)
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    assert counted(conv, (2, 8, 6, 4), (3, 3, 2, 10)) == Flops(2 * (2 * 8 * 6 * 10) * (3 * 3 * 2), 0)


def test_loops_run_and_the_dearest_branch_counts():
    def looped(x, w):
        return jax.lax.scan(lambda x, w: (jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), None), x, w)[0]

    assert counted(looped, (4, 8), (5, 8, 8)).total == 5 * 2 * (2 * 4 * 8 * 8)


def test_what_is_computed_again_is_told_apart():
    def loss(w, x, wrap):
        step = wrap(lambda x, w: (jnp.tanh(jnp.tanh(x @ w) @ w), None))
        return jax.lax.scan(step, x, w)[0].sum()

    product = 2 * 4 * 8 * 8
    for wrap, again in ((lambda f: f, 0), (jax.checkpoint, 2), (lambda f: jax.checkpoint(jax.checkpoint(f)), 2)):
        found = counted(jax.grad(functools.partial(loss, wrap=wrap)), (3, 8, 8), (4, 8))
        assert (found.model, found.recomputed) == (3 * 6 * product, 3 * again * product)  # forward 2, backward 4


def test_a_student_needs_the_same_however_its_memory_is_saved():
    student = MODELS["cogvideox"]
    text = dict(text_tokens=5, text_width=16, time_width=64)
    sizes = dict(input_size=(8, 8), num_frames=4, patch_size=2, in_channels=4, width=64, depth=2, num_heads=4)
    shapes = [(2, 4, 8, 8, 4), (2,), (2, 5, 16)]
    found = {}
    for remat, attention in ((False, "plain"), (True, "head")):
        config = student.config(**sizes, **text, remat=remat, attention=attention)
        model = jax.eval_shape(lambda config=config: student.model(config, rngs=nnx.Rngs(0)))
        data = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        run = jax.value_and_grad(lambda model, *data: jnp.square(model(*data)[0]).mean())
        found[remat] = count(jax.make_jaxpr(run)(model, *data))
    assert found[True].model == found[False].model == found[False].total
    forward = found[True].recomputed / found[True].model
    assert 0.3 < forward < 0.4  # one forward pass of three, and the scores once more


def test_a_device_in_a_shard_map_and_all_of_them():
    mesh = AbstractMesh((2, 4), ("data", "context"))
    product = jax.shard_map(
        lambda a, b: a @ b, mesh=mesh, in_specs=(P("data"), P(None, "context")), out_specs=P("data", "context")
    )
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16), (16, 32))]
    with jax.sharding.use_abstract_mesh(mesh):
        whole = 2 * 8 * 16 * 32
        assert count(jax.make_jaxpr(product)(*shapes)).total == whole
        assert matmul_flops(product, *shapes) == whole / 8


def test_an_attention_kernel_counts_as_its_products():
    q, k = (SimpleNamespace(aval=jax.ShapeDtypeStruct((2, n, 3, 16), jnp.bfloat16)) for n in (10, 7))
    product = 2 * 2 * 3 * 10 * 7 * 16
    equation = SimpleNamespace(invars=[q, k])
    assert _own_flops("dot_product_attention_fwd_wrapper", equation, {"layout": 0}) == Flops(2 * product, 0)
    assert _own_flops("dot_product_attention_bwd_wrapper", equation, {"layout": 0}) == Flops(5 * product, product)


def test_chips_are_found_by_what_jax_calls_them():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "TPU v5": "v5p",
        "TPU v5p": "v5p",
        "TPU v6 lite": "v6e",
        "TPU v5 lite": None,
        "NVIDIA H100 PCIe": None,
        "cpu": None,
    }
    for kind, name in names.items():
        chip = chips.chip_of(kind)
        assert (chip and chip.name) == name, kind
