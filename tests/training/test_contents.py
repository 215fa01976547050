"""What a precomputed folder says of its tokens, and when a run may take them; nothing is computed here."""

import json

import jax
import numpy as np
import pytest

from configs import base
from jaxalign import teachers
from jaxalign.data import precomputed
from jaxalign.data.precomputed import Clips, Series
from jaxalign.interop import safetensors_file
from jaxalign.teachers import dinov2, motion_head
from jaxalign.training import config as config_lib
from jaxalign.training import contents, setup

NAME, WIDTH, HEAD = "dinov2_s", 32, 5  # channels of its tokens, of the subspace behind them
SIZES = dict(width=WIDTH, depth=2, num_heads=2, position_grid=4, size=56)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    entry = teachers.Entry(dinov2.DINOv2, dinov2.DINOv2Config, {"": dinov2.RULES}, SIZES)
    monkeypatch.setitem(teachers.TEACHERS, NAME, entry)


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    """The config section of a small autoencoder; of its folder only the sizes are read."""
    folder = tmp_path_factory.mktemp("codec") / "vae"
    folder.mkdir()
    about = dict(block_out_channels=[4, 4], latent_channels=2, layers_per_block=1, norm_num_groups=2)
    safetensors_file.write(folder / "diffusion_pytorch_model.safetensors", {"unread": np.zeros(1, np.float32)})
    (folder / "config.json").write_text(json.dumps(about | {"_class_name": "AutoencoderKL", "scaling_factor": 0.5}))
    return dict(name="sd_kl", weights=str(folder.parent))


def config_of(codec, **teacher):
    config = base.get_config("demo", codec=codec, model=dict(patch_size=2), align=dict(method="trd", weight=0.5))
    config.update(dict(data=dict(num_frames=2, height=16, width=16), teacher=dict(name=NAME) | teacher))
    return config_lib.resolve(config)


def head(folder, seed):
    """A motion head of that teacher."""
    rng = np.random.default_rng(seed)
    projection = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), motion_head.fresh(WIDTH, 4, HEAD))
    return str(motion_head.save(folder, projection, name=NAME, teacher=teachers.abstract(NAME)))


def write(folder, series):
    """The series of one clip a split."""
    precomputed.claim_series(folder, series)
    for split in series.counts:
        with precomputed.new_shard(folder.path / series.shards(split)[0]) as (put, listing):
            put(np.zeros(series.shape, series.dtype).tobytes())
            listing.update(units=[["clip", 0, -1]], bad=[])


@pytest.fixture
def folder_of(codec, tmp_path):
    """folder_of(config, width): the folder that precompute makes of it, with numbers that are all zero."""

    def make(config, width, **changed):
        clips = Clips(contents.of_clips(config), {"train": 1, "held_out": 1})
        folder = precomputed.claim(tmp_path / f"folder{len(list(tmp_path.iterdir()))}", clips)
        (fields,) = contents.of_teachers(config, setup.build(config, abstract=True)).values()
        fields = {k: v for k, v in (fields | changed).items() if v is not ...}
        counts = {"train": 1, "held_out": 1}
        write(folder, Series("latents", contents.of_latents(config), "float32", (2, 8, 8, 4), counts, 1))
        name = contents.series_of_teacher(fields)
        write(folder, Series(name, fields, "float32", (2, 4, 4, width), counts, 1))
        return folder.path

    return make


def test_tokens_of_another_motion_head_are_refused(codec, folder_of, tmp_path):
    raw = config_of(codec)
    a, b = (config_of(codec, motion_head=head(tmp_path / name, seed)) for seed, name in enumerate("ab"))
    folders = {"raw": folder_of(raw, WIDTH), "a": folder_of(a, HEAD)}
    assert f"teacher/{NAME}" in contents.bind(raw, folders["raw"]).given
    assert f"teacher/{NAME}_motion" in contents.bind(a, folders["a"]).given
    digest = r"'[\d,]+ bytes, \w+'"
    for config, name, said in (
        (a, "raw", rf"channels: 32 there, 5 here; teacher.motion_head: None there, {digest} here"),
        (raw, "a", rf"teacher.motion_head: {digest} there, None here; channels: 5 there, 32 here"),
        (b, "a", rf"teacher.motion_head: {digest} there, {digest} here\)"),
        (
            config_of(codec, motion_head=""),
            "raw",
            r"channels: 32 there, 64 here; teacher.motion_head: None there, '' here",
        ),
    ):
        with pytest.raises(ValueError, match=rf"of other settings \({said}.*--what=teachers") as error:
            contents.bind(config, folders[name])
        assert "\n" not in str(error.value)
    # The same folder with a head that was trained again; then as it was.
    kept = (tmp_path / "a" / motion_head.WEIGHTS).read_bytes()
    head(tmp_path / "a", 7)
    with pytest.raises(ValueError, match=rf"motion_head: {digest} there, {digest} here"):
        contents.bind(a, folders["a"])
    (tmp_path / "a" / motion_head.WEIGHTS).write_bytes(kept)
    contents.bind(a, folders["a"])


def test_folders_of_before_motion_heads_were_written_down(codec, folder_of, tmp_path):
    """Tokens of the teacher's own width are taken as ever; those of another width may be of any head."""
    raw, headed = config_of(codec), config_of(codec, motion_head=head(tmp_path / "a", 0))
    old = folder_of(headed, HEAD, **{"teacher.motion_head": ...})
    for config in (raw, headed):
        with pytest.raises(ValueError, match=r"channels: 5 there, 32 here|motion_head: None there, '"):
            contents.bind(config, old)
    run = setup.build(raw, abstract=True)
    (fields,) = contents.of_teachers(raw, run).values()
    assert "teacher.motion_head" not in fields  # so the name of the series is what it was


def test_a_classifier_makes_no_token(codec, folder_of):
    """What a converted folder keeps for the export is no other teacher."""
    config = config_of(codec)
    contents.bind(config, folder_of(config, WIDTH, **{"teacher.num_classes": 710}))


def test_the_shards_of_an_index_are_part_of_the_weights(tmp_path):
    names = [f"model-{k}.safetensors" for k in (1, 2)]
    for k, name in enumerate(names):
        safetensors_file.write(tmp_path / name, {f"w{k}": np.zeros(4, np.float32)})
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"w{k}": name for k, name in enumerate(names)}}))
    before = contents.weights_identity(index)
    safetensors_file.write(tmp_path / names[1], {"w1": np.ones(4, np.float32)})
    assert contents.weights_identity(index) != before
