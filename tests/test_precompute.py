"""Clips computed once: what is in the folder, that training from it is training, and what is said when it cannot be."""

import dataclasses
import json
import os
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

from configs import base
from jaxalign import evaluate, precompute, teachers
from jaxalign.codecs import kl
from jaxalign.data import pipeline, precomputed, readers, synthetic
from jaxalign.data.clips import Clip, Item, Source, load, thumbnails, windows
from jaxalign.data.video import UnreadableVideo
from jaxalign.interop import mapping, safetensors_file
from jaxalign.models.layers import Linear
from jaxalign.training import config as config_lib
from jaxalign.training import loop, prepare, prompts
from jaxalign.training.data_settings import clip_settings, task_parts
from jaxalign.training.makers import Options

SIZE = dict(num_frames=2, height=16, width=16, stride=1)
QUIET = dict(say=lambda line: None)


def config_of(**changes):
    config = base.get_config("demo")
    for layer in (dict(data=SIZE, batch_size=2, teacher=dict(size=32, stride=8)), changes):
        config.update(layer)
    return config_lib.resolve(config)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- pixels out of videos: nothing is compiled


class Videos:
    """Four videos of noise; `fail` says at which call of read, of which of them, or from which of them on it fails."""

    def __init__(self, **fail):
        self.calls, self.fail, self.lost = 0, fail, False
        self.frames = [np.random.default_rng(k).integers(0, 256, (60, 16, 24, 3), np.uint8) for k in range(4)]

    def read(self, item, start, stop, step, cover):
        self.calls += 1
        if self.calls == self.fail.get("at"):
            raise KeyboardInterrupt
        self.lost |= item == self.fail.get("lost_at")
        if self.lost or (item in self.fail.get("items", ()) and start < self.fail.get("before", 60)):
            raise UnreadableVideo(f"{item}.mp4", "truncated")
        video = self.frames[item][start:stop]
        return video[::step], thumbnails(video)

    def source(self):
        items = tuple(Item(f"{k}.mp4", 60, 6.0, k % 2, "both") for k in range(4))
        return Source("videos", items, ("even", "odd"), read=self.read)


@pytest.fixture
def videos(monkeypatch):
    """videos(**fail) puts such a source behind every config that names 'videos'."""
    open_source = prompts.open_source

    def put(**fail):
        source = Videos(**fail).source()
        monkeypatch.setattr(prompts, "open_source", lambda spec, **_: source if spec == "videos" else open_source(spec))
        return source

    return put


PIXELS = dict(data=dict(source="videos", hflip=True))
SMALL = Options(what=("latents",), variants=3, held_out=5, shard_mb=0.02, threads=1)


def make(folder, options=SMALL, **changes):
    return precompute.precompute(config_of(**PIXELS | changes), folder, options, **QUIET)


@pytest.fixture
def made(videos, tmp_path):
    source = videos()
    assert make(tmp_path / "made") == {"clips": 4 * 3 * 2 + 5, "bad": 0, "missing": 0}
    return source, tmp_path / "made"


def test_a_clip_is_drawn_by_seed_and_place_like_a_decoded_one(made):
    source, folder = made
    config = config_of(data=dict(source=str(folder), hflip=True))
    stored = prompts.open_told(config)
    clip = clip_settings(config)
    online = pipeline.batches(source, seed=7, batch_size=2, hflip=True, **clip)
    data = pipeline.batches(stored, seed=7, batch_size=2, hflip=True, **clip)
    found = windows(source, "train", Clip(**clip))
    seen = set()
    for step in range(12):
        there, here = online[step], data[step]
        np.testing.assert_array_equal(there["index"], here["index"])
        np.testing.assert_array_equal(there["label"], here["label"])
        for row in range(2):
            offset, flip = np.random.default_rng((7, 1, 2 * step + row)).random(4)[:2]
            variant = int(offset * 3)
            window = found[here["index"][row]]
            wanted = load(source, window, Clip(**clip), np.random.default_rng(0), (variant + 0.5) / 3)["video"]
            np.testing.assert_array_equal(here["video"][row], wanted[:, :, ::-1] if flip < 0.5 else wanted)
            seen.add((variant, bool(flip < 0.5)))
    assert len(seen) == 6
    for name, value in pipeline.held_out(source, 5, **clip).items():
        if name not in ("index", "item"):
            np.testing.assert_array_equal(value, pipeline.held_out(stored, 5, **clip)[name], err_msg=name)
    assert stored.classes == ("even", "odd")
    parts = [pipeline.batches(stored, seed=7, batch_size=2, process_index=p, process_count=2, **clip) for p in (0, 1)]
    whole = pipeline.batches(stored, seed=7, batch_size=2, **clip)
    np.testing.assert_array_equal(np.concatenate([part[3]["video"] for part in parts]), whole[3]["video"])


