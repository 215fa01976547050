"""Where a run's weights come from: every kind of path, whole and in part; what LoRA runs take for their base."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax import nnx

from configs import base as base_config
from jaxalign.interop import lora_file, mapping, safetensors_file, sealed, weights
from jaxalign.models import cogvideox, cogvideox_folder, lora
from jaxalign.training import config as config_lib
from jaxalign.training import init_from, loop, setup, trained
from jaxalign.training.checkpoint import Checkpoints
from jaxalign.training.mesh import named_leaves

torch = pytest.importorskip("torch")

SMALL = dict(
    steps=3,
    batch_size=1,
    data=dict(source="synthetic", num_frames=2, height=8, width=8, stride=1),
    sample=dict(steps=1, count=1),
    checkpoint=dict(every=2),
    log_every=1,
    sample_every=3,
    eval_every=3,
)


def small(**changes):
    config = base_config.get_config("demo")
    for layer in (SMALL, changes):
        config.update(layer)
    return config_lib.resolve(config)


def random_like(tree, seed=0):
    draw = np.random.default_rng(seed).standard_normal
    return jax.tree.map(lambda x: jax.numpy.asarray(0.2 * draw(x.shape), x.dtype), tree)


def same(one, two):
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True))


@pytest.fixture(scope="module")
def run():
    return setup.build(small())


@pytest.fixture(scope="module")
def student(run):
    return random_like(jax.eval_shape(run.init, jax.random.key(0))["model"])


@pytest.fixture(scope="module")
def latte(run, student, tmp_path_factory):
    """The student as a safetensors file in Latte's names."""
    path = tmp_path_factory.mktemp("latte") / "latte.safetensors"
    safetensors_file.write(path, mapping.state_dict(student, run.student.weight_rules(run.model_config)))
    return path


@dataclasses.dataclass(frozen=True)
class State:
    trainable: dict
    ema: object


def begun(run, said=None, **section):
    """The state that init_from makes of one whose leaves are all 7."""
    shapes = jax.eval_shape(run.init, jax.random.key(0))["model"]
    seven = lambda: jax.tree.map(lambda x: jax.numpy.full(x.shape, 7.0), shapes)  # noqa: E731
    said = [] if said is None else said
    return init_from.begin(small(init_from=section), run, State({"model": seven()}, seven()), say=said.append)


# ---- the kinds of path ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "convert's folder", "pth", "workdir", "checkpoint"])
def test_the_whole_student_from_every_kind_of_path(run, student, latte, tmp_path, kind):
    said, source = [], "ema"
    if kind == "file":
        path = latte
    elif kind == "convert's folder":
        path = tmp_path
        (tmp_path / "vdit.safetensors").write_bytes(latte.read_bytes())
    elif kind == "pth":  # as Latte's trainer saves: several students, an optimizer
        path, source = tmp_path / "0001.pt", "raw"
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in weights.open_weights(latte).items()}
        ema = {name: 0 * tensor for name, tensor in tensors.items() if "pos" not in name and "temp" not in name}
        torch.save({"model": tensors, "ema": ema, "opt": {"state": {0: {"step": torch.ones(())}}}}, path)
    else:
        with Checkpoints(tmp_path / "checkpoints", say=lambda line: None) as checkpoints:
            checkpoints.save(5, {"ema": student, "trainable": {"model": random_like(student, 1), "heads": {}}})
        path = tmp_path / "checkpoints" / "5" if kind == "checkpoint" else tmp_path
    state = begun(run, said, path=str(path), source=source)
    assert same(state.trainable["model"], student) and same(state.ema, student)
    leaves = len(jax.tree.leaves(student))
    assert len(said) == 1 and f"{leaves} of {leaves} leaves" in said[0] and "fresh" not in said[0]
    assert state.ema.x_embedder.proj.kernel is not state.trainable["model"].x_embedder.proj.kernel


def test_names_of_a_parallel_trainer(run, latte, tmp_path):
    parallel = {f"module.{name}": np.array(array) for name, array in weights.open_weights(latte).items()}
    safetensors_file.write(tmp_path / "w.safetensors", parallel)
    init_from.check(small(init_from=dict(path=str(tmp_path / "w.safetensors"))), run)


