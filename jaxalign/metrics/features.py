"""Features of videos for scores: a frozen network, found by name, asked batch by batch on all local devices.

    network = features.open_network("efficientnet_lite0")
    found = features.features(network, videos)  # uint8 [n, t, h, w, 3] -> float32 [n, d]

Networks are those of metrics/networks (i3d, c3d, inception, clip), VideoMAE by its teachers' names, and
efficientnet_lite0, whose weights come with the demo: anybody can compute a Fréchet distance in its features, and nobody
should call that FVD. `Network.title` says what a distance in the features of a network is called. All products are in
full precision, whatever the device's default is: scores are compared between machines.
"""

import dataclasses
import difflib
import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from jaxalign import teachers
from jaxalign.interop import converted
from jaxalign.interop.mapping import named_leaves
from jaxalign.metrics import networks
from jaxalign.models.frames import over_frames
from jaxalign.teachers import videomae

DEMO = "efficientnet_lite0"
AT_ONCE = 8  # clips in a batch
FRAMES_AT_ONCE = 64  # of image networks, on a device
VIDEO_NETWORKS = ("i3d", "c3d")  # of those in metrics/networks the ones that see whole clips; the others see images
PAPERS_VIDEOMAE = "videomaev2_g", "vit_g_hybrid_pt_1200e_ssv2_ft.pth"  # of the content-debiased FVD
# Of networks that several published files fit, the files with the weights that papers compare.
PAPERS_FILES = {PAPERS_VIDEOMAE[0]: PAPERS_VIDEOMAE[1:], "i3d": ("i3d_torchscript.pt", "i3d_pretrained_400.pt")}


@dataclasses.dataclass(frozen=True)
class Network:
    """A frozen network on its devices; `ask` is compiled once a shape and belongs to one kind of output."""

    name: str
    title: str  # what a Fréchet distance in these features is called
    module: Any
    ask: Callable[[Any, Any], Any]  # (module, uint8 [b, t, h, w, 3]) -> [b, d], or [b, t, d] of every frame
    mesh: Mesh
    settings: tuple[tuple[str, Any], ...] = ()
    file: str = ""  # upstream's name of the file that the weights came in

    @functools.cached_property
    def digest(self) -> str:
        """Of the weights; see `digest`."""
        return digest(self.module)


def names() -> list[str]:
    """What `open_network` knows."""
    return [*networks.NETWORKS, *videomae.PRESETS, DEMO]


def open_network(
    name: str,
    weights: str | Path | None = None,
    *,
    per_frame: bool = False,
    logits: bool = False,
    devices: Any = None,
    **settings: Any,
) -> Network:
    """A network with its weights, whole on every one of `devices` (default: all local ones).

    One vector a clip, of image networks the mean over its frames, or with `per_frame` one for every frame. `logits`:
    class scores instead of features (c3d, inception, efficientnet_lite0). Raises ValueError for a name, or an output,
    that there is not, FileNotFoundError for weights that are missing (it names the file).
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names())}"
        raise ValueError(f"--network {name!r} is not known; {hint}")
    if per_frame and _sees_clips(name):
        raise ValueError(f"--network {name} sees whole clips and has nothing to say of a frame: take inception")
    if name == DEMO and not logits:
        settings = {"stride": 32, "size": 224} | settings
    loader = networks if name in networks.NETWORKS else teachers
    ask = asking(name, per_frame=per_frame, logits=logits)  # before weights are read
    try:
        module = loader.load(name, weights, **settings)
    except FileNotFoundError as error:
        raise FileNotFoundError(_without_weights(name, str(error))) from None

    devices = jax.local_devices() if devices is None else list(devices)
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    module = jax.device_put(module, NamedSharding(mesh, PartitionSpec()))
    # The output is small: whole on every device, and fetched from one of them.
    ask = jax.jit(ask, out_shardings=NamedSharding(mesh, PartitionSpec()))
    title = _title(name, per_frame)
    settings = tuple(sorted((k, str(v)) for k, v in settings.items()))
    return Network(name, title, module, ask, mesh, settings, file=_file(name, weights))


def papers_files(name: str) -> tuple[str, ...]:
    """What the files are called whose features papers compare, the usual one first; any of a network's that hold the
    same weights."""
    return PAPERS_FILES.get(name) or tuple(file.name for file in teachers.files(name))


def _file(name: str, weights: str | Path | None) -> str:
    """The name of upstream's file; a folder that jaxalign.convert made of one notes it."""
    if weights is None:
        return teachers.files(name)[0].name  # of an installed package
    noted = converted.note(weights).get("source") if converted.is_converted(weights) else None
    return noted or Path(weights).absolute().name


