"""The one place where student and teacher meet: what is computed, what is not, and what gets a gradient."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from jaxalign.training import config as config_lib
from jaxalign.training import setup

SMALL = dict(
    batch_size=2,
    teacher=dict(size=64, stride=8),
    data=dict(num_frames=4, height=32, width=32),
)


def small_run(num_classes=0, **changes):
    config = base.get_config("demo")
    for layer in (SMALL, changes):
        config.update(layer)
    config.model.num_classes = num_classes
    return setup.build(config_lib.resolve(config), num_classes=num_classes)


@pytest.fixture(scope="module")
def aligned():
    return small_run(align=dict(method="m_tsa", weight=0.5))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {"video": jnp.asarray(rng.integers(0, 256, (2, 4, 32, 32, 3), np.uint8)), "label": jnp.array([0, 2])}


def random_like(tree, seed=0):
    """Every leaf random: adaLN-Zero and the zero output layer would hide most of the network."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        treedef, [x + 0.05 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def test_every_parameter_gets_a_gradient_and_the_loss_is_the_sum(aligned, batch):
    trainable = random_like(aligned.init(jax.random.key(0)))
    key = jax.random.key(1)
    grad = jax.jit(jax.value_and_grad(aligned.task.loss, has_aux=True))
    (loss, metrics), grads = grad(trainable, aligned.frozen, batch, key, 0, {})
    assert float(loss) == pytest.approx(float(metrics["denoising"] + 0.5 * metrics["align/m_tsa"]), rel=1e-6)
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(grads))
    parts = [
        jax.jit(f)(trainable, aligned.frozen, batch, key, 0, {})[0]
        for f in (aligned.task.denoising_loss, aligned.task.aligning_loss)
    ]
    assert float(loss) == pytest.approx(float(sum(parts)), rel=1e-6)


def test_without_alignment_nothing_of_it_is_there(aligned, batch):
    plain = small_run()
    assert plain.frozen["teachers"] == {} and plain.task.alignments == ()
    key = jax.random.key(3)
    with_head, without = aligned.init(key), plain.init(key)
    assert without["heads"] == {}
    for a, b in zip(jax.tree.leaves(with_head["model"]), jax.tree.leaves(without["model"]), strict=True):
        np.testing.assert_array_equal(a, b)
    arguments = (random_like(without), plain.frozen, batch, key, 0, {})
    text = jax.jit(plain.task.loss).lower(*arguments).as_text()
    assert "top_k" not in text and len(jax.tree.leaves(plain.frozen)) == 0
    _, metrics = jax.jit(plain.task.loss)(*arguments)
    assert set(metrics) == {"denoising"}


def test_held_out_is_deterministic_and_by_time(aligned, batch):
    trainable = random_like(aligned.init(jax.random.key(0)))
    noise = jax.random.normal(jax.random.key(2), (2, *aligned.latent_shape))
    held_out = jax.jit(aligned.task.held_out)
    times = jnp.array([0.1, 0.9])
    one, two = (held_out(trainable, aligned.frozen, batch, noise, times) for _ in range(2))
    assert one["denoising"].shape == (2, 2) and set(one) == {"denoising", "m_tsa"}
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])
    flipped = held_out(trainable, aligned.frozen, batch, noise, times[::-1])
    np.testing.assert_allclose(flipped["denoising"], one["denoising"][::-1], rtol=1e-5)


def test_labels_are_dropped_in_the_task_and_only_with_a_key(batch):
    run = small_run(num_classes=3, model=dict(class_dropout=0.5))
    labels = jnp.zeros(1000, jnp.int32)
    dropped = run.task._condition(run.frozen, {"label": labels}, jax.random.key(0))
    assert 0.4 < float((dropped == 3).mean()) < 0.6 and set(np.unique(dropped)) == {0, 3}
    np.testing.assert_array_equal(run.task._condition(run.frozen, {"label": labels}, None), labels)


