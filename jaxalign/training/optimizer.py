"""The optimizer of a run: AdamW behind late-starting clipping, its schedule, and which leaves decay."""

import jax
import ml_collections
import optax

from jaxalign.training.mesh import path_name


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Linear warmup, then constant, or linear or cosine decay to zero at config.steps."""
    c = config.optimizer
    decay_steps = max(config.steps - c.warmup_steps, 1)
    after = {
        "constant": lambda: optax.constant_schedule(c.learning_rate),
        "linear": lambda: optax.linear_schedule(c.learning_rate, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(c.learning_rate, decay_steps),
    }[c.schedule]()
    if not c.warmup_steps:
        return after
    # The first step moves by 1/warmup of the rate, not by nothing.
    first = c.learning_rate / c.warmup_steps
    warmup = optax.linear_schedule(first, c.learning_rate, c.warmup_steps)
    return optax.join_schedules([warmup, after], [c.warmup_steps])


def decays(params):
    """True for the leaves that weight decay acts on: kernels; never biases, norms, tables of embeddings.

    Told by name, for stacked blocks give biases a second axis.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith("kernel"), params)


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW with fp32 moments; gradients clipped by global norm from step `grad_clip_from` on (0 = always)."""
    c = config.optimizer
    adamw = optax.adamw(learning_rate(config), b1=c.b1, b2=c.b2, eps=c.eps, weight_decay=c.weight_decay, mask=decays)
    if not c.grad_clip:
        return adamw
    clip = optax.clip_by_global_norm(c.grad_clip)
    if c.grad_clip_from:
        start = c.grad_clip_from
        clip = optax.conditionally_transform(clip, lambda step: step >= start)
    return optax.chain(clip, adamw)
