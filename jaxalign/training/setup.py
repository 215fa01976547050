"""From a resolved config to the objects of a run: student, task, frozen networks. Nothing is trained here."""

import dataclasses
import functools
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxalign import codecs
from jaxalign.alignment.grids import Grid
from jaxalign.alignment.projector import SHARDING_RULES as HEAD_RULES
from jaxalign.codecs import t5
from jaxalign.diffusion import PROCESSES
from jaxalign.models import MODELS, Student
from jaxalign.models import lora as lora_lib
from jaxalign.tasks import aligning
from jaxalign.tasks.denoising import DenoisingTask
from jaxalign.tasks.motion_subspace import MotionSubspaceTask
from jaxalign.training import alignments as alignments_lib
from jaxalign.training import init_from, published, subspaces
from jaxalign.training.mesh import Rules, put, shardings, spread_frozen

DTYPES = {"fp32": jnp.float32, "bf16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a config describes; `student_grid` is (t, h, w) in tokens, `latent_shape` () where there are no latents."""

    task: DenoisingTask | MotionSubspaceTask
    student: Student
    model_config: Any
    frozen: dict[str, Any]
    latent_shape: tuple[int, ...]
    student_grid: Grid

    @property
    def sharding_rules(self) -> list:
        """Of the whole trainable tree: the heads' first, since a student's list may end with a rule for everything."""
        adapters = [] if self.task.lora is None else lora_lib.sharding_rules(jax.eval_shape(self._adapters))
        return [*HEAD_RULES, *adapters, *self.student.sharding_rules]

    def init(self, key) -> dict[str, Any]:
        """Fresh trainable parameters. The student's keys do not depend on whether there is a head."""
        student_key, head_key = jax.random.split(key)
        if self.task.lora is None:
            model = self.student.model(self.model_config, rngs=nnx.Rngs(student_key))
        else:
            model = self._adapters(student_key)
        return {"model": model, "heads": aligning.init_heads(self.task.alignments, head_key)}

    def _adapters(self, key=None):
        student = jax.eval_shape(lambda: self.student.model(self.model_config, rngs=nnx.Rngs(0)))
        return lora_lib.init(student, self.task.lora, jax.random.key(0) if key is None else key)


def build(
    config: ml_collections.ConfigDict,
    *,
    num_classes: int = 0,
    mesh: Mesh | None = None,
    abstract: bool = False,
    with_text: bool = True,
    given: Collection[str] = (),
) -> Run:
    """The run that a resolved config describes; `num_classes` is what the data source has.

    Teachers are loaded only if something is aligned. `mesh`: a text encoder is read straight into its shards;
    not `with_text`: it is left out, where prompts come as embeddings. `given`: what batches hold (`Source.given`);
    teachers whose tokens are among it are not loaded.
    `abstract`: what is frozen has shapes for leaves and no weights are looked for; of folders that are named the sizes
    are read. Raises ValueError or OSError, one line, for sizes that do not divide, grids that do not meet and weights
    that are not there.
    """
    if subspaces.is_subspace(config):
        task, model_config, frozen = subspaces.parts(config, abstract=abstract, given=given)
        task = dataclasses.replace(task, dtype=DTYPES[config.precision])
        frozen = {name: _cast(network, task.dtype) for name, network in frozen.items()}
        return Run(task, subspaces.ENTRY, model_config, frozen, (), model_config.grid)
    student, sizes = _student(config)
    codec = _codec(config, abstract)
    told_by_text = is_told_by_text(config)
    if told_by_text:
        _check_size(config, codec, sizes.get("patch_size", config.model.patch_size))
    latent_shape = codec.latent_shape((config.data.num_frames, config.data.height, config.data.width))
    process = _process(config)
    classes = num_classes if config.model.num_classes == -1 else config.model.num_classes
    if classes and num_classes > classes:
        raise ValueError(
            f"config.model.num_classes = {classes}, but the source has {num_classes} classes; write -1 to take them all"
        )
    if told_by_text:
        classes, told = 0, _told_by_text(config, process, sizes)
    else:
        told = dict(num_classes=classes, learn_sigma=process.learn_sigma)
    shape = dict(
        input_size=latent_shape[1:3],
        num_frames=latent_shape[0],
        patch_size=config.model.patch_size,
        in_channels=latent_shape[3],
        remat=config.remat,
        attention=config.attention,
    )
    model_config = student.config(**(shape | sizes | told))
    task = DenoisingTask(
        process=process,
        num_classes=classes,
        class_dropout=config.model.class_dropout,
        text=told_by_text,
        text_dropout=config.text.dropout,
        dtype=DTYPES[config.precision],
        lora=_lora(config),
    )
    alignments, teachers = alignments_lib.build(
        config, model_config.grid, model_config.width, model_config.depth, abstract=abstract, given=given
    )
    task = dataclasses.replace(task, alignments=alignments)
    frozen = {"codec": codec, "teachers": {key: _cast(teacher, task.dtype) for key, teacher in teachers.items()}}
    if told_by_text:
        frozen |= _text(config, task.dtype, mesh, abstract) if with_text else {}
    if task.lora is not None:
        frozen["base"] = _base(config, student, model_config, task.dtype, mesh, abstract)
    return Run(task, student, model_config, frozen, latent_shape, model_config.grid)


def is_told_by_text(config: ml_collections.ConfigDict) -> bool:
    """Whether the student that a config names is conditioned on text."""
    entry = MODELS.get(config.model.name)
    return entry is not None and any(field.name == "text_tokens" for field in dataclasses.fields(entry.config))


def text_weights(config: ml_collections.ConfigDict) -> str | None:
    """The folder of a run's text encoder and tokenizer; None for an encoder without weights."""
    return None if config.text.encoder == "hash" else config.text.weights or config.codec.weights or None


def place_frozen(frozen: dict[str, Any], mesh: Mesh, student_rules: Rules = ()) -> dict[str, Any]:
    """What a run keeps frozen on a mesh: the text encoder and the base of adapters cut by their rules (the base's are
    the student's), everything else by size (mesh.spread_frozen): the task gathers it where it is used."""
    cut = {"text": t5.SHARDING_RULES, "base": student_rules}
    others = {name: tree for name, tree in frozen.items() if name not in cut}
    others = put(others, spread_frozen(others, mesh))

    def place(x, sharding):
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        return jax.device_put(x, sharding)

    return others | {
        name: jax.tree.map(place, frozen[name], shardings(frozen[name], rules, mesh))
        for name, rules in cut.items()
        if name in frozen
    }


def _student(config):
    """The entry in MODELS and the sizes of the preset."""
    if config.model.name not in MODELS:
        raise ValueError(f"config.model.name = {config.model.name!r}: write one of {', '.join(MODELS)}")
    entry = MODELS[config.model.name]
    if config.model.preset == "folder" and is_told_by_text(config):  # a published one that is none of the presets
        sizes = published.read_sizes(config.init_from.path)
    elif config.model.preset in entry.presets:
        sizes = entry.presets[config.model.preset]
    else:
        raise ValueError(f"config.model.preset = {config.model.preset!r}: write one of {', '.join(entry.presets)}")
    if sizes.get("image_channels"):
        raise ValueError(
            f"config.model.preset = {config.model.preset!r} is told an image too, which no data source here gives; "
            f"write one of {', '.join(name for name, p in entry.presets.items() if not p.get('image_channels'))}"
        )
    # configs/scaling.py names sizes between those of the presets.
    own = {name: config.model[name] for name in ("width", "depth", "num_heads") if config.model.get(name)}
    return entry, sizes | own


def _told_by_text(config, process, sizes) -> dict[str, int]:
    """The student's fields that its text decides, checked against the text encoder's width."""
    if process.learn_sigma:
        raise ValueError(f"config.model.name = {config.model.name!r} predicts no variance: write learn_sigma = False")
    if config.text.encoder not in codecs.TEXT_ENCODERS:
        raise ValueError(
            f"config.text.encoder = {config.text.encoder!r}: {config.model.name!r} is told by text; write one of "
            f"{', '.join(codecs.TEXT_ENCODERS)} (t5_xxl wants its folder: --config.text.weights=FOLDER)"
        )
    given = codecs.abstract(config.text.encoder, text_weights(config)).width
    wanted = sizes.get("text_width", MODELS[config.model.name].config.text_width)
    if given != wanted:
        raise ValueError(
            f"config.text.encoder = {config.text.encoder!r} gives embeddings of width {given}, but "
            f"config.model.preset = {config.model.preset!r} takes {wanted}: change one of them"
        )
    return {"text_tokens": config.text.tokens, "text_width": wanted}


def _check_size(config, codec, patch_size: int) -> None:
    """The pixels of a clip divide into tokens."""
    side = patch_size * getattr(getattr(codec, "config", None), "side_factor", 1)
    size = config.data.height, config.data.width
    if any(length % side for length in size):
        near = "x".join(str(max(1, round(length / side)) * side) for length in size)
        raise ValueError(
            f"config.data: clips of {size[0]}x{size[1]}, but {config.model.name!r} with codec {config.codec.name!r} "
            f"wants multiples of {side}; the nearest size is {near}"
        )


def _codec(config, abstract: bool):
    c = config.codec
    settings = {"tiling": True} if c.tiling else {}
    if abstract:
        return _cast(codecs.abstract(c.name, c.weights or None, **settings), DTYPES[c.precision])
    # In fp32 whatever the file has: half of the published ones are stored in half precision.
    return codecs.load(c.name, c.weights or None, dtype=DTYPES[c.precision], **settings)


def _text(config, dtype, mesh: Mesh | None, abstract: bool) -> dict[str, Any]:
    """The frozen text encoder in the compute dtype, and the tokens of the empty prompt."""
    name, weights, length = config.text.encoder, text_weights(config), config.text.tokens
    if abstract:
        null = jax.ShapeDtypeStruct((length,), np.int32)
        return {"text": _cast(codecs.abstract(name, weights), dtype), "null_prompt": null}
    null = codecs.tokenize(name, weights, [""], length)[0][0]
    options = {}
    if mesh is not None:
        options["sharding"] = lambda path, shape: shardings(
            {path: jax.ShapeDtypeStruct(shape, dtype)}, t5.SHARDING_RULES, mesh
        )[path]
    return {"text": codecs.load(name, weights, dtype=dtype, **options), "null_prompt": null}


def _lora(config) -> lora_lib.LoRA | None:
    """The adapters that config asks for; a config of before them has none."""
    section = config.get("lora", {})
    if not section.get("rank"):
        return None
    return lora_lib.LoRA(section.rank, float(section.alpha), section.sites or lora_lib.SITES[config.model.name])


def _base(config, student, model_config, dtype, mesh: Mesh | None, abstract: bool):
    """The frozen student under the adapters, in the compute dtype and in its shards from the beginning."""
    if abstract:
        return _cast(jax.eval_shape(lambda: student.model(model_config, rngs=nnx.Rngs(0))), dtype)
    place = None if mesh is None else functools.partial(shardings, rules=student.sharding_rules, mesh=mesh)
    return init_from.base(config, student, model_config, place, dtype)


def _cast(module, dtype):
    """The module in `dtype`, shapes or arrays."""
    cast = functools.partial(aligning.cast, dtype=dtype)
    shapes = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(module))
    return jax.eval_shape(cast, module) if shapes else cast(module)


def _process(config):
    options = {"ddpm": {"learn_sigma": config.learn_sigma}, "v": {"snr_shift": config.snr_shift}}
    return PROCESSES[config.objective](**options.get(config.objective, {}))
