"""I3D, the FID's Inception and C3D against PyTorch: features and logits at random weights, files in and out."""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxalign import convert, teachers
from jaxalign.interop import manifests, mapping, safetensors_file, sniff
from jaxalign.interop.rules import BATCH_NORM_COUNTS
from jaxalign.metrics import features, networks
from jaxalign.metrics.networks import i3d, inception
from jaxalign.metrics.networks import resize as resizes
from jaxalign.teachers.efficientnet import BatchNorm

torch = pytest.importorskip("torch")
F = torch.nn.functional

MINE = ("i3d", "i3d_cdfvd", "inception", "c3d")
FILES = {f"{file.preset}-{file.name}": file for file in manifests.files() if file.preset in networks.NETWORKS}
SMALL_C3D = dict(width=4, hidden=24, num_classes=7)

apply = jax.jit(lambda module, x: module(x))


@functools.cache
def abstract(name, **settings):
    return networks.abstract(name, **settings)


def random_state(shapes, seed=0):
    """Every array from one stream, at scales that keep many layers of ReLU alive; variances are positive."""
    random, state = np.random.default_rng(seed), {}
    for name, spec in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.array(random.integers(2**40))
        elif name.endswith("running_var"):
            state[name] = random.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        elif name == "mean":
            state[name] = random.uniform(80, 120, spec.shape).astype(np.float32)
        elif len(spec.shape) > 1:
            scale = (2 / np.prod(spec.shape[1:])) ** 0.5
            state[name] = random.standard_normal(spec.shape, np.float32) * np.float32(scale)
        else:
            centre = 1.0 if name.endswith("weight") else 0.0
            state[name] = random.normal(centre, 0.2, spec.shape).astype(np.float32)
    return state


def state_for(name, layout, **settings):
    return random_state(mapping.upstream_shapes(abstract(name, **settings), networks.NETWORKS[name].layouts[layout]))


def tensors(state):
    return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}