def test_killed_and_restarted_or_shared_gives_the_same_files(made, videos, tmp_path):
    _, folder = made
    whole = files(folder)
    assert sum(name.endswith(".array_record") for name in whole) > 3
    videos(at=5)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "killed")
    left = files(tmp_path / "killed")
    assert 0 < len(left) < len(whole) and not any("unfinished" in name for name in left)
    half = next(name for name in whole if name.endswith("array_record") and name not in left)
    (tmp_path / "killed" / f"{half}.unfinished").write_bytes(whole[half][:1000])  # of a kill -9
    (tmp_path / "killed" / f"{half}.json").write_bytes(whole[f"{half}.json"])
    videos()
    make(tmp_path / "killed")
    assert files(tmp_path / "killed") == whole
    first = make(tmp_path / "shared", dataclasses.replace(SMALL, share=(1, 2)))
    with pytest.raises(ValueError, match=r"shards are not there yet.*precompute` again; it goes on|it goes on"):
        prompts.open_told(config_of(data=dict(source=str(tmp_path / "shared"))))
    second = make(tmp_path / "shared", dataclasses.replace(SMALL, share=(0, 2)))
    assert first["missing"] and not second["missing"] and files(tmp_path / "shared") == whole
    make(tmp_path / "ranges", dataclasses.replace(SMALL, shard_range=(0, 2)))
    assert not make(tmp_path / "ranges", dataclasses.replace(SMALL, shard_range=(2, 99)))["missing"]
    assert files(tmp_path / "ranges") == whole


def test_what_does_not_fit_is_said_in_one_line(made, videos, tmp_path):
    _, folder = made
    for changes, said in (
        (dict(data=dict(height=32)), "data.height: 16 there, 32 here"),
        (dict(data=dict(stride=2, num_frames=3)), "data.num_frames: 2 there, 3 here; data.stride: 1 there, 2 here"),
        (dict(align=dict(method="tsa", weight=1.0)), "is asked while training: the folder has no tokens of it"),
    ):
        config = config_of(data=dict(source=str(folder)))
        config.update(changes)
        if "asked" in said:
            assert any(said in note for note in prompts.open_told(config).notes)
            continue
        with pytest.raises(ValueError, match=said) as caught:
            prompts.open_told(config)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"was made for other clips \(data.width: 16 there, 24 here\)"):
        make(folder, data=dict(source="videos", width=24))
    with pytest.raises(ValueError, match="variants: 3 there, 1 here"):
        make(folder, dataclasses.replace(SMALL, variants=1))
    with pytest.raises(FileExistsError, match="holds something else"):
        make(tmp_path)
    with pytest.raises(ValueError, match="is precomputed already"):
        make(tmp_path / "x", data=dict(source=str(folder)))
    with pytest.raises(ValueError, match="no 'latnets'; did you mean 'latents'"):
        Options(what=("latnets",))
    with pytest.raises(ValueError, match="flow_network=dinov2_s: write one of raft_"):
        make(tmp_path / "x", Options(what=("flow",), flow_network="dinov2_s"))
    with pytest.raises(ValueError, match="must be at least 1"):
        Options(variants=0)
    with pytest.raises(ValueError, match="has one clip only"):
        make(tmp_path / "x", data=dict(source="synthetic"))
    # A run without mirror images may use a folder that has them, not the other way round.
    prompts.open_told(config_of(data=dict(source=str(folder), hflip=False)))
    make(tmp_path / "unflipped", data=dict(source="videos", hflip=False))
    with pytest.raises(ValueError, match=r"data.hflip: False there, True here"):
        prompts.open_told(config_of(data=dict(source=str(tmp_path / "unflipped"), hflip=True)))