def test_parts_that_nobody_knows(tmp_path):
    path, names = tmp_path / "w.pt", ("blocks.0.w", "blocks.1.w", "last.w")
    tensors = {name: torch.full((2,), float(k)) for k, name in enumerate(names)}
    parallel = {f"module.net.{name}": tensor for name, tensor in tensors.items()}
    moments = {"state": {k: {"exp_avg": tensor} for k, tensor in enumerate(tensors.values())}}
    few = {name: tensors[name] for name in names[:2]}  # one word that is the network's own stays
    for content, wanted in (
        (tensors, names),
        (parallel, names),
        ({"net": parallel, "step": 3}, names),
        ({"opt": moments, "net": tensors}, names),
        ({"ema": parallel, "net": moments}, names),
        (few, names[:2]),
    ):
        torch.save(content, path)
        found = init_from._open_part(path, "ema", lambda: names)
        assert {name: float(array[0]) for name, array in found.items()} == {n: names.index(n) for n in wanted}
    torch.save({"one": tensors, "two": parallel}, path)
    with pytest.raises(ValueError, match=r"which of its parts is meant\? 'one' .*save that one alone") as error:
        init_from._open_part(path, "ema", lambda: names)
    assert "key=" not in str(error.value) and "\n" not in str(error.value)


def test_a_checkpoint_is_read_once_to_be_checked(run, student, tmp_path, monkeypatch):
    with Checkpoints(tmp_path / "checkpoints", say=lambda line: None) as checkpoints:
        checkpoints.save(5, {"ema": student})
    read, real = [], sealed.find_damage
    monkeypatch.setattr(sealed, "find_damage", lambda *given: read.append(given) or real(*given))
    folder = tmp_path / "checkpoints" / "5"
    init_from.check(small(init_from=dict(path=str(folder))), run)
    state = begun(run, path=str(folder))
    assert same(state.ema, student) and len(read) == 1
    data = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"is damaged: .*has changed bytes"):
        begun(run, path=str(folder))
    assert len(read) == 2


