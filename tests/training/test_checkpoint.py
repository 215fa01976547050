"""Checkpoints: exact, and never wrong. Damage is found; a failed save costs nothing but itself."""

import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxalign.interop import sealed
from jaxalign.training import restore
from jaxalign.training.checkpoint import Checkpoints


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(4, 6, rngs=rngs)
        setattr(self, "0", nnx.Linear(6, 2, rngs=rngs))
        self.half = nnx.Param(jnp.asarray([1.5, -2.25], jnp.bfloat16))
        self.empty = nnx.Param(jnp.zeros((0, 3)))


def make_state(seed, step):
    """What training holds: two NNX modules, an optax state of NamedTuples, numbers. All leaves random."""
    params = Net(nnx.Rngs(seed))
    state = {
        "params": params,
        "ema": params,
        "opt": optax.adamw(1e-3).init(params),
        "step": step,
        "best": 0.5,
    }
    state["seen"] = np.asarray([step, seed], np.int64)
    leaves, structure = jax.tree.flatten(state)
    stream = np.random.default_rng([seed, step])
    randomised = [
        jnp.asarray(stream.normal(size=leaf.shape) * 100, leaf.dtype) if isinstance(leaf, jax.Array) else leaf
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, randomised)


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype) if isinstance(x, jax.Array) else x, state)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert type(a) is type(b)
        assert getattr(a, "dtype", None) == getattr(b, "dtype", None)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


