"""From diffusers and back: its CogVideoX trained here, whole or by adapters, resumed, sampled and loaded by it."""

import json
import os
import signal

import jax
import numpy as np
import pytest

from configs import base
from jaxalign import convert, sample
from jaxalign.data.pipeline import Batches
from jaxalign.interop import mapping, safetensors_file
from jaxalign.training import config as config_lib
from jaxalign.training import loop, prompted, restore, trained
from jaxalign.training.mesh import named_leaves
from jaxalign.training.tensorboard import read_scalars

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("sentencepiece")
from tests.tiny_pipeline import LENGTH, SIZE, build  # noqa: E402

PROMPTS, DRAWING = ["a rabbit runs", "cat"], dict(steps=3, guidance_scale=3.0)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return build(tmp_path_factory.mktemp("tiny"))[1]


def config(published, **changes):
    """M-TSA upon the published folder; student and teacher meet on nine frames of two tokens."""
    found = base.get_config("demo")
    layers = dict(
        steps=20,
        batch_size=1,
        model=dict(name="cogvideox", preset="folder"),
        init_from=dict(path=str(published)),
        codec=dict(name="cogvideox_2b", weights=str(published)),
        text=dict(encoder="t5_xxl", tokens=LENGTH, dropout=0.2),
        objective="v",
        snr_shift=3.0,
        teacher=dict(size=(8, 16), stride=8),
        align=dict(method="m_tsa", weight=0.5, depth=1, projector=dict(hidden=16, time_scale=3)),
        data=SIZE,
        optimizer=dict(warmup_steps=0),
        ema_decay=0.9,
        log_every=1,
        sample_every=100,
        sample=dict(count=1, **DRAWING),
    )
    for layer in (layers, changes):
        found.update(layer)
    return config_lib.resolve(found)


def stop_at(step, monkeypatch):
    """SIGTERM comes while step `step` of the next run is prepared."""
    calls, names = iter(range(1, 1000)), Batches.names

    def counted(self, index):  # called once a step
        if next(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return names(self, index)

    monkeypatch.setattr(Batches, "names", counted)


def our_videos(workdir, out, monkeypatch):
    """[b, t, h, w, 3] in [-1, 1], as `draw_prompts` writes them, and the files."""
    found, written = [], prompted.to_uint8
    subject = prompted.of_run(workdir)
    with monkeypatch.context() as patch:
        patch.setattr(prompted, "to_uint8", lambda x: found.append(np.asarray(x)) or written(x))
        files = sample.draw_prompts(subject, PROMPTS, out, at_once=2, **DRAWING)
    assert all(file.stat().st_size > 100 for file in files)
    noise = np.stack([prompted.initial_noise(0, subject.latent_shape)] * len(PROMPTS))
    return np.stack(found), noise


def their_videos(pipeline, noise):
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=DRAWING["steps"], guidance_scale=DRAWING["guidance_scale"])
    latents = torch.from_numpy(noise).permute(0, 1, 4, 2, 3).contiguous()
    frames = pipeline(PROMPTS, **SIZE, latents=latents, max_sequence_length=LENGTH, output_type="pt", **options).frames
    return frames.permute(0, 1, 3, 4, 2).numpy() * 2 - 1


def assert_same_videos(pipeline, ours, noise, published):
    """Of the pipeline and ours: two different videos, and not those of the folder that was trained from."""
    np.testing.assert_allclose(their_videos(pipeline, noise), ours, atol=1e-3)
    before = diffusers.CogVideoXPipeline.from_pretrained(published)
    assert np.abs(ours).max() > 0.3 and np.abs(ours[0] - ours[1]).max() > 0.02
    assert np.abs(their_videos(before, noise) - ours).max() > 0.02
    return before


