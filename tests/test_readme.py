"""What the README shows works as it stands there."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_ten_lines_run():
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    keys = jax.random.split(jax.random.key(0), 4)
    head = jax.tree_util.Partial(lambda w, x: x @ w, jax.random.normal(keys[0], (6, 5)))
    given = dict(
        head=head,
        student_tokens=jax.random.normal(keys[1], (2, 3, 4, 4, 6)),
        teacher_tokens=jax.random.normal(keys[2], (2, 3, 4, 4, 5)),
        video=jax.random.uniform(keys[3], (2, 3, 16, 16, 3), minval=-1, maxval=1),
    )
    exec(code, given)
    (gradient,) = jax.tree.leaves(given["grads"])
    assert gradient.shape == (6, 5) and float(jnp.abs(gradient).max()) > 0


def test_every_file_it_links_to_is_there():
    root = Path(__file__).parents[1]
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links and [link for link in links if not (root / link).exists()] == []


def test_the_configs_it_names_are_all_there_are():
    root = Path(__file__).parents[1]
    named = set(re.findall(r"configs/(\w+)\.py", README))
    assert named == {p.stem for p in (root / "configs").glob("*.py")} - {"__init__", "base"}