def pixels(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def signed(video):
    return (video / np.float32(127.5) - 1).astype(np.float32)


def close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 1e-3 and theirs.std() > 1e-4
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


# ---- I3D -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_i3d_equals_cdfvds():
    """The smallest clip that the network takes; 9 frames and 224 pixels leave odd lengths for 'SAME' to pad."""
    pytorch_i3d = pytest.importorskip("cdfvd.third_party.i3d.pytorch_i3d")
    from cdfvd.third_party.i3d import utils

    theirs = pytorch_i3d.InceptionI3d(400, in_channels=3).eval()
    state = random_state(theirs.state_dict())
    theirs.load_state_dict(tensors(state), strict=True)
    video = pixels((1, 9, 30, 44, 3))
    with torch.no_grad():
        wanted = theirs(utils.preprocess_i3d(video))
    close(apply(networks.load("i3d_cdfvd", state), signed(video)), wanted)


def test_i3d_block_equals_cdfvds():
    """A mixed block, and all keys of the whole with their shapes."""
    pytorch_i3d = pytest.importorskip("cdfvd.third_party.i3d.pytorch_i3d")
    with torch.device("meta"):
        theirs = pytorch_i3d.InceptionI3d(400, in_channels=3)
    shapes = mapping.upstream_shapes(abstract("i3d"), i3d.RULES["pytorch_i3d"])
    assert {n: tuple(t.shape) for n, t in theirs.state_dict().items()} == {n: s.shape for n, s in shapes.items()}
    block = pytorch_i3d.InceptionModule(6, [3, 4, 5, 2, 3, 4], "").eval()
    state = random_state(block.state_dict())
    block.load_state_dict(tensors(state))
    ours = jax.eval_shape(lambda: i3d.Mixed(6, (3, 4, 5, 2, 3, 4), 1e-5, nnx.Rngs(0)))
    ours = mapping.load_state_dict(ours, state, i3d.RULES["pytorch_i3d"])
    x = np.maximum(np.random.default_rng(1).standard_normal((2, 3, 4, 5, 6)), 0).astype(np.float32)
    with torch.no_grad():
        wanted = block(torch.from_numpy(x).permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    close(apply(ours, x), wanted)


def same(x, kernel, stride):
    """TensorFlow's 'SAME' with zeros, what is odd at the end, for [b, c, t, h, w]."""
    pads = []
    for length, k, s in zip(x.shape[2:], kernel, stride, strict=True):
        pad = max((-(-length // s) - 1) * s + k - length, 0)
        pads = [pad // 2, pad - pad // 2, *pads]
    return F.pad(x, pads)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-5])
def test_i3d_unit_and_pools_are_tensorflows(epsilon):
    """The stem's unit and all kinds of pools on odd and even lengths, in the functions of torch."""
    random = np.random.default_rng(0)
    unit = i3d.Unit(3, 8, 7, 2, epsilon, nnx.Rngs(0))
    variance = random.uniform(0.001, 0.01, 8).astype(np.float32)  # so small that epsilon shows
    unit.batch3d.running_var = nnx.Param(jnp.asarray(variance))
    x = random.standard_normal((1, 9, 12, 15, 3)).astype(np.float32)
    x_torch = torch.from_numpy(x).permute(0, 4, 1, 2, 3)
    kernel = torch.from_numpy(np.array(unit.conv3d.kernel[...])).permute(4, 3, 0, 1, 2)
    y = F.conv3d(same(x_torch, (7,) * 3, (2,) * 3), kernel, stride=2)
    zeros, ones = torch.zeros(8), torch.ones(8)
    y = F.relu(F.batch_norm(y, zeros, torch.from_numpy(variance), ones, zeros, eps=epsilon))
    close(apply(unit, x), y.permute(0, 2, 3, 4, 1))
    for window, stride in (((1, 3), (1, 2)), ((3, 3), (2, 2)), ((2, 2), (2, 2)), ((3, 3), (1, 1))):
        (wt, ws), (st, ss) = window, stride
        wanted = F.max_pool3d(same(y, (wt, ws, ws), (st, ss, ss)), (wt, ws, ws), (st, ss, ss))
        close(
            i3d._max_pool(jnp.asarray(y.permute(0, 2, 3, 4, 1).numpy()), window, stride), wanted.permute(0, 2, 3, 4, 1)
        )


@pytest.mark.parametrize(
    "name", ["i3d", "inception", "c3d", "clip_vit_b32", "videomaev2_b", "efficientnet_lite0", "text", "logits"]
)
def test_every_product_is_in_full_precision(name):
    """Whatever the default is where the program runs: half the digits on a TPU."""
    video = jax.ShapeDtypeStruct((1, 16, 8, 8, 3), jnp.uint8)
    if name == "text":
        ask, module, given = features.ask_text, abstract("clip_vit_b32"), jax.ShapeDtypeStruct((1, 77), jnp.int32)
    elif name == "logits":
        ask, module, given = features.asking("inception", logits=True), abstract("inception"), video
    else:
        module = abstract(name) if name in networks.NETWORKS else teachers.abstract(name)
        ask, given = features.asking(name), video
    with jax.default_matmul_precision("default"):
        text = str(jax.make_jaxpr(ask)(module, given))
    products = text.count("conv_general_dilated[") + text.count("dot_general[")
    assert products >= 6 and text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products


def test_i3d_takes_nine_frames_or_more():
    module, spec = abstract("i3d"), lambda t: jax.ShapeDtypeStruct((2, t, 64, 64, 3), jnp.float32)
    for frames in (9, 16, 32):
        assert jax.eval_shape(apply, module, spec(frames)).shape == (2, module.width) == (2, 400)
    with pytest.raises(ValueError, match="i3d: a clip needs at least 9 frames, this one has 8"):
        jax.eval_shape(apply, module, spec(8))


@pytest.mark.slow
def test_i3d_reads_the_scripted_file(tmp_path):
    """StyleGAN-V's names in a TorchScript archive, and back to them bit for bit; the other file's names as well."""
    state = state_for("i3d", "torchscript")
    torch.jit.script(tree(state)).save(str(tmp_path / "i3d_torchscript.pt"))
    assert sniff.kind(tmp_path / "i3d_torchscript.pt") == sniff.TORCHSCRIPT
    module = networks.load("i3d", tmp_path / "i3d_torchscript.pt")
    counts = mapping.kept_arrays(module, state, i3d.RULES["torchscript"])
    again = mapping.state_dict(module, i3d.RULES["torchscript"], kept=counts)
    assert set(again) == set(state) and all(again[name].tobytes() == array.tobytes() for name, array in state.items())
    other = mapping.state_dict(module, i3d.RULES["pytorch_i3d"])
    assert len(other) == 344 and {"Mixed_5c.b3b.conv3d.weight", "Mixed_3b.b0.bn.running_var"} <= set(other)
    bare = {name: array for name, array in other.items() if not name.endswith("num_batches_tracked")}
    for one, two in zip(jax.tree.leaves(networks.load("i3d", bare)), jax.tree.leaves(module), strict=True):
        assert np.array_equal(one, two)


def test_a_scripted_file_is_taken_as_weights(tmp_path, monkeypatch):
    """The same in small: `load` finds a module's names in a TorchScript archive."""

    class Norm(nnx.Module):
        def __init__(self, config, *, rngs):
            self.bn = BatchNorm(3)

    entry = networks.Entry(Norm, inception.InceptionConfig, {"": (BATCH_NORM_COUNTS,)}, {})
    monkeypatch.setitem(networks.NETWORKS, "norm", entry)
    theirs = torch.nn.Sequential()
    theirs.add_module("bn", torch.nn.BatchNorm1d(3))
    theirs.load_state_dict(tensors(random_state(theirs.state_dict())))
    torch.jit.script(theirs.eval()).save(str(tmp_path / "w.pt"))
    ours = networks.load("norm", tmp_path / "w.pt").bn
    for leaf, name in ((ours.scale, "weight"), (ours.bias, "bias"), (ours.running_var, "running_var")):
        assert np.array_equal(leaf[...], getattr(theirs.bn, name).detach())


def tree(state):
    """A torch module without a forward that has this state dict."""
    root = torch.nn.Module()
    for name, tensor in tensors(state).items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, torch.nn.Module())
            node = node._modules[part]
        node.register_buffer(leaf, tensor)
    return root


# ---- Inception -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_inception_equals_torch_fidelitys(tmp_path):
    """Features, logits with and without bias, from images of another size."""
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(tensors(state_for("inception", "")), tmp_path / "w.pth")
    outputs = ["2048", "logits_unbiased", "logits"]
    theirs = FeatureExtractorInceptionV3("inception", outputs, feature_extractor_weights_path=str(tmp_path / "w.pth"))
    images = pixels((1, 40, 61, 3))
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(images).permute(0, 3, 1, 2))

    module = networks.load("inception", tmp_path / "w.pth")
    features = apply(module, signed(images))
    found = features, module.classify(features, biased=False), module.classify(features)
    for one, two in zip(found, wanted, strict=True):
        close(one, two)


@pytest.mark.parametrize("kind", ["A", "C", "E_1", "E_2"])
def test_inception_blocks_equal_torch_fidelitys(kind):
    """Blocks that pool; below zero, so that a padding that is counted, or a maximum, would show."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    block = getattr(theirs, f"Inception{kind}")(
        16, **{"A": {"pool_features": 8}, "C": {"channels_7x7": 8}}.get(kind, {})
    )
    state = random_state(block.state_dict())
    block.load_state_dict(tensors(state))
    made = {"A": (inception.A, 8), "C": (inception.C, 8), "E_1": (inception.E, False), "E_2": (inception.E, True)}
    make, option = made[kind]
    ours = mapping.load_state_dict(jax.eval_shape(lambda: make(16, option, nnx.Rngs(0))), state, inception.RULES)
    x = np.random.default_rng(0).standard_normal((1, 5, 6, 16)).astype(np.float32) - 3
    with torch.no_grad():
        wanted = block.eval()(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    close(apply(ours, x), wanted)


def test_inception_pools_as_the_original():
    """The pools in which FID's network differs from torchvision's, in the functions of torch; where each stands."""
    x = np.random.default_rng(0).standard_normal((1, 5, 6, 4)).astype(np.float32) - 3
    x_torch = torch.from_numpy(x).permute(0, 3, 1, 2)
    for ours, wanted in (
        (inception._average, F.avg_pool2d(x_torch, 3, 1, 1, count_include_pad=False)),
        (inception._maximum, F.max_pool2d(x_torch, 3, 1, 1)),
        (inception._halve, F.max_pool2d(x_torch, 3, 2)),
    ):
        close(ours(jnp.asarray(x)), wanted.permute(0, 2, 3, 1), 1e-6)
    module = abstract("inception")
    assert module.Mixed_7c.maximum and not module.Mixed_7b.maximum
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    assert jax.eval_shape(lambda m, x: m.logits(x), module, images).shape == (2, 1008)


def test_resizes():
    x = np.random.default_rng(0).standard_normal((2, 7, 10, 3)).astype(np.float32)
    wanted = F.interpolate(torch.from_numpy(x).permute(0, 3, 1, 2), (13, 13), mode="bilinear", align_corners=True)
    close(resizes.corners(jnp.asarray(x), 13), wanted.permute(0, 2, 3, 1), 1e-5)
    for size in (5, 13):  # TensorFlow 1: pixel i lies at i * length / size, the last row and column repeat
        rows, columns = np.arange(size) * 7 / size, np.arange(size) * 10 / size

        def between(x, at, axis):
            low = np.floor(at).astype(int)
            share = (at - low).reshape([-1 if i == axis else 1 for i in range(4)])
            above = np.minimum(low + 1, x.shape[axis] - 1)
            return np.take(x, low, axis) * (1 - share) + np.take(x, above, axis) * share

        close(resizes.tensorflow1(jnp.asarray(x), size), between(between(x, rows, 1), columns, 2), 1e-5)


# ---- C3D -----------------------------------------------------------------------------------------------------------


def c3d_in_torch(state, video):
    """tgan2/models/c3d/c3d_ucf101.py in the functions of torch: cover_all is ceil_mode."""
    state = tensors({name.replace("/", "."): array for name, array in state.items()})
    x = torch.from_numpy(signed(video)).permute(0, 4, 1, 2, 3)[:, [2, 1, 0]] * 128
    frames = x.transpose(1, 2).flatten(0, 1)
    frames = F.interpolate(frames, (112, 112), mode="bilinear", align_corners=True)
    x = frames.reshape(x.shape[0], 16, 3, 112, 112).transpose(1, 2)
    x = x + (128 - state["mean"][:, :, 8:120, 8:120])
    pools = {"conv1a": (1, 2, 2)} | dict.fromkeys(("conv2a", "conv3b", "conv4b", "conv5b"), (2, 2, 2))
    for name in ("conv1a", "conv2a", "conv3a", "conv3b", "conv4a", "conv4b", "conv5a", "conv5b"):
        x = F.relu(F.conv3d(x, state[f"{name}.W"], state[f"{name}.b"], padding=1))
        if name in pools:
            x = F.max_pool3d(x, pools[name], ceil_mode=True)
    x = x.flatten(1)
    for name in ("fc6", "fc7"):
        x = F.relu(F.linear(x, state[f"{name}.W"], state[f"{name}.b"]))
    return F.linear(x, state["fc8.W"], state["fc8.b"])


def test_c3d_equals_tgan2s(tmp_path):
    """From the two .npz files; float64, as the mean may be, is read as float32."""
    state = state_for("c3d", "", **SMALL_C3D)
    mean = {"mean": state.pop("mean").astype(np.float64)}
    np.savez(tmp_path / "conv3d_deepnetA_ucf.npz", **state)
    with pytest.raises(ValueError, match=r"lacks: mean; put mean2\.npz, which has the rest, into the same folder$"):
        networks.load("c3d", tmp_path / "conv3d_deepnetA_ucf.npz", **SMALL_C3D)
    np.savez_compressed(tmp_path / "mean2.npz", **mean)
    module = networks.load("c3d", tmp_path / "conv3d_deepnetA_ucf.npz", **SMALL_C3D)
    video = pixels((1, 16, 20, 24, 3))
    close(apply(module, signed(video)), c3d_in_torch(state | {"mean": mean["mean"].astype(np.float32)}, video))
    with pytest.raises(ValueError, match="c3d: a clip has 16 frames, this one 8"):
        jax.eval_shape(apply, module, jax.ShapeDtypeStruct((1, 8, 20, 24, 3), jnp.float32))


# ---- files ---------------------------------------------------------------------------------------------------------


def test_every_network_has_a_manifest():
    assert set(networks.NETWORKS) <= {file.preset for file in manifests.files()}
    assert not set(networks.NETWORKS) & set(teachers.TEACHERS)


@pytest.mark.parametrize("which", FILES)
def test_manifest_counts(which):
    """At full size: the abstract network has the keys and numbers that upstream's file has."""
    file = FILES[which]
    module = abstract(file.preset, **file.settings)
    shapes = mapping.upstream_shapes(module, networks.NETWORKS[file.preset].layouts[file.layout])
    assert len(shapes) == file.keys
    assert sum(np.prod(spec.shape, dtype=int) for spec in shapes.values()) == file.numbers
    assert file.license and file.where and file.source.startswith("https://")
    if file.preset in MINE:
        statistics = ("running_mean", "running_var", "num_batches_tracked", "mean")
        trained = (spec for name, spec in shapes.items() if not name.endswith(statistics))
        assert sum(np.prod(spec.shape, dtype=int) for spec in trained) == file.parameters


def test_inceptions_keys_are_upstreams(monkeypatch):
    """Torch-fidelity's names and shapes, none of them filled."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    monkeypatch.setattr(torch, "load", lambda *_, **__: {})
    monkeypatch.setattr(theirs, "load_state_dict", lambda self, _: None)
    with torch.device("meta"):
        found = theirs("inception", ["2048"], feature_extractor_weights_path="none").state_dict()
    shapes = mapping.upstream_shapes(abstract("inception"), inception.RULES)
    assert {n: tuple(t.shape) for n, t in found.items()} == {n: s.shape for n, s in shapes.items()}


def test_convert_in_and_out(tmp_path, monkeypatch, capsys):
    """A folder of arrays and the way back, by name, through the verb's functions; both files of C3D are in it."""
    entry = networks.NETWORKS["c3d"]
    small = dataclasses.replace(entry, settings=SMALL_C3D)
    monkeypatch.setitem(networks.NETWORKS, "c3d", small)
    state = state_for("c3d", "", **SMALL_C3D)
    np.savez(tmp_path / "conv3d_deepnetA_ucf.npz", **{name: array for name, array in state.items() if name != "mean"})
    np.savez(tmp_path / "mean2.npz", mean=state["mean"])
    folder = convert.to_orbax("c3d", tmp_path / "conv3d_deepnetA_ucf.npz", tmp_path / "folder")
    file = convert.to_torch("c3d", folder, tmp_path / "out")
    found = safetensors_file.open_file(file)
    assert file.name == "c3d.safetensors" and set(found) == set(state)
    assert all(found[name].tobytes() == array.tobytes() for name, array in state.items())
    assert jax.tree.all(jax.tree.map(np.array_equal, networks.load("c3d", folder), networks.load("c3d", file)))
    capsys.readouterr()
    assert all(name in convert.table(manifests.files()) for name in MINE)


def test_errors_name_the_file():
    with pytest.raises(
        FileNotFoundError, match=r"feature network i3d: it was given no weights; it wants i3d_torchscript"
    ):
        networks.load("i3d")
    with pytest.raises(ValueError, match="feature network 'i3' is not known; did you mean 'i3d'"):
        networks.load("i3")
    with pytest.raises(ValueError, match="inception: no setting 'size'; it has none"):
        networks.load("inception", size=3)
    # Every entry's shapes are looked at, which takes its time.
    few = {name: networks.NETWORKS[name] for name in ("c3d", "inception")}
    shapes = mapping.upstream_shapes(abstract("inception"), inception.RULES)
    hollow = {key: np.broadcast_to(np.zeros((), spec.dtype), spec.shape) for key, spec in shapes.items()}
    looks = r"it looks like a file of inception \(100% of that one's keys"
    with mock.patch.dict(networks.NETWORKS, few, clear=True), pytest.raises(ValueError, match=looks):
        networks.load("c3d", hollow)
