"""A fixed nonlinear function in place of a network, for NumPy-like libraries (jax.numpy and torch) alike."""


def toy_denoiser(xp, x, timesteps, learn_sigma):
    """x[b,t,h,w,c], timesteps[b] on the 0…1000 scale -> c channels that keep a sampling chain bounded, or 2c.

    It mixes channels and frames, so a wrong layout shows; the further channels leave [−1, 1] now and then.
    """
    time = timesteps[:, None, None, None, None]
    mixed = x.mean(axis=-1, keepdims=True) - 0.5 * x.mean(axis=1, keepdims=True)
    first = xp.tanh(time / 250.0) * 0.97 * x + 0.2 * xp.sin(3.0 * x + time / 300.0 + mixed)
    if not learn_sigma:
        return first
    return xp.concatenate([first, 1.2 * xp.sin(2.0 * x - time / 200.0 - mixed)], axis=-1)
