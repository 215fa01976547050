"""What the parity tests of the codecs share: random weights for a PyTorch network, ours with the same, comparisons."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop import mapping

torch = pytest.importorskip("torch")


def draw(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def randomise(model):
    """Every weight random: scales of norms around 1, kernels of about unit gain, biases and tables small."""
    state = {}
    for seed, (name, value) in enumerate(model.state_dict().items()):
        values = draw(tuple(value.shape), seed)
        if value.ndim == 1:
            values = 1 + 0.2 * values if name.endswith("weight") else 0.3 * values
        else:
            values = values / np.prod(value.shape[1:]) ** 0.5
        state[name] = torch.from_numpy(values.astype(np.float32))
    model.load_state_dict(state)
    return model.eval()


def arrays(model):
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def close(found, expected, tolerance=1e-4):
    """Within 1e-4 of the largest value, which is not zero."""
    found = np.asarray(found, np.float32)
    expected = expected.detach().float().numpy() if isinstance(expected, torch.Tensor) else np.asarray(expected)
    largest = np.abs(expected).max()
    assert largest > 1e-3
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * largest


def to_torch(video):
    """[b, t, h, w, c] -> [b, c, t, h, w]."""
    return torch.from_numpy(np.array(video)).permute(0, 4, 1, 2, 3)


def from_torch(video):
    return video.permute(0, 2, 3, 4, 1)


def half(module):
    return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), module)


def same_names_and_shapes(module, rules, model):
    """Keys, shapes and the number of parameters are those of a network on the meta device; returns that number."""
    ours = {name: tuple(spec.shape) for name, spec in mapping.upstream_shapes(module, rules).items()}
    theirs = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert ours == theirs
    leaves = sum(leaf.size for leaf in jax.tree.leaves(module))
    assert leaves == sum(parameter.numel() for parameter in model.parameters())
    return leaves


def bits(array):
    array = np.asarray(array)
    return array.dtype, array.shape, array.tobytes()
