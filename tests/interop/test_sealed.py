"""Files and folders that appear whole: processes that share a folder do not hinder each other."""

import os
import time

from jaxalign.interop import sealed


def test_processes_of_one_id_do_not_meet(tmp_path, monkeypatch):
    """In containers every process has the same one."""
    replace = os.replace

    def meanwhile(source, target):
        monkeypatch.setattr(os, "replace", replace)
        sealed.write_atomic(tmp_path / "note.json", "the other's")
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    sealed.write_atomic(tmp_path / "note.json", "this one's")
    assert (tmp_path / "note.json").read_text() == "this one's"
    with sealed.whole_folder(tmp_path / "part") as one:
        (one / "a").write_text("1")
        with sealed.whole_folder(tmp_path / "other"):
            pass
        again = sealed.whole_folder(tmp_path / "part")
        with again as other:
            assert other != one and (one / "a").is_file()
            (other / "b").write_text("2")
            os.remove(one / "a")
            (tmp_path / "part").mkdir()  # whoever comes first
        os.remove(tmp_path / "part" / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["note.json", "other", "part"]


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    for name, age in ((".part.1.tmp", 2), (".part.1.0123abcd.tmp", 2), (".part.1.4567abcd.tmp", 0), (".else.1.tmp", 2)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "array").write_text("half")
        for path in (folder / "array", folder):
            os.utime(path, (then := time.time() - age * sealed.FORGOTTEN, then))
    with sealed.whole_folder(tmp_path / "part"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".else.1.tmp", ".part.1.4567abcd.tmp", "part"]
