"""`sample --folder`: the videos of a published folder are diffusers' own; and what is said of folders that are not."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sample
from jaxalign.diffusion import samplers
from jaxalign.training import prompted, published

torch = pytest.importorskip("torch")
pytest.importorskip("sentencepiece")
from tests.tiny_pipeline import LENGTH, SIZE, build  # noqa: E402

PROMPTS, STEPS, GUIDANCE = ["a panda plays guitar", "cat"], 4, 3.0
LATENTS = (3, 2, 4, 4)
RNG = np.random.default_rng(3)
NOISE = RNG.standard_normal((2, *LATENTS)).astype(np.float32)
STEP_NOISE = RNG.standard_normal((STEPS, 2, *LATENTS)).astype(np.float32)
KINDS = {
    "ddim": {},
    # The grid that rotary positions were trained on is another one; the prompt is cut; guidance changes with time.
    "dpm": dict(use_rotary_positional_embeddings=True, sample_height=6, sample_width=4),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: build(tmp_path_factory.mktemp(name), name, **changes) for name, changes in KINDS.items()}


def their_videos(pipeline, monkeypatch, **options):
    """[b, t, h, w, 3] in [-1, 1]."""
    from diffusers.schedulers import scheduling_dpm_cogvideox

    count, step = [0], pipeline.scheduler.step

    def counted(*args, **kwargs):
        result = step(*args, **kwargs)
        count[0] += 1
        return result

    def drawn(*args, **kwargs):
        return torch.from_numpy(STEP_NOISE[count[0]]).permute(0, 1, 4, 2, 3)

    monkeypatch.setattr(scheduling_dpm_cogvideox, "randn_tensor", drawn)
    monkeypatch.setattr(pipeline.scheduler, "step", counted)
    latents = torch.from_numpy(NOISE).permute(0, 1, 4, 2, 3).contiguous()
    options |= dict(num_inference_steps=STEPS, guidance_scale=GUIDANCE, max_sequence_length=LENGTH)
    frames = pipeline(options.pop("prompt"), **SIZE, latents=latents, output_type="pt", **options).frames
    assert count == [STEPS]
    return frames.permute(0, 1, 3, 4, 2).numpy() * 2 - 1


@pytest.mark.parametrize("name", [pytest.param("ddim", marks=pytest.mark.slow), "dpm"])
def test_videos_equal_diffusers(name, folders, monkeypatch, tmp_path, capsys):
    """(DDIM, of what was exported: tests/test_cogvideox_run.py.)"""
    pipeline, folder = folders[name]
    dynamic = name == "dpm"
    prompts = [*PROMPTS[:1], "cat " * 9] if dynamic else PROMPTS
    wanted = their_videos(pipeline, monkeypatch, prompt=prompts, use_dynamic_cfg=dynamic)
    assert np.abs(wanted).max() > 0.3 and np.abs(wanted).min() < 0.99 and np.abs(wanted[0] - wanted[1]).max() > 0.05

    found, noise = [], iter(NOISE)
    monkeypatch.setattr(prompted, "initial_noise", lambda seed, shape: jnp.asarray(next(noise)))
    monkeypatch.setattr(samplers, "step_noise", lambda key, index, shape: jnp.asarray(STEP_NOISE)[index])
    monkeypatch.setattr(prompted, "to_uint8", lambda x: found.append(np.asarray(x)) or np.zeros((2, 4, 4, 3), np.uint8))
    subject = prompted.of_folder(folder, **SIZE)
    assert subject.settings["sampler"] == name and subject.settings["fps"] == 8
    changes = dict(steps=STEPS, guidance_scale=GUIDANCE, dynamic_guidance=dynamic)
    paths = sample.draw_prompts(subject, prompts, tmp_path, at_once=2, **changes)
    np.testing.assert_allclose(np.stack(found), wanted, atol=1e-3)
    said = capsys.readouterr().out
    assert (f"1 of 2 prompts are longer than {LENGTH} tokens and are cut" in said) == dynamic

    # The same command again finds everything there; another one does not take these files for its own.
    rows = [json.loads(line) for line in (tmp_path / "index.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == prompts and [tmp_path / row["file"] for row in rows] == paths
    assert sample.draw_prompts(subject, prompts, tmp_path, **changes) == paths
    assert "2 of 2 videos are in" in capsys.readouterr().out and len(found) == 2
    with pytest.raises(ValueError, match=r"was drawn with steps = 4, not 5: give another --out"):
        sample.draw_prompts(subject, prompts, tmp_path, **changes | dict(steps=5))


def test_the_scheduler_of_a_folder_is_taken(folders):
    assert {name: prompted.of_folder(folder, **SIZE).settings["sampler"] for name, (_, folder) in folders.items()} == {
        name: name for name in KINDS
    }


def test_folders_that_do_not_fit(folders, tmp_path):
    _, folder = folders["ddim"]
    with pytest.raises(ValueError, match="must be multiples of 8; write 32x48"):
        published.describe(folder, num_frames=9, height=30, width=44)
    with pytest.raises(ValueError, match="10 frames: this codec takes"):
        published.describe(folder, **SIZE | dict(num_frames=10))
    with pytest.raises(FileNotFoundError, match="no such folder"):
        published.describe(tmp_path / "nowhere")
    other = tmp_path / "other"
    shutil.copytree(folder, other)

    def change(part, **fields):
        path = other / part
        kept = path.read_text()
        path.write_text(json.dumps(json.loads(kept) | fields))
        return lambda: path.write_text(kept)

    for part, fields, said in (
        ("transformer/config.json", dict(_class_name="WanTransformer3DModel"), "CogVideoXTransformer3DModel is wanted"),
        ("transformer/config.json", dict(in_channels=8), "is told an image too"),
        ("scheduler/scheduler_config.json", dict(_class_name="DDIMScheduler"), "this is a DDIMScheduler"),
        ("scheduler/scheduler_config.json", dict(prediction_type="epsilon"), "prediction_type is 'epsilon'"),
        ("vae/config.json", dict(_class_name="AutoencoderKL"), "AutoencoderKLCogVideoX is wanted"),
    ):
        put_back = change(part, **fields)
        with pytest.raises(ValueError, match=said):
            published.describe(other, **SIZE)
        put_back()
    for part in ("text_encoder", "scheduler", "transformer"):  # each is missed before those that went earlier
        shutil.rmtree(other / part)
        with pytest.raises(FileNotFoundError, match=part):
            prompted.of_folder(other, **SIZE).embed(["cat"])


def test_prompts_of_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("a panda\n\n  cat \n", encoding="utf-8")
    found = prompted.read_prompts(tmp_path / "p.txt")
    assert found == ["a panda", "cat"]
    names = [a.file for a in prompted.ask(found, count=2, seed=5)]
    assert len(set(names)) == 4 and names[3].startswith("0001_cat-") and names[3].endswith("_seed6.mp4")
    (tmp_path / "p.txt").write_text("\n")
    with pytest.raises(ValueError, match="no prompt in it"):
        prompted.read_prompts(tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match="one prompt a line"):
        prompted.read_prompts(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--prompts FILE"):
        prompted.ask([])
