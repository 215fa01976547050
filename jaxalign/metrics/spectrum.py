"""Which spatial frequencies token maps hold: log spectrum, radial profile and the gap Δ (Align4Gen, eq. 8 to 12).

Δ is the mean log magnitude at high frequencies minus the one at frequency zero: low for a teacher that says the
same over large regions, high for one that keeps detail. Δ depends on the grid: the sum at frequency zero grows
with h·w, noise only with its root, so a grid of twice the side lowers Δ by up to ln 2. Compare teachers on equal
grids.
"""

import numpy as np
from jaxtyping import Float

HIGH = 0.75  # high frequencies begin at this part of the highest one along an axis
EPSILON = 1e-8  # keeps the logarithm of a dead channel finite


def log_spectrum(tokens: Float[np.ndarray, "t h w d"], *, epsilon: float = EPSILON) -> Float[np.ndarray, "h w"]:
    """M = log(|FFT2(tokens)| + ε) over rows and columns, frequency zero in the centre, mean over frames and channels.

    The mean may be taken first because Δ is linear in M.
    """
    total = np.zeros(tokens.shape[1:3])
    for frame in tokens:  # a frame at a time: complex numbers of a whole clip would be four times its tokens
        total += np.log(np.abs(np.fft.fft2(frame.astype(np.float64), axes=(0, 1))) + epsilon).mean(axis=-1)
    return np.fft.fftshift(total / len(tokens))


def radius(shape: tuple[int, int]) -> Float[np.ndarray, "h w"]:
    """Distance from frequency zero, 1 at the highest frequency along an axis.

    On a square grid it is √(u² + v²) / (h/2), the paper's; each axis has its own scale on another one.
    """
    rows, columns = (2 * (np.arange(n) - n // 2) / n for n in shape)
    return np.hypot(rows[:, None], columns[None])


def frequency_gap(spectrum: Float[np.ndarray, "h w"]) -> float:
    """Δ = mean of M where the radius is above 0.75, minus M at frequency zero. Raises ValueError for one token."""
    height, width = spectrum.shape
    high = radius((height, width)) > HIGH
    if not high.any():
        raise ValueError(f"a grid of {height}×{width} tokens has no high frequencies")
    return float(spectrum[high].mean() - spectrum[height // 2, width // 2])


def radial_profile(
    spectrum: Float[np.ndarray, "h w"], *, rings: int = 9
) -> tuple[Float[np.ndarray, "r"], Float[np.ndarray, "r"]]:
    """(radius, mean of M − M at zero) of rings of equal width from 0 to 1; the corners beyond 1 are left out.

    The first is frequency zero alone, where the profile is 0; rings without a frequency (small grids) are left out.
    """
    height, width = spectrum.shape
    distance = radius((height, width))
    relative = spectrum - spectrum[height // 2, width // 2]
    number = np.ceil(distance * (rings - 1) - 1e-9).astype(int)
    kept = [ring for ring in range(rings) if (number == ring).any()]
    where = np.asarray([distance[number == ring].mean() for ring in kept])
    return where, np.asarray([relative[number == ring].mean() for ring in kept])
