"""What the tasks read of teachers that were asked before."""

import jax.numpy as jnp
import pytest

from jaxalign.alignment.methods import AlignmentSettings
from jaxalign.tasks.aligning import Alignment, ask_teachers, tokens_part


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_stored_tokens_come_in_a_dtype_that_losses_take(dtype):
    a = Alignment("a", "repa", 0, (2, 2, 2), ("there",), None, AlignmentSettings(), lambda step: step)
    stored = {tokens_part("there"): jnp.ones((1, 2, 2, 2, 4), dtype)}
    found = ask_teachers([a], {}, None, stored)["there"]
    assert found.dtype == ("float32" if dtype == "float16" else dtype)
