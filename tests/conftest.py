"""Set up once for every test: run-time shape checks, one shared compilation cache, torchvision beside a CPU torch."""

import os
import tempfile

# Most programs of the suite run once: compiling them quickly matters more than running them quickly. Set before JAX
# starts its backend; processes that tests start inherit it, so bits agree between them.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import jaxtyping
import pytest

# Shapes and dtypes in the signatures of jaxalign are checked while tests run (and only then).
jaxtyping.install_import_hook("jaxalign", "beartype.beartype")

os.environ.setdefault("HF_HUB_OFFLINE", "1")
_CACHE = os.environ.get("JAXALIGN_TEST_CACHE", os.path.join(tempfile.gettempdir(), "jaxalign-test-cache"))
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


from jaxalign.benchmarks import torchvision_ops  # noqa: E402  (behind the hook, so that it is checked too)

_TORCHVISION_OPS = torchvision_ops.define()


@pytest.fixture(autouse=True)
def _clean_matmul_precision():
    """Parity tests want true fp32 matmuls on every platform."""
    with jax.default_matmul_precision("highest"):
        yield