def test_damage_and_bad_videos(made, videos, tmp_path, monkeypatch, capsys):
    _, folder = made
    config = config_of(data=dict(source=str(folder)))
    data = pipeline.batches(prompts.open_told(config), seed=0, batch_size=2, **clip_settings(config))
    start = data[0]["video"][0].tobytes()[:32]
    shards = [path for path in sorted(folder.glob("*.array_record")) if "train" in path.name]
    hit = next(path for path in shards if start in path.read_bytes())
    whole = bytearray(hit.read_bytes())
    whole[whole.index(start)] ^= 1
    hit.write_bytes(whole)
    readers.reader.cache_clear()
    assert data[0]["substituted"].tolist() == [True, False]  # another clip stands in, and somebody is told
    assert re.search(r"train-0000\d-of-\d+.array_record: damaged .* remove this file.*\n$", capsys.readouterr().err)
    shards[0].write_bytes(shards[0].read_bytes()[:70000])
    with pytest.raises(ValueError, match=r"00000-of.*: damaged; run the same .* again"):
        prompts.open_told(config)
    make(folder)  # makes the short one anew
    assert precomputed.is_whole(shards[0])

    videos(items=[2])
    assert make(tmp_path / "bad")["bad"] == 1
    stored = prompts.open_told(config_of(data=dict(source=str(tmp_path / "bad"))))
    assert stored.skipped == (("2.mp4", "truncated"),)
    assert len(windows(stored, "train", Clip(**SIZE))) == 3

    writer = precomputed.ArrayRecordWriter
    monkeypatch.setattr(
        precomputed, "ArrayRecordWriter", lambda path, how: (writer(path, how), writer("/dev/full", how))[1]
    )
    videos()
    with pytest.raises(OSError, match=r"cannot be written \(the disk is full\); once mended, run the same"):
        make(tmp_path / "full")
    assert not [name for name in files(tmp_path / "full") if "array_record" in name]


# ---- everything at once, against computing it in the step

TOLD = dict(
    data=dict(source="synthetic"),
    objective="v",
    learn_sigma=False,
    model=dict(name="cogvideox", patch_size=2),
    text=dict(dropout=0.5, tokens=8),
    align=dict(method="m_tsa", weight=0.5, depth=0, projector=dict(hidden=16)),
    sample=dict(prompts=("a red disc",)),
)


SAID = []  # (line, files in the folder then), of the folder below


@dataclasses.dataclass(frozen=True)
class TinyConfig:
    size: int = 32
    stride: int = 8


