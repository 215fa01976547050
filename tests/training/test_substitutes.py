"""Clips that others stand in for: named once, counted, and no end of a run."""

import io
import json

from jaxalign.training.report import Report
from jaxalign.training.substitutes import SAID, Substitutes


def test_each_video_is_named_once_and_few_are_said(tmp_path):
    said = []
    substitutes = Substitutes(tmp_path, said.append)
    substitutes.note([], 4)
    assert substitutes.share() == 0.0 and not said and not list(tmp_path.iterdir())
    names = [f"{k}.mp4" for k in range(SAID + 2)]
    substitutes.note([names[0], names[0]], 4)
    substitutes.note(names, 8)
    assert (tmp_path / "unreadable_0.txt").read_text().split() == names
    assert len(said) == SAID and all("another clip stands in" in line for line in said)
    assert substitutes.share() == (2 + len(names)) / 12 and "of the clips so far" in said[-1]
    assert substitutes.share() == 0.0 and len(said) == SAID + 1
    assert substitutes.of_all() == {names[0]: 3} | dict.fromkeys(names[1:], 1)


def test_neither_a_name_nor_a_disk_ends_the_run(tmp_path):
    said = []
    substitutes = Substitutes(tmp_path, said.append)
    substitutes.note(["caf\udce9.mp4"], 1)  # as Python reads a name that is not UTF-8
    assert (tmp_path / "unreadable_0.txt").read_bytes() == b"caf\xe9.mp4\n"
    assert "caf" in said[0]
    with Report(tmp_path, screen=io.TextIOWrapper(io.BytesIO(), encoding="ascii")) as report:
        report.say(said[0])
        report.summary({"unreadable_clips": substitutes.of_all()})
    assert "caf\\udce9.mp4" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["unreadable_clips"] == {"caf\udce9.mp4": 1}
    lost = Substitutes(tmp_path / "gone", said.append)
    lost.note(["a.mp4"], 1)
    assert "could not be written" in said[-1]
