"""What machines do to checkpoints: full and locked disks, processes killed or left at any moment."""

import errno
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.interop import sealed
from jaxalign.training import checkpoint
from jaxalign.training.checkpoint import Checkpoints


@pytest.fixture
def small_files():
    """No file may grow past 200 kB, as if the disk were full: the system refuses the write itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, previous)


def test_a_full_disk_costs_one_line_and_nothing_else(tmp_path, small_files, capfd):
    small, large = {"x": np.zeros(10)}, {"x": np.random.default_rng(0).normal(size=200_000)}
    lines = []
    with Checkpoints(tmp_path, keep=1, say=lines.append) as checkpoints:
        checkpoints.save(1, small)
        for step in (2, 3):
            checkpoints.save(step, large)
        checkpoints.wait()
        assert checkpoints.failed_saves == 2 and checkpoints.steps() == [1]
        assert len(lines) == 2 and all("\n" not in line for line in lines)
        assert "checkpoint 3 was not written" in lines[1] and "last good one is 1" in lines[1]
        assert "failed saves: 2" in lines[1]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["1"]  # half-written folders are gone
        assert (checkpoints.restore_latest(small).state["x"] == 0).all()
        checkpoints.save(4, small)  # room again: saving goes on
        checkpoints.wait()
        assert checkpoints.steps() == [4]
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("where", ["write_atomic", "write_manifest"])
def test_no_space_for_metadata_or_manifest(tmp_path, monkeypatch, where):
    lines = []
    with Checkpoints(tmp_path, say=lines.append) as checkpoints:
        checkpoints.save(1, {"x": np.zeros(3)})
        checkpoints.wait()

        def full(*_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(sealed, where, full)
            checkpoints.save(2, {"x": np.ones(3)})
            checkpoints.wait()
        assert checkpoints.steps() == [1] and checkpoints.failed_saves == 1 and checkpoints.last_good == 1
        assert "no space left on the disk" in lines[0] and "last good one is 1" in lines[0]
        checkpoints.save(3, {"x": np.ones(3)})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 3]


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    (tmp_path / "file").write_text("")
    root = os.geteuid() == 0
    if root:  # root may write anywhere: try as nobody
        for folder in (*reversed(locked.parents), locked):
            if folder.stat().st_uid == 0 and folder.is_relative_to(tmp_path.parents[2]):
                folder.chmod(0o555)
        os.seteuid(65534)
    try:
        with pytest.raises(PermissionError, match=r"cannot write to .*locked: Permission denied; use another"):
            checkpoint.check_writable(locked)
    finally:
        if root:
            os.seteuid(0)
            tmp_path.chmod(0o755)
    with pytest.raises(OSError, match=r"cannot write to .*file"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_a_disk_that_renames_no_full_folder_is_an_error_at_the_start(tmp_path, monkeypatch):
    """As gcsfuse without its option; Orbax ends every save so."""
    real = Path.rename

    def refuses(path, target):
        if path.is_dir() and any(path.iterdir()):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", refuses)
    with pytest.raises(OSError, match=r"cannot rename a folder in .*: Too many open files; .*rename-dir-limit=200000"):
        checkpoint.check_writable(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert checkpoint.check_writable(tmp_path) == tmp_path and list(tmp_path.iterdir()) == []


LEAVES = """
import sys
import numpy as np
from jaxalign.training.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"x": np.zeros(2_000_000)})
if sys.argv[2] == "exit":
    with checkpoints:
        sys.exit(3)
"""


@pytest.mark.parametrize("how", ["exit", "end"])
def test_leaving_the_process_finishes_the_save(tmp_path, how):
    """`exit`: through the context manager. `end`: nobody closed anything."""
    command = [sys.executable, "-c", LEAVES, str(tmp_path), how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == (3 if how == "exit" else 0), done.stderr
    assert sealed.find_damage(tmp_path / "1") is None, done.stdout


RESHARD = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from jaxalign.training import mesh as meshes
from jaxalign.training.checkpoint import Checkpoints
def sharded(spec, **sizes):
    mesh = meshes.make_mesh(**sizes)
    return jax.sharding.NamedSharding(mesh, spec)
x = np.random.default_rng(0).normal(size=(16, 32)).astype("float32")
with Checkpoints(sys.argv[1]) as checkpoints:
    if sys.argv[2] == "save":
        checkpoints.save(1, {"x": jax.device_put(x, sharded(P("fsdp", "tensor"), fsdp=4, tensor=2))})
    for placed in (sharded(P("fsdp"), fsdp=8), sharded(P("tensor", "fsdp"), fsdp=2, tensor=-1, data=1),
    sharded(P())):
        like = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)}
        y = checkpoints.restore_latest(like).state["x"]
        assert y.sharding == placed and np.asarray(y).tobytes() == x.tobytes()
print("done")
"""


def test_restore_onto_another_mesh(tmp_path):
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-c", RESHARD, str(tmp_path), "save"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "done", done.stderr
    # ... and onto the one device of this process, with and without saying so
    with Checkpoints(tmp_path) as checkpoints:
        found = checkpoints.restore_latest({"x": jax.ShapeDtypeStruct((16, 32), jnp.float32)})
    expected = np.random.default_rng(0).normal(size=(16, 32)).astype("float32")
    assert np.asarray(found.state["x"]).tobytes() == expected.tobytes()
