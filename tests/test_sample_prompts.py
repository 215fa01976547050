"""`sample --folder`: the videos of a published folder are diffusers' own; and what is said of folders that are not."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import sample
from jaxalign.diffusion import samplers
from jaxalign.models import cogvideox_folder
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


@pytest.fixture
def undrawn(monkeypatch):
    """Black videos in place of drawn ones; the prompts of each call that drew."""
    calls = []

    def videos(subject, asked, **_):
        calls.append([a.prompt for a in asked])
        return ((a, np.zeros((2, 4, 4, 3))) for a in asked)

    monkeypatch.setattr(prompted, "videos", videos)
    monkeypatch.setattr(prompted, "to_uint8", lambda x: x.astype(np.uint8))
    return calls


def test_a_video_of_another_size_precision_or_export_is_not_taken(folders, undrawn, tmp_path):
    _, folder = folders["ddim"]
    other, out = tmp_path / "other", tmp_path / "out"
    shutil.copytree(folder, other)
    asked = prompted.ask(["cat"])

    def draw(**options):
        prompted.draw(prompted.of_folder(other, **SIZE | options), asked, out, say=lambda line: None)

    draw()
    draw()
    assert len(undrawn) == 1
    for changed, said in (
        (dict(num_frames=1), "num_frames = 9, not 1"),
        (dict(height=16), "height = 8, not 16"),
        (dict(width=8), "width = 16, not 8"),
        (dict(dtype=jnp.bfloat16), "dtype = 'float32', not 'bfloat16'"),
        (dict(tiling=False), "tiling = True, not False"),
    ):
        with pytest.raises(ValueError, match=f"was drawn with {said}: give another --out"):
            draw(**changed)
    index = out / "index.jsonl"
    row = json.loads(index.read_text())
    index.write_text(json.dumps({k: v for k, v in row.items() if k not in (*SIZE, "dtype")}) + "\n")
    with pytest.raises(ValueError, match="by a version that did not write down its num_frames: give another --out"):
        draw()
    index.write_text(json.dumps(row) + "\n")
    draw()
    for part in ("transformer", "vae"):  # another export under the same path
        (weights,) = (other / part).glob("*.safetensors")
        kept = weights.read_bytes()
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(ValueError, match=rf"was drawn with {part} = '[\d,]+ bytes, \w+', not '"):
            draw()
        weights.write_bytes(kept)
    draw()
    assert len(undrawn) == 1


SUBJECT = prompted.Subject("a run", {}, None, (), 0, None, None, dict(steps=1, fps=8))


def test_processes_share_the_list_and_none_waits_for_one_without_work(undrawn, tmp_path, monkeypatch):
    said = []
    (one,) = prompted.ask(["cat"])
    options = dict(say=said.append)
    assert prompted.draw(SUBJECT, [one], tmp_path / "one", share=(1, 2), **options) == [tmp_path / "one" / one.file]
    assert undrawn == [] and said == ["0 of 1 videos are there; the others are other processes'"]
    with pytest.raises(ValueError, match=r"--process_id=2: the processes are 0 … 1"):
        prompted.draw(SUBJECT, [one], tmp_path, share=(2, 2))

    # Who know of each other stay until all is there: whoever left would end the others.
    asked = prompted.ask(["a", "b", "c"])

    def meanwhile(seconds):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "process_count", lambda: 1)
            prompted.draw(SUBJECT, asked, tmp_path, share=(1, 2), **options)

    monkeypatch.setattr(prompted.time, "sleep", meanwhile)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    checked = []
    for check in ("check_agreement", "check_shared"):  # of these two only one is there
        monkeypatch.setattr(prompted.processes, check, checked.append)
    files = prompted.draw(SUBJECT, asked, tmp_path, share=(0, 2), **options)
    assert undrawn == [["a", "c"], ["b"]] and all(file.is_file() for file in files)
    indices = sorted(path.name for path in tmp_path.glob("index*"))
    assert indices == ["index-00000-of-00002.jsonl", "index-00001-of-00002.jsonl"]
    prompted.draw(SUBJECT, asked, tmp_path, **options)
    assert len(undrawn) == 2 and tmp_path in checked


def test_the_newest_line_of_several_indices_counts(undrawn, tmp_path):
    """Names of indices are in another order than they were written in."""
    asked, quiet = prompted.ask(["a", "b"]), dict(say=lambda line: None)
    for path in prompted.draw(SUBJECT, asked, tmp_path, steps=50, **quiet):
        path.unlink()
    for k in range(2):
        prompted.draw(SUBJECT, asked, tmp_path, share=(k, 2), steps=20, **quiet)
    prompted.draw(SUBJECT, asked, tmp_path, steps=20, **quiet)
    assert undrawn == [["a", "b"], ["a"], ["b"]]


def test_a_run_trained_again_is_another_and_older_lines_are_taken(undrawn, tmp_path):
    (one,), quiet = prompted.ask(["a"]), dict(say=lambda line: None)
    first, second = (SUBJECT._replace(about={"checkpoint": digest}) for digest in ("1f", "2e"))
    prompted.draw(SUBJECT._replace(about={}), [one], tmp_path / "before", **quiet)
    prompted.draw(first, [one], tmp_path / "before", **quiet)
    assert undrawn == [["a"]]
    prompted.draw(first, [one], tmp_path / "now", **quiet)
    with pytest.raises(ValueError, match="was drawn with checkpoint = '1f', not '2e'"):
        prompted.draw(second, [one], tmp_path / "now", **quiet)


def test_a_torn_line_of_the_index_does_not_take_the_next_with_it(undrawn, tmp_path):
    asked = prompted.ask(["küche", "cat", "dog"])
    index, quiet = tmp_path / "index.jsonl", dict(say=lambda line: None)
    prompted.draw(SUBJECT, asked[:1], tmp_path, **quiet)
    whole = index.read_bytes()
    index.write_bytes(whole + whole[: whole.index("ü".encode()) + 1])  # the disk was full in the middle of a letter
    for _ in range(2):
        prompted.draw(SUBJECT, asked, tmp_path, **quiet)
    assert undrawn == [["küche"], ["cat", "dog"]]


def test_a_folder_that_names_no_size_is_drawn_at_upstreams(folders, tmp_path):
    """CogVideoX 1.5's config.json says 300x300, which is the size of a table."""
    _, folder = folders["ddim"]
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    path = other / "transformer" / "config.json"
    about = json.loads(path.read_text())
    table = dict(patch_size_t=2, patch_bias=False, sample_height=300, sample_width=300, sample_frames=81)
    path.write_text(json.dumps(about | table | dict(use_rotary_positional_embeddings=True)))
    assert cogvideox_folder.usual_size(about) == (2, 4) and cogvideox_folder.usual_size({}) == (60, 90)
    assert [8 * length for length in cogvideox_folder.usual_size(table)] == [768, 1360]
    assert published.describe(other).video_shape == (81, 4 * 96, 4 * 170)  # its vae/ divides by 4
    assert published.describe(other, height=8).video_shape == (81, 8, 4 * 170)


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