TARGET = abstract(make_state(0, 0))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints 10, 20, 30 of one run; copied by the tests that break them."""
    home = tmp_path_factory.mktemp("three")
    with Checkpoints(home, keep=3) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, make_state(1, step), extra={"config": {"seed": 1, "text": "µ"}})
    return home


@pytest.fixture
def broken(three, tmp_path):
    return Path(shutil.copytree(three, tmp_path / "copy"))


def restore_from(home, **settings):
    lines = []
    with Checkpoints(home, say=lines.append, **settings) as checkpoints:
        found = checkpoints.restore_latest(TARGET)
    return found, lines


def test_round_trip_is_bit_exact(three):
    found, lines = restore_from(three)
    assert found.step == 30 and found.state["step"] == 30 and not lines and not found.messages
    assert found.extra == {"config": {"seed": 1, "text": "µ"}}
    assert isinstance(found.state["params"], Net)
    assert_same(found.state, make_state(1, 30))
    assert not np.array_equal(found.state["seen"], make_state(1, 20)["seen"])


def test_no_checkpoint_is_none(tmp_path):
    found, lines = restore_from(tmp_path / "new" / "deep")
    assert found is None and not lines


def test_arrays_may_be_donated_and_overwritten_while_the_save_runs(tmp_path):
    bump = jax.jit(lambda tree: [x + 1 for x in tree], donate_argnums=0)
    state, counts = [jnp.full((300_000,), float(i)) for i in range(8)], np.zeros(1000)
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(4):
            expected = [float(x[0]) for x in state]
            counts[:] = step
            checkpoints.save(step, {"x": state, "counts": counts})
            counts[:] = -1
            for _ in range(5):
                state = bump(state)
            jax.block_until_ready(state)
            like = {"x": [jax.ShapeDtypeStruct((300_000,), jnp.float32)] * 8, "counts": counts}
            found = checkpoints.restore_latest(like)
            assert found.step == step and (found.state["counts"] == step).all()
            for array, value in zip(found.state["x"], expected, strict=True):
                assert (np.asarray(array) == value).all()


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_one_flipped_bit_in_any_file_is_found(broken):
    newest = broken / "30"
    files, stream = files_of(newest), random.Random(0)
    assert len(files) > 8
    for path in files:
        whole = path.read_bytes()
        position, bit = stream.randrange(len(whole)), 1 << stream.randrange(8)
        path.write_bytes(whole[:position] + bytes([whole[position] ^ bit]) + whole[position + 1 :])
        damage = sealed.find_damage(newest)
        assert damage and "\n" not in damage, path
        path.write_bytes(whole)
    assert sealed.find_damage(newest) is None


def test_a_flipped_bit_falls_back_with_one_line(broken):
    data = max(files_of(broken / "30"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    found, lines = restore_from(broken)
    assert found.step == 20 and found.messages == lines and len(lines) == 1
    assert "30" in lines[0] and data.name in lines[0] and "changed bytes" in lines[0]
    assert_same(found.state, make_state(1, 20))
    assert (broken / "30").is_dir()  # never deleted on the quiet


@pytest.mark.parametrize("harm", ["cut", "delete", "no manifest", "empty manifest", "no state"])
def test_every_other_damage_falls_back(broken, harm):
    for step in ("30", "20"):
        data = max(files_of(broken / step / "state"), key=lambda path: path.stat().st_size)
        seal = broken / step / sealed.NAME
        match harm:
            case "cut":
                data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
            case "delete":
                data.unlink()
            case "no manifest":
                seal.unlink()
            case "empty manifest":
                seal.write_text("")
            case "no state":
                shutil.rmtree(broken / step / "state")
    found, lines = restore_from(broken)
    assert found.step == 10 and len(lines) == 2
    assert_same(found.state, make_state(1, 10))


def test_a_newer_format_is_not_guessed_at(broken):
    seal = broken / "30" / sealed.NAME
    seal.write_text(seal.read_text().replace('"format": 1', '"format": 2'))
    found, lines = restore_from(broken)
    assert found.step == 20 and "format is 2" in lines[0]


def test_all_damaged_is_none_and_said(broken):
    for step in ("10", "20", "30"):
        (broken / step / sealed.NAME).unlink()
    found, lines = restore_from(broken)
    assert found is None and len(lines) == 3


def test_saving_again_past_a_damaged_checkpoint(broken):
    """Fall back from 30 to 20, train on, save 30 again: the damaged one is moved aside, no more."""
    victim = max(files_of(broken / "30" / "state"), key=lambda path: path.stat().st_size)
    victim.unlink()
    (broken / "25").mkdir()  # a save that was killed
    lines = []
    with Checkpoints(broken, keep=2, say=lines.append) as checkpoints:
        assert checkpoints.restore_latest(TARGET).step == 20
        checkpoints.save(30, make_state(1, 30))
        checkpoints.wait()
        assert checkpoints.restore_latest(TARGET).step == 30
        assert checkpoints.steps() == [20, 30] and checkpoints.last_good == 30
    assert (broken / "30.aside").is_dir() and not (broken / "25").exists() and not (broken / "10").exists()
    assert any("aside" in line for line in lines) and any("removed the unfinished" in line for line in lines)


def test_keep_and_keep_every(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=40) as checkpoints:
        for step in range(10, 101, 10):
            checkpoints.save(step, {"x": np.asarray(step)})
        checkpoints.save(100, {"x": np.asarray(-1)})  # a step that is saved already stays as it is
        checkpoints.wait()
        assert checkpoints.steps() == [40, 80, 90, 100]
        assert checkpoints.restore_latest({"x": np.asarray(0)}).state["x"] == 100
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def test_the_old_one_is_deleted_only_when_the_new_one_is_sealed(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"x": np.zeros(3)})
        checkpoints.wait()
        real, seen = sealed.write_manifest, []

        def spy(folder):
            seen.append(checkpoints.steps())
            real(folder)

        monkeypatch.setattr(sealed, "write_manifest", spy)
        checkpoints.save(2, {"x": np.ones(3)})
        checkpoints.wait()
        assert seen == [[1]] and checkpoints.steps() == [2]


def test_another_state_is_refused_by_name(three):
    other = TARGET | {"ema": None, "more": np.zeros(2)}
    with Checkpoints(three) as checkpoints:
        with pytest.raises(ValueError, match=r"lacks more.*nothing takes ema\..*another workdir"):
            checkpoints.restore_latest(other)
        wider = TARGET | {"seen": np.zeros(3, np.int64)}
        with pytest.raises(ValueError, match=r"seen is int64\[2\] there and int64\[3\] here"):
            checkpoints.restore_latest(wider)
    assert sorted(p.name for p in three.iterdir()) == ["10", "20", "30"]


def test_unfit_leaves_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TypeError, match=r"key is of dtype.*key_data"):
            checkpoints.save(1, {"key": jax.random.key(0)})
        with pytest.raises(TypeError, match="name is a str"):
            checkpoints.save(1, {"name": "x"})
        assert not list(tmp_path.iterdir())


def test_warm_start_by_regex(three, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(three, workdir / "checkpoints")
    fresh, saved = Net(nnx.Rngs(7)), make_state(1, 30)
    for path in (workdir, workdir / "checkpoints", workdir / "checkpoints" / "30"):
        params, names = restore.load_params(path, fresh, pattern=r"^layer\.", source="params")
        assert names == ["layer.bias", "layer.kernel"]
        assert jnp.array_equal(params.layer.kernel[...], saved["params"].layer.kernel[...])
        assert jnp.array_equal(getattr(params, "0").kernel[...], getattr(fresh, "0").kernel[...])
    shapes = jax.eval_shape(lambda: Net(nnx.Rngs(0)))
    assert_same(restore.load_params(workdir, shapes, source="ema")[0], saved["ema"])

    data = max(files_of(workdir / "checkpoints" / "30"), key=lambda path: path.stat().st_size)
    data.write_bytes(data.read_bytes()[1:])
    assert_same(restore.load_params(workdir, shapes, source="params")[0], make_state(1, 20)["params"])
    assert "skipped the damaged checkpoint" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="is damaged"):
        restore.load_params(workdir / "checkpoints" / "30", shapes)
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        restore.load_params(tmp_path, shapes)


def test_warm_start_names_what_does_not_fit(three):
    with pytest.raises(ValueError, match="finds none of the 6"):
        restore.load_params(three, Net(nnx.Rngs(0)), pattern="decoder", source="params")
    other = Net(nnx.Rngs(0))
    other.layer = nnx.Linear(4, 7, rngs=nnx.Rngs(0))
    other.head = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"lacks params\.head\.bias.*params\.layer\.bias is float32\[6\]"):
        restore.load_params(three, other, source="params")
    assert restore.load_params(three, other, pattern="^0", source="params")[1] == ["0.bias", "0.kernel"]
