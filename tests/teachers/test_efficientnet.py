"""EfficientNet-Lite0 against timm: every stage, the classifier, gradients; and its tokens as a teacher's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import teachers
from jaxalign.interop import mapping
from jaxalign.teachers import efficientnet
from jaxalign.teachers.efficientnet import EfficientNetConfig

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

NAME = "efficientnet_lite0"


@pytest.fixture(scope="module")
def random_weights():
    """Every leaf from one stream, at scales that keep sixteen layers of ReLU6 alive."""
    random = np.random.default_rng(0)
    shapes = mapping.upstream_shapes(teachers.abstract(NAME), efficientnet.RULES)
    state = {}
    for name, spec in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = np.zeros((), np.int64)
        elif name.endswith("running_var"):
            state[name] = random.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        elif len(spec.shape) > 1:
            scale = (2 / np.prod(spec.shape[1:])) ** 0.5
            state[name] = (random.standard_normal(spec.shape) * scale).astype(np.float32)
        else:
            centre = 1.0 if name.endswith("weight") else 0.0
            state[name] = random.normal(centre, 0.2, spec.shape).astype(np.float32)
    return state


def timm_model(state):
    """timm's network: the same layers in the same order under other names."""
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    ordered = sorted(state, key=_upstream_order)
    names = list(model.state_dict())
    assert len(names) == len(ordered) == 296
    model.load_state_dict({n: torch.tensor(state[o]) for n, o in zip(names, ordered, strict=True)}, strict=True)
    return model