@pytest.mark.parametrize("objective", ["flow", "ddpm", "v"])
def test_sampling_is_a_function_of_its_noise(objective, batch):
    run = small_run(num_classes=3, objective=objective)
    model = random_like(run.init(jax.random.key(0)))["model"]
    noise = jax.random.normal(jax.random.key(5), (2, *run.latent_shape))
    sample = jax.jit(run.task.sample, static_argnames=("sampler", "steps", "guidance_scale"))
    videos = sample(model, run.frozen, noise, jnp.array([0, 1]), jax.random.key(0), steps=2, guidance_scale=2.0)
    again = sample(model, run.frozen, noise, jnp.array([0, 1]), jax.random.key(0), steps=2, guidance_scale=2.0)
    np.testing.assert_array_equal(videos, again)
    assert videos.shape == (2, 4, 32, 32, 3) and float(jnp.abs(videos).max()) <= 1
    other = sample(model, run.frozen, noise, jnp.array([2, 2]), jax.random.key(0), steps=2, guidance_scale=2.0)
    assert not np.array_equal(videos, other), "labels matter"


def test_bfloat16_computes_and_keeps_fp32_masters(batch):
    run = small_run(precision="bf16", align=dict(method="trd", weight=0.5))
    trainable = random_like(run.init(jax.random.key(0)))
    grads = jax.jit(jax.grad(lambda t: run.task.loss(t, run.frozen, batch, jax.random.key(1), 0, {})[0]))(trainable)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    exact = dataclasses.replace(run.task, dtype=jnp.float32)
    frozen = jax.tree.map(lambda x: x.astype(jnp.float32), run.frozen)
    full = jax.jit(jax.grad(lambda t: exact.loss(t, frozen, batch, jax.random.key(1), 0, {})[0]))(trainable)
    a, b = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(tree)]) for tree in (grads, full))
    assert float(jnp.vdot(a, b) / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.98


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(align=dict(method="tsa", weight=1.0, depth=8)), "blocks 0..7"),
        (dict(align=dict(method="tsa", weight=1.0), teacher=dict(stride=16)), r"\(4, 8, 8\).*\(4, 4, 4\)"),
        (dict(model=dict(preset="huge")), "write one of S, B, L, XL, demo"),
        (dict(teacher=dict(name="dinov3"), align=dict(method="tsa", weight=1.0)), "dinov3"),
        (dict(teacher=dict(weights="/nowhere.pth"), align=dict(method="tsa", weight=1.0)), "/nowhere.pth"),
    ],
)
def test_what_cannot_meet_is_said_at_the_start(changes, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        small_run(**changes)


def test_latents_of_a_kl_autoencoder(tmp_path, batch):
    """The way of the real scales, small: the published folder's VAE in front of the student and behind the sampler."""
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    vae.save_pretrained(tmp_path / "vae")
    changes = dict(codec=dict(name="sd_kl", weights=str(tmp_path)), model=dict(patch_size=1))
    run = small_run(align=dict(method="m_tsa", weight=0.5), **changes)
    assert run.latent_shape == (4, 8, 8, 4) and run.student_grid == (4, 8, 8)
    trainable = random_like(run.init(jax.random.key(0)))
    losses = [
        float(jax.jit(run.task.loss)(trainable, run.frozen, batch, jax.random.key(k), 0, {})[0]) for k in (1, 1, 2)
    ]
    assert np.isfinite(losses).all() and losses[0] == losses[1] != losses[2]
    noise = jax.random.normal(jax.random.key(2), (2, *run.latent_shape))
    videos = jax.jit(run.task.sample, static_argnames="steps")(
        trainable["model"], run.frozen, noise, None, jax.random.key(0), steps=2
    )
    assert videos.shape == (2, 4, 32, 32, 3) and float(jnp.abs(videos).max()) <= 1
    with pytest.raises(FileNotFoundError, match=r"'sd_kl' needs weights; .* --config.codec.weights=FOLDER"):
        small_run(codec=dict(name="sd_kl"))
