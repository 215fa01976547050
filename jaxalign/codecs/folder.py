"""One part of a published folder (diffusers, transformers): its config.json and its weights, in one file or shards.

FOLDER/model_index.json
FOLDER/vae/config.json           FOLDER/vae/diffusion_pytorch_model.safetensors
FOLDER/text_encoder/config.json  FOLDER/text_encoder/model.safetensors.index.json, model-00001-of-00002.safetensors
"""

import json
from pathlib import Path
from typing import Any

from jaxalign.interop.arrays import LazyArrays
from jaxalign.interop.weights import open_weights

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
ENDINGS = (".safetensors.index.json", ".safetensors", ".bin")


def read(path: str | Path, part: str, kinds: tuple[str, ...]) -> tuple[dict[str, Any] | None, LazyArrays]:
    """(config, lazy arrays by name) of FOLDER, FOLDER/`part` or a weights file; a file alone has no config: None.

    `kinds` are the classes that config.json may name. Raises FileNotFoundError for what is not there (a shard, too),
    ValueError for a folder of another model or a file that cannot be read; each says what to give instead.
    """
    path = Path(path)
    if not path.is_dir():
        return None, open_weights(path)
    inside = path / part if (path / part).is_dir() else path
    if inside is path and (path / "model_index.json").is_file():
        raise FileNotFoundError(f"{path}: a pipeline without a folder {part}/; download that part of it too")
    config = _config(inside / "config.json", kinds)
    for name in (stem + ending for ending in ENDINGS for stem in STEMS):
        if (inside / name).is_file():
            return config, open_weights(inside / name)
    shards = sorted(found.name for found in inside.glob("*-of-*.safetensors"))
    lacks = f"{shards[0]} lacks its index file (*.safetensors.index.json)" if shards else "there are no weights in it"
    raise FileNotFoundError(f"{inside}: {lacks}; it wants {STEMS[0]}.safetensors or one of the published names")


def _config(path: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent}: no config.json; give the folder of the model, or the weights file")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        # diffusers writes its class; transformers a list of those that were saved
        found = [config["_class_name"]] if "_class_name" in config else list(config.get("architectures") or [])
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a model's config ({error})") from error
    if found and not set(found) & set(kinds):
        raise ValueError(f"{path}: this is a {found[0]}; {kinds[0]} is wanted")
    return config