class Tiny(nnx.Module):
    """A teacher of one matrix: tokens of stride x stride pixels."""

    width = 6

    def __init__(self, config=TinyConfig(), *, rngs):
        self.config = config
        self.proj = Linear(3 * config.stride**2, self.width, rngs=rngs)

    def grid(self, video):
        return (video[0], *[self.config.size // self.config.stride] * 2)

    def __call__(self, video):
        side = self.config.size
        x = jax.image.resize(video, (*video.shape[:2], side, side, 3), "linear")
        return self.proj(
            rearrange(x, "b t (h p) (w q) c -> b t h w (p q c)", p=self.config.stride, q=self.config.stride)
        )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The config section of such a teacher, with its weights in a file."""
    path = tmp_path_factory.mktemp("teacher") / "tiny.safetensors"
    safetensors_file.write(path, mapping.state_dict(Tiny(rngs=nnx.Rngs(1))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(teachers.TEACHERS, "tiny", teachers.Entry(Tiny, TinyConfig, {"": ()}, {}))
        yield dict(name="tiny", weights=str(path))


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """A published folder of a small autoencoder with a wide posterior."""
    folder = tmp_path_factory.mktemp("codec") / "vae"
    folder.mkdir()
    sizes = kl.KLConfig(widths=(4, 4), latent_channels=2, blocks=1, groups=2)
    module = drawn(jax.eval_shape(lambda: kl.KL(sizes, rngs=nnx.Rngs(0))), 0.3)
    safetensors_file.write(folder / "diffusion_pytorch_model.safetensors", mapping.state_dict(module, kl.RULES["to_q"]))
    about = dict(block_out_channels=[4, 4], latent_channels=2, layers_per_block=1, norm_num_groups=2)
    (folder / "config.json").write_text(json.dumps(about | {"_class_name": "AutoencoderKL", "scaling_factor": 0.5}))
    return dict(name="sd_kl", weights=str(folder.parent))


@pytest.fixture(scope="module")
def both(codec, teacher, tmp_path_factory):
    """(the config, its folder)."""
    folder = tmp_path_factory.mktemp("precomputed") / "told"
    config = config_of(**TOLD, codec=codec, teacher=teacher)
    SAID.clear()
    open_source = prompts.open_source
    with pytest.MonkeyPatch.context() as patch:
        few = synthetic.synthetic(train=5, held_out=2)
        patch.setattr(prompts, "open_source", lambda spec, **_: few if spec == "synthetic" else open_source(spec))
        options = Options(held_out=2, shard_mb=0.1, at_once=2)
        precompute.precompute(config, folder, options, lambda line: SAID.append((line, os.listdir(folder))))
        yield config, folder


def from_folder(config, folder, **changes):
    config = ml_collections.ConfigDict(config.to_dict())
    config.data.source = str(folder)
    config.update(changes)
    return config


def drawn(tree, size=0.1):
    """NumPy leaves for a tree of shapes: nothing is compiled."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (size * rng.standard_normal(x.shape)).astype(x.dtype), tree)


def test_a_class_conditional_run_takes_labels_and_latents(codec, videos, tmp_path):
    source = videos()
    changes = dict(codec=codec, model=dict(num_classes=-1, patch_size=2), objective="ddpm")
    decoded = config_of(**changes, data=dict(source="videos", hflip=True))
    options = Options(what=("latents",), held_out=2, threads=1, at_once=4)
    precompute.precompute(decoded, tmp_path / "latents", options, **QUIET)
    config = config_of(**changes, data=dict(source=str(tmp_path / "latents"), hflip=True))
    ready = prepare.prepare(config)
    assert ready.run.task.num_classes == 2 and ready.source.classes == ("even", "odd")
    clip = clip_settings(config)
    batch = pipeline.batches(ready.source, seed=0, batch_size=2, hflip=True, **clip)[1]
    online = pipeline.batches(source, seed=0, batch_size=2, hflip=True, **clip)[1]
    np.testing.assert_array_equal(batch["label"], online["label"])
    assert set(batch) & {"video", "moments"} == {"moments"}
    trainable, state = ready.abstract.trainable, jax.random.key(0)
    loss, _ = jax.eval_shape(ready.run.task.loss, trainable, ready.run.frozen, task_parts(batch), state, 0, {})
    assert loss.shape == ()
    other = config_of(**changes, data=dict(source=str(tmp_path / "latents"), split=2))
    with pytest.raises(ValueError, match=r"data.split: None there, 2 here"):
        prompts.open_told(other)


def both_ways(configs, wrap):
    """(batch, run, wrap(the task's loss) at the same parameters and key) of each config, at the second batch."""
    for config in configs:
        source, run, *_ = prepare.prepare(config)
        data = pipeline.batches(source, seed=0, batch_size=2, hflip=True, **clip_settings(config))
        batch, trainable = task_parts(data[1]), drawn(jax.eval_shape(run.init, jax.random.key(0)))
        yield batch, run, jax.jit(wrap(run.task.loss))(trainable, run.frozen, batch, jax.random.key(3), 0, {})


def test_a_step_from_the_folder_is_the_step_that_computes(both):
    config, folder = both
    configs = config, from_folder(config, folder)
    (_, _, online), (batch, run, stored) = both_ways(configs, lambda loss: loss)
    assert set(batch) == {"label", "moments", "prompt", "teacher/tiny", "saliency/2x4x4"}
    assert run.frozen["teachers"] == {} and "text" not in run.frozen
    assert float(online[0]) == pytest.approx(float(stored[0]), rel=1e-5)
    assert set(online[1]) == {"denoising", "align/m_tsa", "align/m_tsa_weight"}
    for name, value in online[1].items():
        assert float(stored[1][name]) == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.slow
def test_gradients_and_a_whole_run_from_the_folder(both, tmp_path, capsys):
    config, folder = both
    stored = from_folder(config, folder, steps=2, sample=dict(steps=1, count=1), log_every=1)
    (_, _, one), (_, _, two) = both_ways((config, stored), lambda loss: jax.grad(loss, has_aux=True))
    for a, b in zip(*(jax.tree.leaves(grads) for grads, _ in (one, two)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(a).max()))
        assert float(jnp.abs(a).max()) > 0
    assert loop.dry_run(stored) == 0
    assert loop.train(stored, tmp_path / "run") == 0
    assert "precomputed from synthetic: one clip a window; latents" in capsys.readouterr().out
    (row,) = evaluate.loss([tmp_path / "run"], clips=2, times=3)
    assert np.isfinite(row["denoising"]) and np.isfinite(row["m_tsa"])


def test_the_size_is_said_before_anything_is_written(both):
    (first, _), (size, there), *_ = SAID
    assert re.fullmatch(r"5 clips and 2 held out, 2 different captions: latents, .*, shown, prompts", first)
    assert " GB in " in size and there and not any("array_record" in name for name in there)


def test_a_run_from_the_folder_is_sampled_with_its_captions(both):
    config, folder = both
    unsaid = {"sample": {"prompts": ()}}
    online = ml_collections.ConfigDict(config.to_dict())
    online.update(unsaid)
    found = prompts.of_run(from_folder(config, folder, **unsaid))
    assert found == prompts.of_run(online) and len(found) == 2


def test_what_is_missing_or_other_is_named(both, tmp_path):
    config, folder = both
    for changes, said in (
        (dict(codec=dict(precision="bf16")), r"its latents .*codec.precision: 'fp32' there, 'bf16' here"),
        (dict(text=dict(tokens=9)), "its prompts .*text.tokens: 8 there, 9 here"),
        (dict(teacher=dict(size=40, stride=10)), "of tiny are of other settings .*size: 32 there, 40 here"),
        (dict(sample=dict(prompts=("a red disc", "a cat"))), "'a cat' is not among the prompts .* --what=text"),
    ):
        with pytest.raises(ValueError, match=said) as caught:
            prompts.open_told(from_folder(config, folder, **changes))
        assert "\n" not in str(caught.value)
    # A teacher that is not asked need not be here; if it is, it must be the same.
    notes = prompts.open_told(from_folder(config, folder, teacher=dict(weights="/nowhere"))).notes
    assert any("tiny is not loaded; its tokens are of weights of " in note for note in notes)
    other = tmp_path / "other.safetensors"
    safetensors_file.write(other, drawn(mapping.state_dict(Tiny(rngs=nnx.Rngs(2)))))
    with pytest.raises(ValueError, match=r"teacher.weights: '[\d,]+ bytes, \w+' there, '[\d,]+ bytes, \w+' here"):
        prompts.open_told(from_folder(config, folder, teacher=dict(weights=str(other))))
    only = tmp_path / "only"
    precompute.precompute(config, only, Options(what=("latents",), held_out=2, clips=2), **QUIET)
    with pytest.raises(ValueError, match=r"no tokens of teacher tiny; .* --what=teachers"):
        prompts.open_told(from_folder(config, only))
    with pytest.raises(ValueError, match=r"has no prompts; .* --what=text"):
        prompts.open_told(from_folder(config, only, align=dict(method="none")))
