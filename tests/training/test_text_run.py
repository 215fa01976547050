"""A small CogVideoX that is told by captions: what it is told, that it trains, and that it is sampled from prompts."""

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import base
from jaxalign import precompute, sample
from jaxalign.codecs import hashed
from jaxalign.codecs.layers import posterior
from jaxalign.data import precomputed
from jaxalign.tasks import denoising
from jaxalign.training import config as config_lib
from jaxalign.training import loop, prepare, prompted, prompts, setup
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.data_settings import task_parts
from jaxalign.training.makers import Options
from jaxalign.training.restore import find_checkpoint

SMALL = dict(
    model=dict(name="cogvideox"),
    steps=2,
    batch_size=2,
    objective="v",
    teacher=dict(size=32, stride=8),
    data=dict(num_frames=2, height=16, width=16),
    align=dict(depth=2, projector=dict(hidden=16)),
    text=dict(tokens=8, dropout=0.5),
    sample=dict(steps=2, count=2, guidance_scale=2.0),
    checkpoint=dict(every=2),
    sample_every=2,
    eval_every=2,
)


def small(**changes):
    config = base.get_config("demo")
    for layer in (SMALL, changes):
        config.update(layer)
    return config_lib.resolve(config)


@pytest.fixture(scope="module")
def run():
    return setup.build(small())


@pytest.fixture(scope="module")
def workdir(run, tmp_path_factory):
    """As a run leaves it whose student has random numbers."""
    workdir = tmp_path_factory.mktemp("runs") / "told"
    draw = np.random.default_rng(0).standard_normal
    student = jax.eval_shape(run.init, jax.random.key(0))["model"]
    student = jax.tree.map(lambda x: jnp.asarray(0.1 * draw(x.shape), x.dtype), student)
    with Checkpoints(workdir / "checkpoints", say=lambda line: None) as checkpoints:
        checkpoints.save(2, {"ema": student})
    (workdir / "config.json").write_text(json.dumps(small().to_dict()))
    return workdir


def test_dropout_puts_the_empty_prompt_in(run):
    """Of tokens before they are encoded, and of embeddings that were made before; only with a key."""
    task, frozen, key = run.task, run.frozen, jax.random.key(0)
    tokens = jnp.asarray(hashed.tokenize(["a cat"] * 400, 8)[0])
    told = task._condition(frozen, {"tokens": tokens}, None)
    assert told.shape == (400, 8, 32) and float(jnp.abs(told[:, :2]).min()) > 0
    dropped = task._condition(frozen, {"tokens": tokens}, key)
    gone = np.asarray(jnp.all(dropped == 0, axis=(1, 2)))  # of the hashed encoder, the empty prompt is zero
    assert 0.4 < gone.mean() < 0.6
    np.testing.assert_array_equal(dropped[~gone], told[~gone])
    before = task._condition(frozen, {"prompt": told, "tokens": tokens}, key)
    np.testing.assert_array_equal(before, dropped)
    embedded = {"null_prompt": jnp.full((8, 32), 7.0)}  # no encoder at hand
    other = task._condition(embedded, {"prompt": told}, key)
    assert set(np.unique(other[gone])) == {7.0}
    np.testing.assert_array_equal(other[~gone], told[~gone])


def test_what_was_computed_before_is_taken(run):
    """Moments instead of the video: the latents are drawn from them with the step's key."""

    class Codec(nnx.Module):
        def sample(self, moments, key):
            return posterior(moments, key)

    frozen = {"codec": Codec(), "teachers": {}}
    moments = jax.random.normal(jax.random.key(0), (2, 1, 4, 4, 4))
    video, latents = denoising.encode(frozen, {"moments": moments}, jax.random.key(1))
    assert video is None and latents.shape == (2, 1, 4, 4, 2)
    np.testing.assert_array_equal(latents, posterior(moments, jax.random.key(1)))
    assert np.abs(latents - posterior(moments, None)).max() > 0.01


def test_guidance_goes_away_from_the_empty_prompt(run):
    """Against the formula, on the network's own two predictions, for one Euler-like step of DDIM."""
    rng = np.random.default_rng(0)  # zero-initialised outputs would hide the condition
    model = jax.eval_shape(run.init, jax.random.key(0))["model"]
    model = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32), model)
    noise = jax.random.normal(jax.random.key(2), (2, *run.latent_shape))
    tokens = jnp.asarray(hashed.tokenize(["a cat", "a red car"], 8)[0])
    draw = jax.jit(run.task.latents, static_argnames=("steps", "guidance_scale", "dynamic_guidance"))

    def latents(told, scale):
        return draw(model, run.frozen, noise, told, None, steps=1, guidance_scale=scale)

    plain, null = latents(tokens, 1.0), latents(jnp.zeros_like(tokens), 1.0)
    assert float(jnp.abs(plain - null).max()) > 1e-3
    # One step from pure noise: the latents are a linear function of the prediction.
    np.testing.assert_allclose(latents(tokens, 3.0), null + 3.0 * (plain - null), atol=2e-4)
    with pytest.raises(ValueError, match="dynamic_guidance belongs to objective 'v'"):
        flow = dataclasses.replace(run.task, process=setup.PROCESSES["flow"]())
        flow.latents(model, run.frozen, noise, tokens, None, steps=1, dynamic_guidance=True)


