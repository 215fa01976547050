"""A workdir is one run's at a time, and free again however that run ended."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import jax
import pytest

from jaxalign.training import lock

HOLDS = """
import fcntl, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(sys.argv[2])
file.flush()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def held_by(tmp_path):
    """A process that holds the lock of tmp_path and says that it is somebody."""
    started = []

    def hold(**who):
        command = [sys.executable, "-c", HOLDS, str(tmp_path / lock.NAME), json.dumps(who) if who else ""]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def test_a_second_run_is_told_who_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for _ in range(2):  # one after the other in one process
        with lock.alone_in(tmp_path):
            with pytest.raises(ValueError) as refused, lock.alone_in(tmp_path):
                pass
            said = str(refused.value)
            assert f"process {os.getpid()} on {lock.socket.gethostname()} (Slurm job 7)" in said and "\n" not in said
            assert str(tmp_path) in said and "give another --workdir" in said
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyError), lock.alone_in(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_holds_nothing(tmp_path, held_by):
    process = held_by(host=lock.socket.gethostname(), boot=lock._boot(), pid=5)
    with pytest.raises(ValueError, match="process 5 on "), lock.alone_in(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with lock.alone_in(tmp_path):
        assert json.loads((tmp_path / lock.NAME).read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("host", ["elsewhere", lock.socket.gethostname()])
def test_a_machine_that_is_gone_is_waited_for(tmp_path, held_by, monkeypatch, host):
    """Also where another one has its name: it was started another time."""
    process, lines = held_by(host=host, boot="before", pid=5), []
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (process.kill(), process.wait()))
    with lock.alone_in(tmp_path, say=lines.append):
        assert len(lines) == 1 and f"held by process 5 on {host}; waiting 100 s" in lines[0]
    held_by(host="elsewhere", pid=6)
    monkeypatch.setattr(lock, "PATIENCE", 0)
    with pytest.raises(ValueError, match=r"process 6 on elsewhere.* remove .*\.lock"), lock.alone_in(tmp_path):
        pass


def test_slurm_starts_a_job_again_whose_machine_is_gone(tmp_path, held_by, monkeypatch):
    held_by(host="elsewhere", pid=5, job="7", starts=1)
    monkeypatch.setattr(lock, "PATIENCE", 0)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for starts in ("", "1"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", starts)
        with pytest.raises(ValueError, match="Slurm job 7"), lock.alone_in(tmp_path):
            pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    again = pytest.raises(ValueError, match=f"process {os.getpid()} on")
    with lock.alone_in(tmp_path), again, lock.alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_its_holder_took_away_is_not_the_lock(tmp_path, monkeypatch):
    real, path = fcntl.flock, tmp_path / lock.NAME

    def late(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with lock.alone_in(tmp_path), pytest.raises(ValueError, match="another run works in"), lock.alone_in(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_gone_on_with(tmp_path, monkeypatch, number):
    def refuses(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuses)
    with lock.alone_in(tmp_path), lock.alone_in(tmp_path):
        pass


def test_of_several_processes_the_first_holds_it(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with lock.alone_in(tmp_path), lock.alone_in(tmp_path):
        assert list(tmp_path.iterdir()) == []
