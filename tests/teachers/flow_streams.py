"""What the makers of golden flow and the tests that are held to it share: weights and inputs by name, comparisons."""

import hashlib
import zlib

import numpy as np

# For gradients: backward convolutions in loops take 50 times as long in the suite's unoptimised programs for CPU.
COMPILER_OPTIONS = {"xla_backend_optimization_level": 2}


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 standard normal array that depends on nothing but its name and shape."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def frames(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Pixels in [-1, 1]."""
    return np.tanh(draw(name, shape))


def draw_weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight in PyTorch's layout that keeps activations alive; statistics are positive, flow changes are small."""
    if name.endswith("num_batches_tracked"):
        return np.array(2**32 + zlib.crc32(name.encode()))  # too large for the int32 of JAX's leaves
    drawn = draw(name, shape)
    if name.endswith("running_var"):
        return 0.5 + np.abs(drawn)
    if len(shape) > 1:
        # Residual blocks add up, and flow that points out of the frame would see no correlations.
        gain = 0.3 if name.endswith(("conv2.weight", "flow_head.2.weight")) else 1.0
        return drawn * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    centre = 1.0 if name.endswith("weight") else 0.0  # weights of one axis are a normalisation's
    return np.float32(centre) + np.float32(0.2) * drawn


def key_digest(shapes: dict[str, tuple[int, ...]]) -> str:
    """Digest of all names with their shapes."""
    lines = sorted(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def sizes(network) -> dict[str, int | str]:
    """Counts of a PyTorch network, which may be on the meta device."""
    state = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    return dict(
        keys=len(state),
        parameters=sum(p.numel() for p in network.parameters()),
        elements=sum(int(np.prod(shape)) for shape in state.values()),
        digest=key_digest(state),
    )


def fill(network, rename=lambda name: name) -> None:
    """Draws every parameter and buffer of a PyTorch network; `rename` gives the name whose stream is taken."""
    import torch

    state = {key: draw_weight(rename(key), tuple(value.shape)) for key, value in network.state_dict().items()}
    network.load_state_dict({key: torch.from_numpy(np.asarray(value)) for key, value in state.items()})
    network.eval()


def assert_close(ours, theirs, tolerance: float = 1e-4) -> None:
    """The largest difference is at most `tolerance` of the largest value, which is not nothing."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 1e-3
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


def assert_mostly_close(ours, theirs) -> None:
    """As `assert_close` for 99 % of the values: gradients jump where rounding decides on which side of 0 a ReLU is."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 1e-3
    assert np.quantile(np.abs(ours - theirs), 0.99) <= 1e-4 * np.abs(theirs).max()
    assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs)