def test_the_demo_trains_with_hashed_captions():
    """Its step is traced on batches of the source; with T5 it is compiled and run in tests/test_cogvideox_run.py."""
    config = small(align=dict(method="m_tsa", weight=0.5))
    found = prepare.prepare(config)
    assert found.source.tokens.shape == (3, 8) and found.source.cut_prompts == 3
    assert found.source.notes == ("3 of 3 captions are longer than 8 tokens and are cut",)
    data, _ = loop.open_data(config, found.source, found.mesh)
    batch = task_parts(data[0])
    np.testing.assert_array_equal(batch["tokens"], found.source.tokens[data[0]["item"]])
    step = prepare.compiled_step(config, found.run, found.optimizer, found.abstract)
    _, metrics = jax.eval_shape(step, found.abstract, found.run.frozen, batch, jax.random.key(0))
    assert {"loss", "denoising", "align/m_tsa"} <= metrics.keys()


@pytest.mark.slow
def test_the_demo_runs_to_its_end(tmp_path):
    assert loop.train(small(align=dict(method="m_tsa", weight=0.5)), tmp_path / "told") == 0
    summary = json.loads((tmp_path / "told" / "summary.json").read_text())
    assert summary["step"] == 2 and np.isfinite(summary["held_out"]["m_tsa"])
    assert (tmp_path / "told" / "samples" / "step_000002.mp4").stat().st_size > 100


def test_sampling_a_run_goes_on_where_it_stopped(workdir, tmp_path, capsys):
    config = config_lib.resolve(small())
    found = prompts.of_run(config)
    assert len(found) == 3 and "rabbit" in found[0]
    paths = sample.draw_prompts(prompted.of_run(workdir), ["a cat", "a dog"], tmp_path, count=2, at_once=3)
    assert len({path.name for path in paths}) == 4
    kept = {path: path.read_bytes() for path in paths}
    (tmp_path / paths[2].name).unlink()
    with open(tmp_path / "index.jsonl") as file:
        lines = file.read().splitlines()
    (tmp_path / "index.jsonl").write_text("\n".join(lines[1:]) + '\n{"file": "half a li')  # killed while it wrote
    capsys.readouterr()
    named = prompted.of_run(workdir / "checkpoints" / find_checkpoint(workdir).name)  # its step, should it train on
    again = sample.draw_prompts(named, ["a cat", "a dog"], tmp_path, count=2, at_once=1)
    assert "2 of 4 videos are in" in capsys.readouterr().out
    assert again == paths and {path: path.read_bytes() for path in paths} == kept  # alone as in company


@pytest.mark.parametrize("joined", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_two_processes_share_one_prompt(workdir, tmp_path, joined):
    """One of them has nothing to draw, so it opens nothing, and the other does not wait for it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = [f"--coordinator=127.0.0.1:{free.getsockname()[1]}"] if joined else []
    command = [sys.executable, "-m", "jaxalign.sample", "--workdir", str(workdir), "--prompt=a cat"]
    command += [f"--out={tmp_path}", "--num_processes=2", *where]
    pipes = dict(cwd=Path(__file__).parents[2], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    pair = [subprocess.Popen([*command, f"--process_id={k}"], env=environment, **pipes) for k in range(2)]
    try:
        said = [process.communicate(timeout=120)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], said
    assert "1/1" in said[0] and "1/1" not in said[1] and len(list(tmp_path.glob("*.mp4"))) == 1, said


def test_prompts_are_added_to_a_folder_that_holds_the_videos(tmp_path):
    """Of pixels, --what=latents stores the videos; what else the clips' series would be is there then."""
    config, quiet = small(align=dict(method="none")), dict(say=lambda line: None)
    for what in ("latents", "text"):
        made = precompute.precompute(config, tmp_path / "told", Options(what=(what,), held_out=1, clips=1), **quiet)
        assert made["missing"] == made["bad"] == 0
    assert set(precomputed.open_folder(tmp_path / "told").series) == {"video", "prompts"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(text=dict(encoder="")), "config.text.encoder = ''.*is told by text; write one of hash, t5_xxl"),
        (dict(text=dict(encoder="t5_xxl")), "of width 4096, but config.model.preset = 'demo' takes 32"),
        (dict(model=dict(preset="2b")), "'hash' gives embeddings of width 32, but .*'2b' takes 4096"),
        (dict(model=dict(preset="5b_i2v")), "is told an image too"),
        (dict(objective="ddpm"), "predicts no variance: write learn_sigma = False"),
        (dict(data=dict(height=18)), "clips of 18x16, but .* wants multiples of 4; the nearest size is 16x16"),
        (dict(model=dict(preset="folder")), "init_from.path=FOLDER; '' is none"),
    ],
)
def test_what_does_not_fit_is_said(changes, said):
    with pytest.raises((ValueError, OSError), match=said):
        setup.build(small(**changes), abstract=True)


def test_the_real_scale_says_what_it_lacks():
    config = base.get_config("cogvideox_2b", data=dict(source="somewhere", height=470))
    with pytest.raises(ValueError, match=r"clips of 470x720, .* wants multiples of 16; the nearest size is 464x720"):
        setup.build(config_lib.resolve(config), abstract=True)
    config = base.get_config("cogvideox_2b", data=dict(source="somewhere"))
    with pytest.raises(FileNotFoundError, match=r"config\.codec: 'cogvideox_2b' needs weights"):
        setup.build(config_lib.resolve(config))
