"""A run's CogVideoX out: the whole folder that diffusers loads, LoRA files, and what is said when that cannot be."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from configs import base
from jaxalign import convert
from jaxalign.interop import diffusers_folder, mapping, safetensors_file
from jaxalign.models import lora
from jaxalign.training import config as config_lib
from jaxalign.training import init_from, setup
from jaxalign.training.checkpoint import Checkpoints

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("sentencepiece")
from tests.tiny_pipeline import LENGTH, SIZE, build  # noqa: E402

ALPHA, RANK = 6.0, 2
VIDEO, TIMES = np.random.default_rng(0).standard_normal((1, 3, 2, 4, 4)).astype(np.float32), np.array([500])
TEXT = np.random.default_rng(1).standard_normal((1, LENGTH, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    _, folder = build(tmp_path_factory.mktemp("tiny"))
    (folder / "LICENSE").write_text("theirs")
    return folder


def workdir(place, published, **lora_settings):
    """(workdir with one checkpoint, run, what was trained): nothing was, but every number is random."""
    config = base.get_config("demo")
    config.update(
        dict(
            model=dict(name="cogvideox", preset="folder"),
            init_from=dict(path=str(published)),
            codec=dict(name="cogvideox_2b", weights=str(published)),
            text=dict(encoder="t5_xxl", tokens=LENGTH),
            objective="v",
            snr_shift=3.0,
            learn_sigma=False,
            data=SIZE,
            lora=lora_settings,
        )
    )
    run = setup.build(config_lib.resolve(config), abstract=True)
    draw = np.random.default_rng(5).standard_normal
    shapes = jax.eval_shape(run.init, jax.random.key(0))["model"]
    trained = jax.tree.map(lambda x: jnp.asarray(0.2 * draw(x.shape), x.dtype), shapes)
    place.mkdir()
    (place / "config.json").write_text(json.dumps(config.to_dict()))
    extra = {"base": init_from.fingerprint(config, run)} if run.task.lora else {}
    with Checkpoints(place / "checkpoints", say=lambda line: None) as checkpoints:
        checkpoints.save(3, {"ema": trained}, extra=extra)
    return place, run, trained


@pytest.fixture(scope="module")
def full(published, tmp_path_factory):
    return workdir(tmp_path_factory.mktemp("runs") / "full", published)


@pytest.fixture(scope="module")
def adapted(published, tmp_path_factory):
    return workdir(tmp_path_factory.mktemp("runs") / "lora", published, rank=RANK, alpha=ALPHA)


def theirs(transformer):
    inputs = (torch.from_numpy(x) for x in (VIDEO.transpose(0, 1, 4, 2, 3).copy(), TEXT, TIMES))
    with torch.no_grad():
        return transformer(*inputs).sample.permute(0, 1, 3, 4, 2).numpy()


def test_the_folder_is_loaded_by_diffusers(full, published, tmp_path):
    place, run, trained = full
    out = convert.student_to_diffusers(place, tmp_path / "out", shard=60_000)
    shards = sorted(path.name for path in (out / "transformer").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"diffusion_pytorch_model-00001-of-{len(shards):05}.safetensors"
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(out)
    wanted = mapping.state_dict(trained, run.student.weight_rules(run.model_config))
    found = pipeline.transformer.state_dict()
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name].numpy(), wanted[name]) for name in wanted)
    ours = np.asarray(jax.jit(lambda model: model(*map(jnp.asarray, (VIDEO, TIMES, TEXT)))[0])(trained))
    assert np.abs(ours).max() > 1e-3
    np.testing.assert_allclose(theirs(pipeline.transformer), ours, atol=1e-4 * np.abs(ours).max())
    before = diffusers.CogVideoXTransformer3DModel.load_config(published / "transformer")
    after = diffusers.CogVideoXTransformer3DModel.load_config(out / "transformer")
    assert {k: v for k, v in before.items() if k != "_name_or_path"} == after

    # All else is theirs, byte for byte, and their own.
    for path in published.rglob("*"):
        inside = path.relative_to(published)
        if path.is_file() and inside.parts[0] != "transformer":
            assert (out / inside).read_bytes() == path.read_bytes() and not (out / inside).is_symlink(), inside
    with pytest.raises(FileExistsError, match="out is there already; give --out another name"):
        convert.student_to_diffusers(place, out)


def test_linked_and_in_half_precision(full, published, tmp_path):
    place, run, trained = full
    out = convert.student_to_diffusers(place, tmp_path / "out", dtype="bf16", link=True)
    assert (out / "vae").is_symlink() and (out / "vae" / "config.json").is_file() and (out / "LICENSE").is_symlink()
    assert not (out / "model_index.json").is_symlink() and not (out / "transformer").is_symlink()
    assert sorted(p.name for p in (out / "transformer").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    arrays = safetensors_file.open_file(out / "transformer" / "diffusion_pytorch_model.safetensors")
    rules = run.student.weight_rules(run.model_config)
    for name, array in mapping.state_dict(trained, rules, dtype=ml_dtypes.bfloat16).items():
        assert arrays[name].dtype == array.dtype and arrays[name].tobytes() == array.tobytes(), name


def test_adapters_as_a_file_and_merged_are_the_same_network(adapted, published, tmp_path):
    pytest.importorskip("peft")
    place, run, adapters = adapted
    file = convert.student_to_lora(place, tmp_path / "lora")
    assert file.name == "pytorch_lora_weights.safetensors"
    merged = convert.student_to_diffusers(place, tmp_path / "merged")
    pipeline = diffusers.CogVideoXPipeline.from_pretrained(published)
    plain = theirs(pipeline.transformer)
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    with_adapters = theirs(pipeline.transformer)
    whole = theirs(diffusers.CogVideoXTransformer3DModel.from_pretrained(merged / "transformer"))
    largest = np.abs(whole).max()
    assert np.abs(whole - plain).max() > 0.05 * largest
    np.testing.assert_allclose(with_adapters, whole, atol=1e-4 * largest)
    config = config_lib.resolve(convert.trained.read_config(place))
    student = init_from.base(config, run.student, run.model_config)
    combined = jax.jit(lambda *a: lora.combine(*a[:2], ALPHA / RANK)(*a[2:])[0])(student, adapters, VIDEO, TIMES, TEXT)
    np.testing.assert_allclose(combined, whole, atol=1e-4 * largest)
    torch_file = safetensors_file.open_file(convert.student_to_torch(place, tmp_path / "torch"))
    shards = safetensors_file.open_file(merged / "transformer" / "diffusion_pytorch_model.safetensors")
    assert all(np.array_equal(torch_file[name], shards[name]) for name in shards)


def test_nothing_half_written_and_what_is_missing_is_said(full, adapted, published, tmp_path, monkeypatch):
    place = full[0]
    with pytest.raises(ValueError, match=r"that run trained the whole student \(lora.rank = 0\)"):
        convert.student_to_lora(place, tmp_path / "x")
    with pytest.raises(FileNotFoundError, match=r"transformer: no model_index.json; give the published folder"):
        convert.student_to_diffusers(place, tmp_path / "x", published=published / "transformer")
    (tmp_path / "partly").mkdir()
    index = (published / "model_index.json").read_text()
    (tmp_path / "partly" / "model_index.json").write_text(index)
    with pytest.raises(FileNotFoundError, match="names scheduler, text_encoder, tokenizer, vae, which is not there"):
        diffusers_folder.check(tmp_path / "partly", "transformer", "CogVideoXTransformer3DModel")
    (tmp_path / "partly" / "model_index.json").write_text(index.replace("CogVideoX", "LTX"))
    with pytest.raises(
        ValueError, match=r"a LTXPipeline whose transformer is .*'LTXTransformer3DModel'.*, not a CogVide"
    ):
        diffusers_folder.check(tmp_path / "partly", "transformer", "CogVideoXTransformer3DModel")

    def stops(*arguments, **settings):
        raise OSError("no space left on the disk")

    monkeypatch.setattr(diffusers_folder.shutil, "copytree", stops)
    with pytest.raises(OSError, match="no space left"):
        convert.student_to_diffusers(place, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["partly"]


def test_other_parts_that_contradict_the_training_are_refused(full, published, tmp_path):
    """What diffusers would sample otherwise, and silently; a run that starts there is told of it."""
    place, run, _ = full

    def changed(name, **fields):
        """The run, had its config been another one."""
        other = tmp_path / name
        other.mkdir()
        (other / "checkpoints").symlink_to(place / "checkpoints")
        config = json.loads((place / "config.json").read_text()) | fields
        (other / "config.json").write_text(json.dumps(config))
        return other

    for name, fields, differ, remedy in (
        ("shift", dict(snr_shift=1.0), "snr_shift = 3.0 (the run's is 1.0)", "write --published FOLDER, a copy of it"),
        ("flow", dict(objective="flow"), "objective = 'v' (the run's is 'flow')", "no folder .*; write --to torch"),
    ):
        other = changed(name, **fields)
        with pytest.raises(ValueError, match=rf"its scheduler/ says {re.escape(differ)}: {remedy}"):
            convert.student_to_diffusers(other, tmp_path / "x")
        config = config_lib.resolve(convert.trained.read_config(other))
        state, said = SimpleNamespace(trainable={"model": None}), []
        asked = setup.build(config, abstract=True)
        asked = dataclasses.replace(asked, task=dataclasses.replace(asked.task, lora=lora.LoRA(2, 2.0, "attn")))
        assert init_from.begin(config, asked, state, say=said.append) is state
        assert said == [f"note: by its scheduler/, {published} was trained with {differ}"]
    config = config_lib.resolve(convert.trained.read_config(place))
    assert init_from.note(config, run) == ""

    def taken(place, given=None):
        return convert._published(convert._open_saved(place, "ema"), given)

    wide = tmp_path / "wide"
    shutil.copytree(published, wide)
    about = json.loads((wide / "vae" / "config.json").read_text())
    for field, value, said in (
        ("latent_channels", 8, r"latent_channels = 8 (the run's is 4)"),
        ("scaling_factor", 1.15258426, "scale = 1.15258426 (the run's is 0.7)"),
    ):
        (wide / "vae" / "config.json").write_text(json.dumps(about | {field: value}))
        with pytest.raises(ValueError, match=rf"wide: its vae/ says {re.escape(said)}: write --published FOLDER with"):
            convert.student_to_diffusers(place, tmp_path / "x", published=wide)
    assert not (tmp_path / "x").exists()

    # Of the folders that a run names the one is taken that has what it was trained with.
    config = json.loads((place / "config.json").read_text())
    start, only = config["init_from"] | dict(path=str(wide)), config["codec"] | dict(weights=str(published / "vae"))
    text = config["text"] | dict(weights=str(published))
    for name, fields in dict(
        other_start=dict(init_from=start), part=dict(init_from=start, codec=only, text=text)
    ).items():
        assert taken(changed(name, **fields)) == published

    # How it is tiled, and how config.json is written, change no latent; other numbers do.
    (wide / "vae" / "config.json").write_text(json.dumps(about | dict(sample_height=64, sample_width=64)))
    assert taken(place, wide) == wide
    (weights,) = (wide / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(
        ValueError, match=r"wide: its vae/ has other weights \(.* than the run's codec.weights = /.*with"
    ):
        taken(place, wide)