def asking(name: str, *, per_frame: bool = False, logits: bool = False) -> Callable[[Any, Any], Any]:
    """(module, uint8 [b, t, h, w, 3]) -> [b, d], or [b, t, d] of every frame; see `open_network`, and raises as it."""
    output = _output(name, logits)

    def ask(module, videos):
        with jax.default_matmul_precision("highest"):
            found = output(module, videos.astype(jnp.float32) / 127.5 - 1.0).astype(jnp.float32)
        return found if per_frame or _sees_clips(name) else found.mean(axis=1)

    return ask


def _sees_clips(name: str) -> bool:
    return name in videomae.PRESETS or name.startswith(VIDEO_NETWORKS)


def _without_weights(name: str, words: str) -> str:
    """What a loader says of weights that are missing, for somebody who wants a score."""
    words = re.sub(r"\([^()]*\bweights=FILE\)", "(--weights FILE)", words)
    if name not in videomae.PRESETS:
        return words
    preset, file = PAPERS_VIDEOMAE
    if name == preset:  # of its several files the one whose features papers compare
        lacks, wants, rest = words.partition("; it wants ")
        words = lacks + wants + rest.replace(teachers.files(name)[0].name, file)
    else:
        words += f"; papers' FVD is {preset}'s with {file}"
    return f"{words}; --network i3d is the smaller, classic one"


def _output(name: str, logits: bool) -> Callable[[Any, Any], Any]:
    """(module, video [b, t, h, w, 3] in [-1, 1]) -> what is wanted of it."""
    if name == DEMO:
        return (lambda m, v: m.logits(v)) if logits else (lambda m, v: m(v).mean(axis=(2, 3)))
    if name in videomae.PRESETS or (logits and name.startswith(("i3d", "clip"))):
        if logits:
            raise ValueError(f"--network {name} has no classes for an Inception Score: take c3d")
        return lambda m, v: m.features(v)
    if name.startswith(VIDEO_NETWORKS):
        return lambda m, v: m(v)
    if logits:  # without bias, as torch-fidelity's Inception Score takes them
        return lambda m, v: over_frames(lambda images: m.logits(images, biased=False), v, FRAMES_AT_ONCE)
    return lambda m, v: over_frames(m, v, FRAMES_AT_ONCE)


def _title(name: str, per_frame: bool) -> str:
    if name.startswith("i3d"):
        return "FVD (I3D)"
    if name in videomae.PRESETS:
        return "FVD (VideoMAE)" if name == PAPERS_VIDEOMAE[0] else f"FVD (VideoMAE: {name})"
    if per_frame and name.startswith("inception"):
        return "FID"
    clips = "of clips" if name.startswith(VIDEO_NETWORKS) else "of clips, features averaged over frames"
    what = "of frames" if per_frame else clips
    return f"Fréchet distance {what} ({name} features; not {'FID' if per_frame else 'FVD'})"


def features(
    network: Network,
    videos: UInt8[np.ndarray, "n t h w 3"],
    *,
    at_once: int = AT_ONCE,
    progress: Callable[[int], None] | None = None,
) -> Float[np.ndarray, "n d"] | Float[np.ndarray, "n t d"]:
    """The network's features of clips, in batches of `at_once` (and of every device at least one), fp32 on the host.

    Batches are full, the last one with repeats, so there is one compilation and a clip's bits do not depend on how
    many follow. `progress` is told how many clips are done. Raises ValueError without a clip.
    """
    if not len(videos):
        raise ValueError("there are no clips to take features of")
    size = at_once + -at_once % network.mesh.size
    rows, found = NamedSharding(network.mesh, PartitionSpec("data")), []
    for first in range(0, len(videos), size):
        batch = videos[np.arange(first, first + size) % len(videos)]
        found.append(network.ask(network.module, jax.device_put(batch, rows)))
        if len(found) > 1:  # one batch is computed while the next one is sent
            found[-2] = np.asarray(found[-2])
        if progress is not None:
            progress(min(first + size, len(videos)))
    return np.concatenate([np.asarray(part) for part in found])[: len(videos)]


def digest(tree: Any) -> str:
    """Digest of every leaf of a module, by name: it names the weights, whatever file they came in."""
    digest = hashlib.blake2b(digest_size=16)
    for name, leaf in named_leaves(tree)[0]:
        array = np.asarray(leaf)
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def text_features(network: Network, token_ids: np.ndarray) -> Float[np.ndarray, "n d"]:
    """CLIP's embeddings of texts, given as token ids [n, length]."""
    return np.asarray(jax.jit(ask_text)(network.module, jnp.asarray(token_ids)))


def ask_text(module: Any, token_ids: Array) -> Array:
    """CLIP's text tower in full precision."""
    with jax.default_matmul_precision("highest"):
        return module.text(token_ids).astype(jnp.float32)