def test_trained_resumed_sampled_exported_and_loaded_by_diffusers(published, tmp_path, monkeypatch, capsys):
    told, workdir = config(published), tmp_path / "run"
    # The gradients' cosine is two more backward passes to compile; tests/training/test_loop.py has runs with it.
    monkeypatch.setattr(loop, "make_gradient_cosine", lambda *losses, **settings: lambda *batch: {})
    with monkeypatch.context() as patch:
        stop_at(10, patch)
        assert loop.train(told, workdir) == 128 + signal.SIGTERM
    assert loop.train(told, workdir) == 0
    said = capsys.readouterr().out
    assert f"starting from {published}" in said and "stopped by SIGTERM at step 10, saved" in said
    assert "resumed at step 10 of 20" in said and f"3 of 3 captions are longer than {LENGTH} tokens and are cut" in said

    # Every step of both halves, the alignment in each of them, and nothing but numbers.
    rows = [row for row in read_scalars(workdir / "tensorboard") if "train/loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 21))
    for row in rows:
        total = row["train/denoising"] + row["train/align/m_tsa_weight"] * row["train/align/m_tsa"]
        assert row["train/align/m_tsa"] > 0 and row["train/align/m_tsa_weight"] == 0.5
        assert np.isfinite(total) and row["train/loss"] == pytest.approx(total, 1e-5)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["step"] == summary["last_checkpoint"] == 20 and summary["cut_prompts"] == 3
    assert np.isfinite(summary["held_out"]["m_tsa"]) and np.isfinite(summary["held_out"]["denoising"])
    assert (workdir / "samples" / "step_000020.mp4").stat().st_size > 100
    assert (workdir / "figures" / "correspondence_000020.png").stat().st_size > 1000

    ours, noise = our_videos(workdir, tmp_path / "videos", monkeypatch)
    exported = diffusers.CogVideoXPipeline.from_pretrained(convert.student_to_diffusers(workdir, tmp_path / "exported"))
    before = assert_same_videos(exported, ours, noise, published)
    now = exported.transformer.state_dict()
    unmoved = [name for name, value in before.transformer.state_dict().items() if torch.equal(now[name], value)]
    assert unmoved == [] and len(now) > 30


def test_adapters_trained_sampled_written_and_loaded_by_diffusers(published, tmp_path, monkeypatch):
    pytest.importorskip("peft")
    rank, workdir = 2, tmp_path / "adapted"
    changes = dict(align=dict(method="none"), optimizer=dict(learning_rate=0.05), ema_decay=0.0)
    told = config(published, lora=dict(rank=rank, alpha=6.0), **changes)
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        assert loop.train(told, workdir) == 128 + signal.SIGTERM

    # Adapters are all that was trained and saved, each of them; the base is the folder's to the bit.
    stored = restore.read_metadata(restore.find_checkpoint(workdir))
    sites = [f"transformer_blocks.attn1.{name}" for name in ("to_k", "to_out.0", "to_q", "to_v")]
    names = [f"{site}.lora_{ab}.kernel" for site in sites for ab in "AB"]
    assert {n for n in stored["leaves"] if n.startswith(("ema", "trainable"))} == {
        f"{part}.{name}" for part in ("ema", "trainable.model") for name in names
    }
    assert sum(n.startswith("opt_state") and ".lora_" in n for n in stored["leaves"]) == 2 * len(names)
    opened = trained.open_run(workdir, weights="raw", with_text=False)
    fresh = opened.run.init(jax.random.fold_in(jax.random.key(told.seed), 0))["model"]
    for name, leaf in named_leaves(opened.trainable["model"]).items():
        assert not np.array_equal(leaf, named_leaves(fresh)[name]), name

    ours, noise = our_videos(workdir, tmp_path / "videos", monkeypatch)
    convert.student_to_lora(workdir, tmp_path / "lora")
    with_adapters = diffusers.CogVideoXPipeline.from_pretrained(published)
    with_adapters.load_lora_weights(str(tmp_path / "lora"))
    before = assert_same_videos(with_adapters, ours, noise, published)
    base_now = mapping.state_dict(opened.run.frozen["base"], opened.run.student.weight_rules(opened.run.model_config))
    assert all(np.array_equal(base_now[k], v.numpy()) for k, v in before.transformer.state_dict().items())

    # Another base under the same path is noticed by whoever opens the run.
    weights = published / "transformer" / "diffusion_pytorch_model.safetensors"
    kept = weights.read_bytes()
    safetensors_file.write(weights, base_now | {"proj_out.bias": base_now["proj_out.bias"] + 1})
    try:
        with pytest.raises(ValueError, match=r"trained upon the base .* \(digest .*put the first one back"):
            trained.open_run(workdir)
        with pytest.raises(ValueError, match="put the first one back"):
            loop.train(told, workdir)
    finally:
        weights.write_bytes(kept)
