"""What the README shows works as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

from configs import base
from jaxalign.training import setup
from jaxalign.training.config import resolve

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


CONFIG, TEN_LINES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_config_of_several_alignments_is_one():
    run = setup.build(resolve(eval(CONFIG, {"base": base})))
    assert [a.name for a in run.task.alignments] == ["align4gen", "motion"]
    assert [a.head.teacher_width for a in run.task.alignments] == [112 + 320, 112]


def test_the_ten_lines_run():
    keys = jax.random.split(jax.random.key(0), 4)
    head = jax.tree_util.Partial(lambda w, x: x @ w, jax.random.normal(keys[0], (6, 5)))
    given = dict(
        head=head,
        student_tokens=jax.random.normal(keys[1], (2, 3, 4, 4, 6)),
        teacher_tokens=jax.random.normal(keys[2], (2, 3, 4, 4, 5)),
        video=jax.random.uniform(keys[3], (2, 3, 16, 16, 3), minval=-1, maxval=1),
    )
    exec(TEN_LINES, given)
    (gradient,) = jax.tree.leaves(given["grads"])
    assert gradient.shape == (6, 5) and float(jnp.abs(gradient).max()) > 0


def test_every_file_it_links_to_is_there():
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith(("http", "#"))]
    assert links and [link for link in links if not (root / link).exists()] == []


def test_the_configs_it_names_are_all_there_are():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"configs/(\w+)\.py", README))
    assert named == {p.stem for p in (root / "configs").glob("*.py")} - {"__init__", "base"}