def _upstream_order(name):
    """Sorts keys as the network runs, which is how both PyTorch versions register them."""
    top = ("_conv_stem", "_bn0", "_blocks", "_conv_head", "_bn1", "_fc")
    inside = ("_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
    leaves = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    first, *middle, leaf = name.split(".")
    block, layer = (int(middle[0]), inside.index(middle[1])) if middle else (0, 0)
    return top.index(first), block, layer, leaves.index(leaf)


def timm_input(video):
    """The frames as the network sees them: pixels 0..255 minus 127 over 128."""
    frames = np.asarray(video).reshape(-1, *video.shape[2:])
    pixels = (frames + 1) * 127.5
    return torch.from_numpy(np.ascontiguousarray(((pixels - 127) / 128).transpose(0, 3, 1, 2)))


def timm_stages(model, x):
    """Linear outputs at strides 8, 16, 32 (timm's stages 2, 4, 6) and the class scores."""
    x = model.bn1(model.conv_stem(x))
    found = []
    for stage in model.blocks:
        x = stage(x)
        found.append(x)
    return {8: found[2], 16: found[4], 32: found[6]}, model.forward_head(model.bn2(model.conv_head(x)))


apply = jax.jit(lambda teacher, video: teacher(video))
scores = jax.jit(lambda teacher, video: teacher.logits(video))


def close(ours, theirs, tolerance=1e-4):
    theirs = np.asarray(theirs.detach())
    assert np.abs(theirs).max() > 1e-3
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * np.abs(theirs).max()


def video_of(shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@pytest.mark.parametrize("stride", [16, 32])
def test_tokens_equal_timms(random_weights, stride):
    size = 72  # -> 36 -> 18 -> 9 -> 5 -> 3: 'SAME' pads even and odd lengths differently
    video = video_of((1, 2, size, size, 3))
    with torch.no_grad():
        features = timm_stages(timm_model(random_weights), timm_input(video))[0][stride]
    teacher = teachers.load(NAME, random_weights, size=size, stride=stride)
    tokens = apply(teacher, video)
    assert tokens.shape == (1, *teacher.grid((2, size, size)), teacher.width)
    close(tokens[0], features.permute(0, 2, 3, 1))


def test_gradients_equal_timms(random_weights):
    """Through a block with all there is: expansion, kernel 5, stride 2."""
    random = np.random.default_rng(1)
    x = random.standard_normal((2, 9, 10, 24)).astype(np.float32)
    theirs = timm_model(random_weights).blocks[2][0]
    x_torch = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    features = theirs(x_torch).permute(0, 2, 3, 1)
    weight = random.standard_normal(features.shape).astype(np.float32)
    (features * torch.from_numpy(weight)).sum().backward()
    ours = getattr(teachers.load(NAME, random_weights)._blocks, "3")
    by_leaf, by_x = jax.jit(jax.grad(lambda block, x: (block(x) * weight).sum(), argnums=(0, 1)))(ours, x)
    close(by_x, x_torch.grad.permute(0, 2, 3, 1))
    close(by_leaf._expand_conv.kernel[...], theirs.conv_pw.weight.grad.permute(2, 3, 1, 0))
    close(by_leaf._depthwise_conv.kernel[...], theirs.conv_dw.weight.grad.permute(2, 3, 1, 0))
    close(by_leaf._project_conv.kernel[...], theirs.conv_pwl.weight.grad.permute(2, 3, 1, 0))
    for mine, other in ((by_leaf._bn0, theirs.bn1), (by_leaf._bn1, theirs.bn2), (by_leaf._bn2, theirs.bn3)):
        close(mine.scale[...], other.weight.grad)
        close(mine.bias[...], other.bias.grad)


def test_real_weights_name_photographs():
    """ImageNet calls a cat tabby, tiger cat or Egyptian cat, and a cup of espresso espresso or cup."""
    data = pytest.importorskip("skimage.data")
    classes = [{281, 282, 285}, {967, 968}]
    frames = []
    for image in (data.chelsea(), data.coffee()):
        top, left = (image.shape[0] - 300) // 2, (image.shape[1] - 300) // 2
        frames.append(image[top : top + 300, left : left + 300].astype(np.float32) / 127.5 - 1)
    video = np.stack(frames)[:, None]
    teacher = teachers.load(NAME, size=224)
    logits = scores(teacher, video)[:, 0]
    # the same numbers as timm's network with the same weights
    resized = jax.image.resize(video, (2, 1, 224, 224, 3), "cubic")
    model = timm_model(mapping.state_dict(teacher, efficientnet.RULES))
    with torch.no_grad():
        close(logits, timm_stages(model, timm_input(resized))[1])
    # and they mean what ImageNet's indices say, not by a hair
    for probabilities, right in zip(np.asarray(jax.nn.softmax(logits)), classes, strict=True):
        assert int(probabilities.argmax()) in right
        assert sum(probabilities[i] for i in right) > 0.7


# ---- as a teacher ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(random_weights):
    return teachers.load(NAME, random_weights, size=32, stride=8)


def test_frames_and_clips_are_independent(random_weights, small):
    video = video_of((2, 5, 32, 32, 3))
    tokens = apply(small, video)
    assert tokens.shape == (2, 5, 4, 4, 40)
    with torch.no_grad():
        features = timm_stages(timm_model(random_weights), timm_input(video))[0][8]
    close(tokens.reshape(10, 4, 4, 40), features.permute(0, 2, 3, 1))
    assert np.allclose(apply(small, video[::-1, ::-1])[::-1, ::-1], tokens, atol=1e-4)
    changed = video.copy()
    changed[1, 3] *= -1
    moved = np.abs(np.asarray(apply(small, changed) - tokens)).max((2, 3, 4)) > 1e-3
    assert moved.sum() == 1 and moved[1, 3]


def test_frames_at_once_changes_memory_and_nothing_else(random_weights):
    """8 at once are 3 of each of the two clips, the second step filled up; 1 at once is one of each."""
    video = video_of((2, 5, 32, 32, 3))
    found = {}
    for at_once in (8, 1):
        teacher = teachers.load(NAME, random_weights, size=32, stride=8, frames_at_once=at_once)
        compiled = jax.jit(lambda m, v: m(v)).lower(teacher, video).compile()
        found[at_once] = compiled(teacher, video), compiled.memory_analysis().temp_size_in_bytes
    assert np.allclose(found[8][0], found[1][0], atol=1e-4)
    assert found[1][1] < 0.6 * found[8][1]


def test_frames_are_resized(small):
    video = video_of((2, 5, 20, 48, 3))
    resized = jax.image.resize(video, (2, 5, 32, 32, 3), "cubic")
    found, wanted = (apply(small, v) for v in (video, resized))
    assert np.allclose(found, wanted, atol=1e-4)


def test_compute_dtype_is_the_parameters(small):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
    assert jax.eval_shape(apply, half, video_of((1, 1, 32, 32, 3))).dtype == jnp.bfloat16
    x = jnp.asarray(np.random.default_rng(0).uniform(0, 3, (1, 8, 8, 24)), jnp.float32)
    block = jax.jit(lambda teacher, x: getattr(teacher._blocks, "3")(x))
    wanted = block(small, x)
    error, scale = jnp.abs(block(half, x.astype(jnp.bfloat16)) - wanted).max(), jnp.abs(wanted).max()
    assert 0 < error < 0.05 * scale


def test_depthwise_as_slices_is_the_convolution():
    random = np.random.default_rng(0)
    x = jnp.asarray(random.standard_normal((2, 7, 10, 6)), jnp.float32)
    cases = [(random.standard_normal((k, k, 1, 6)).astype(np.float32), s) for k in (3, 5) for s in (1, 2)]

    def three_ways(x, kernel, stride):
        return (
            efficientnet.depthwise(x, kernel, stride),
            efficientnet._depthwise_as_slices(x, kernel, stride),
            efficientnet._convolution(x, kernel, stride, 6),
        )

    results = jax.jit(lambda x: [three_ways(x, jnp.asarray(kernel), stride) for kernel, stride in cases])(x)
    for chosen, slices, wanted in results:
        assert chosen.shape == slices.shape == wanted.shape and np.abs(wanted).max() > 1
        np.testing.assert_allclose(slices, wanted, atol=1e-5)
        np.testing.assert_allclose(chosen, wanted, atol=1e-5)


def test_cpu_program_has_no_grouped_convolution_and_others_do():
    x, kernel = jnp.zeros((1, 8, 8, 4)), jnp.zeros((3, 3, 1, 4))
    traced = jax.jit(lambda x, k: efficientnet.depthwise(x, k, 1)).trace(x, kernel)
    assert "convolution" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("cuda", "tpu"):
        assert "feature_group_count = 4" in traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("stride", "width", "side"), [(8, 40, 32), (16, 112, 16), (32, 320, 8)])
def test_grid_and_width(stride, width, side):
    teacher = teachers.abstract(NAME, stride=stride)
    assert teacher.width == width
    assert teacher.grid((8, 64, 96)) == (8, side, side)


def test_settings_are_checked():
    for settings, message in (
        ({"stride": 4}, "stride must be one of 8, 16, 32, not 4"),
        ({"size": 8}, "size 8 is less than the stride 16"),
        ({"frames_at_once": 0}, "frames_at_once must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            EfficientNetConfig(**settings)