def test_a_part_by_regex_and_the_rest_stays_fresh(run, student, latte, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", say=lambda line: None) as checkpoints:
        checkpoints.save(5, {"ema": student})
    for path in (latte, tmp_path):
        said = []
        state = begun(run, said, path=str(path), pattern=r"^blocks\.|t_embedder")
        for name, leaf in named_leaves(state.trainable["model"]).items():
            taken = name.startswith(("blocks.", "t_embedder"))
            assert np.array_equal(leaf, named_leaves(student)[name] if taken else np.full(leaf.shape, 7.0)), name
        assert said[0].endswith("24 of 30 leaves, 2,424,064 parameters; fresh: 4 of final_layer, 2 of x_embedder")


def test_another_size_is_said_with_what_to_write(run, latte, tmp_path):
    other = setup.build(small(model=dict(patch_size=2)))
    message = r"x_embedder.proj.weight is \(128, 3, 4, 4\) there and \(128, 3, 2, 2\) here.*pattern='\^\(\?!\("
    with pytest.raises(ValueError, match=message) as error:
        begun(other, path=str(latte))
    pattern = str(error.value).split("pattern='")[1].rstrip("'")
    init_from.check(small(init_from=dict(path=str(latte), pattern=pattern)), other)  # what it says to write is right
    # Leaves that fit and a table that does not: clips of another length.
    longer = setup.build(small(data=dict(num_frames=4)))
    with pytest.raises(ValueError, match=r"the table temp_embed is .*; to take the leaves all the same write .*=\.$"):
        begun(longer, path=str(latte))
    init_from.check(small(init_from=dict(path=str(latte), pattern=".")), longer)
    with pytest.raises(ValueError, match=r"'decoder' finds none of the \d+ leaves, e.g. blocks.0"):
        begun(run, path=str(latte), pattern="decoder")
    with pytest.raises(FileNotFoundError, match="there is no such file or folder"):
        begun(run, path=str(tmp_path / "x"))
    with pytest.raises(IsADirectoryError, match=r"a folder, but a weights file is wanted; it holds latte\.safetensors"):
        begun(run, path=str(latte.parent))
    with pytest.raises(ValueError, match="source = 'last': write one of ema, raw"):
        small(init_from=dict(path="x", source="last"))


def test_another_preset_is_named(run, latte):
    s = setup.build(small(model=dict(preset="S")))
    with pytest.raises(ValueError, match=r"does not fit vdit S: .*; it looks like model.preset = 'demo' \(100% of"):
        init_from.check(small(model=dict(preset="S"), init_from=dict(path=str(latte))), s)


# ---- diffusers' folders of CogVideoX -------------------------------------------------------------------------------

PRESET = dict(width=32, depth=2, num_heads=2, text_width=12, time_width=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    diffusers = pytest.importorskip("diffusers")
    path = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=12,
        num_layers=2,
        sample_height=4,
        sample_width=6,
        sample_frames=9,
        max_text_seq_length=5,
    )
    model.save_pretrained(path / "transformer", max_shard_size="50KB")
    (path / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    return path, {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def cogvideox_run(**changes):
    """What setup makes of a config, as far as init_from reads it; presets at sizes that a test can write."""
    presets = {"tiny": PRESET, "big": PRESET | dict(depth=4)}
    from jaxalign.models import MODELS

    student = MODELS["cogvideox"]._replace(presets=presets)
    sizes = dict(input_size=(4, 4), num_frames=2, in_channels=4, text_tokens=3)
    config = cogvideox.CogVideoXConfig(**(sizes | PRESET | changes))

    def init(key):
        return {"model": cogvideox.CogVideoX(config, rngs=nnx.Rngs(key)), "heads": {}}

    task = type("Task", (), {"lora": None})
    return type("Run", (), {"student": student, "model_config": config, "task": task, "init": staticmethod(init)})


def test_a_published_folder_its_transformer_and_its_index(folder):
    path, state = folder
    run = cogvideox_run()
    for given in (path, path / "transformer", next((path / "transformer").glob("*.index.json"))):
        config = small(model=dict(name="cogvideox", preset="tiny"), init_from=dict(path=str(given)))
        fresh = random_like(jax.eval_shape(run.init, jax.random.key(0))["model"])
        begun = init_from.begin(config, run, State({"model": fresh}, random_like(fresh)), say=lambda line: None)
        found = mapping.state_dict(begun.trainable["model"], cogvideox.weight_rules(run.model_config))
        assert found.keys() == state.keys() and all(np.array_equal(found[k], state[k]) for k in state)


def test_a_folder_of_another_preset_or_model_is_said(folder, tmp_path):
    path, _ = folder
    config = small(model=dict(name="cogvideox", preset="big"), init_from=dict(path=str(path)))
    with pytest.raises(ValueError, match=r"says depth 2 \(here 4\): write --config.model.preset=tiny"):
        init_from.check(config, cogvideox_run(depth=4))
    with pytest.raises(ValueError, match=r"says num_heads 2 \(here 1\).*write --config.model.preset=tiny"):
        init_from.check(config, cogvideox_run(num_heads=1, positions="rotary"))
    about = json.loads((path / "transformer" / "config.json").read_text())
    for change, message in (
        (dict(norm_eps=1e-6), r"norm_eps is 1e-06; only 1e-05 is read"),
        (dict(patch_bias=False), "patch_bias is false without patch_size_t"),
        (dict(in_channels=8), r"image_channels 4 \(here 0\): it is none of the presets tiny, big"),
    ):
        with pytest.raises(ValueError, match=message):
            cogvideox_folder.check(about | change, cogvideox_run().model_config, cogvideox_run().student.presets)
    (tmp_path / "config.json").write_text('{"_class_name": "LTXVideoTransformer3DModel"}')
    config.init_from.path = str(tmp_path)
    with pytest.raises(ValueError, match="this is a LTXVideoTransformer3DModel; CogVideoXTransformer3DModel is wanted"):
        init_from.check(config, cogvideox_run())


@pytest.mark.parametrize("preset", cogvideox.PRESETS)
def test_settings_to_diffusers_and_back(preset):
    config = cogvideox.CogVideoXConfig(input_size=(60, 90), num_frames=14, **cogvideox.PRESETS[preset])
    upstream = cogvideox_folder.upstream_from(config)
    back = cogvideox_folder.settings_from(json.loads(json.dumps(upstream)))
    wanted = {name: getattr(config, name) for name in back}
    if config.patch_size_t:  # its positions are cut from a table of upstream's size
        wanted["sample_size"] = (300, 300)
    assert back == wanted
    cogvideox_folder.check(upstream, config, cogvideox.PRESETS)
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.CogVideoXTransformer3DModel.from_config(upstream)
    assert set(theirs.config) - {"_use_default_values"} == set(upstream)
    assert not theirs.config.get("_use_default_values")  # every field is said


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def lora_config(latte, **changes):
    return small(lora=dict(rank=2, alpha=6.0), init_from=dict(path=str(latte)), **changes)


def test_what_a_base_cannot_be(run, latte, tmp_path):
    """(Trained adapters, what of them is saved, and that another base is noticed: tests/test_cogvideox_run.py.)"""
    with pytest.raises(ValueError, match=r"adapters need a base; write --config\.init_from\.path"):
        setup.build(small(lora=dict(rank=2)))
    with pytest.raises(ValueError, match="names the base, which is taken whole"):
        setup.build(small(lora=dict(rank=2), init_from=dict(path=str(latte), pattern="blocks")))
    adapters = setup.build(lora_config(latte), abstract=True).init(jax.random.key(0))["model"]
    with Checkpoints(tmp_path / "checkpoints", say=lambda line: None) as checkpoints:
        checkpoints.save(3, {"ema": adapters})
    with pytest.raises(ValueError, match=r"that run trained adapters and its checkpoints lack the network"):
        begun(run, path=str(tmp_path))
    with pytest.raises(ValueError, match=r"may get newer checkpoints.*name one: .*checkpoints/3$"):
        setup.build(small(lora=dict(rank=2), init_from=dict(path=str(tmp_path))))


def test_adapters_start_from_a_file(latte, tmp_path):
    config = lora_config(latte)
    run = setup.build(config)
    fresh = run.init(jax.random.key(0))["model"]
    given = random_like(fresh, 3)
    path = lora_file.write(
        tmp_path / "a.safetensors", given, run.student.weight_rules(run.model_config), rank=2, alpha=6.0
    )
    config.lora.weights = str(path)
    state = init_from.begin(config, run, State({"model": fresh}, random_like(fresh)), say=lambda line: None)
    assert same(state.trainable["model"], given) and same(state.ema, given)
    config.lora.weights = str(latte)
    with pytest.raises(ValueError, match=r"config\.lora\.weights: .*is no plain LoRA weight"):
        init_from.check(config, run)


def test_what_makes_a_run_itself(latte):
    plain = config_lib.identity(small())
    assert not any(name.startswith(("lora", "init_from")) for name in plain)
    assert plain == config_lib.identity(small(lora=dict(alpha=3.0), init_from=dict(pattern="x")))
    assert config_lib.identity(lora_config(latte))["lora.alpha"] == 6.0


def test_adapters_are_cut_over_all_that_cuts_parameters(latte):
    run = setup.build(lora_config(latte), abstract=True)
    rules = dict(run.sharding_rules)
    spec = rules[r"blocks\.0\.attn\.qkv\.lora_B\.kernel"]
    assert spec == jax.sharding.PartitionSpec(None, None, lora.PARAMETER_AXES)


@pytest.mark.slow
def test_a_restart_changes_nothing(latte, tmp_path):
    """Two steps, then the rest by another call, which reads the base again: bit for bit the same adapters."""
    config = lora_config(latte, optimizer=dict(schedule="constant"))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert loop.train(config, whole) == 0
    for steps in (2, 3):
        config.steps = steps
        assert loop.train(config, halves) == 0
    assert same(trained.open_run(whole).trainable["model"], trained.open_run(halves).trainable["model"])
