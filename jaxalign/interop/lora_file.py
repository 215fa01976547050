"""LoRA files as peft writes and diffusers' `load_lora_weights` reads them.

    transformer.transformer_blocks.0.attn1.to_q.lora_A.weight   [rank, in]
    transformer.transformer_blocks.0.attn1.to_q.lora_B.weight   [out, rank]
    header: lora_adapter_metadata = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": ...}

For CogVideoX diffusers takes alpha from that entry of the header and from nothing else: it hands it to peft's
LoraConfig (0.42.1: loaders/peft.py load_lora_adapter, utils/peft_utils.py _create_lora_config) and refuses `.alpha`
keys. A reader that does not know the entry takes alpha = rank, that is scale 1.

kohya's scripts, and CogVideoX-Fun after them, write a site in one word and alpha as a tensor:

    lora_unet_transformer_blocks_0_attn1_to_q.lora_down.weight, .lora_up.weight, .alpha
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from jaxalign.interop import mapping, safetensors_file, sniff
from jaxalign.interop.rules import Rule, Stack
from jaxalign.interop.weights import open_weights

NAME = "pytorch_lora_weights.safetensors"
PREFIX = "transformer"
METADATA = "lora_adapter_metadata"
_PEFT = "adapter_model.safetensors", "adapter_config.json"
_PREFIXES = r"^(transformer|diffusion_model|base_model\.model|module)\."
_FLAT = re.compile(r"^lora_(unet|transformer|te\d?)_+([^.]+)\.")  # a site in one word; te: of the text encoder
_WORDS = {"lora_down": "lora_A", "lora.down": "lora_A", "lora_up": "lora_B", "lora.up": "lora_B"}


class File(NamedTuple):
    """What a LoRA file says: arrays by upstream's name, rank and alpha."""

    arrays: Mapping[str, np.ndarray]
    rank: int
    alpha: float


def write(
    path: str | Path, adapters: Mapping, rules: Sequence[Rule], *, rank: int, alpha: float | int, dtype: Any = None
) -> Path:
    """Adapters as one file; `rules` are their network's. Raises as `safetensors_file.write`."""
    arrays = mapping.state_dict(dict(adapters), _stacks(rules), dtype=dtype)
    modules = _sites(arrays)
    about = {"r": rank, "lora_alpha": int(alpha) if alpha == int(alpha) else alpha, "target_modules": modules}
    notes = {METADATA: json.dumps({f"{PREFIX}.{name}": value for name, value in about.items()}, sort_keys=True)}
    safetensors_file.write(path, {f"{PREFIX}.{name}": array for name, array in arrays.items()}, notes=notes)
    return Path(path)


def load(
    path: str | Path, adapters: Mapping, rules: Sequence[Rule], *, alpha: float | int, sharding: Any = None
) -> Any:
    """The numbers of a file in place of those of `adapters`, abstract or not, whose sites and shapes they must have.

    `path`: the file, or a folder that diffusers or peft saved; `sharding` as in `mapping.load_state_dict`. Raises
    ValueError, with the settings to write, for another rank, alpha, network or other sites; FileNotFoundError.
    """
    found = read(path, _sites(mapping.upstream_shapes(dict(adapters), _stacks(rules))))
    rank = next(iter(adapters.values()))["lora_A"]["kernel"].shape[-1]
    if found.rank != rank or not math.isclose(found.alpha, alpha, rel_tol=1e-5):  # six digits, as they are printed
        raise ValueError(
            f"{path}: rank {found.rank} and alpha {found.alpha:g}, here {rank} and {alpha:g}; write "
            f"--config.lora.rank={found.rank} --config.lora.alpha={found.alpha:g}"
        )
    try:
        return mapping.load_state_dict(dict(adapters), found.arrays, _stacks(rules), sharding=sharding)
    except ValueError as error:
        sites = sorted({re.sub(r"\.\d+\.", ".*.", name) for name in _sites(found.arrays)})
        raise ValueError(f"{path}: {error}; it is of {', '.join(sites[:6])}: write config.lora.sites so") from None


def read(path: str | Path, sites: Sequence[str] = ()) -> File:
    """Whatever peft or diffusers saved, and what kohya's scripts did of these `sites`, by upstream's names: one word
    does not say where its dots were. Raises ValueError for what is not plain LoRA of one scale."""
    path, flat = Path(path), {site.replace(".", "_"): site for site in sites}
    if path.is_dir():
        path = next((path / name for name in (NAME, _PEFT[0]) if (path / name).is_file()), path)
    arrays = open_weights(path)
    about = _about(path)
    weights, alphas = {}, set()
    for name in arrays:
        short = re.sub(_PREFIXES, "", name)
        if word := _FLAT.match(short):
            if word[2] not in flat:
                asked = ", ".join([*flat][:4]) + (", ..." if len(flat) > 4 else "")
                raise ValueError(
                    f"{path}: {name!r} is of no site that is asked ({asked}): write config.lora.sites as the file has "
                    "them; adapters of a text encoder are not read"
                )
            short = f"{flat[word[2]]}.{short[word.end() :]}"
        for theirs, ours in _WORDS.items():
            short = short.replace(theirs, ours)
        short = re.sub(r"(\.lora_[AB])\.[^.]+\.weight$", r"\1.weight", short)  # peft's name of the adapter
        if short.endswith(".alpha"):
            alphas.add(float(np.asarray(arrays[name])))
        elif re.search(r"\.lora_[AB]\.weight$", short):
            weights[short] = arrays[name]
        else:
            raise ValueError(f"{path}: {name!r} is no plain LoRA weight ('...lora_A.weight', '...lora_B.weight')")
    ranks = {array.shape[0] for name, array in weights.items() if name.endswith("lora_A.weight")}
    odd = [k for k in ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias") if about.get(k)]
    if len(ranks) != 1 or len(alphas) > 1 or odd:
        what = odd or ([f"ranks {sorted(ranks)}"] if len(ranks) != 1 else [f"alphas {sorted(alphas)}"])
        raise ValueError(f"{path}: {what[0]}; only plain LoRA of one rank and one alpha is read")
    (rank,) = ranks
    alpha = float(about.get("lora_alpha", alphas.pop() if alphas else rank))
    return File(weights, rank, alpha * rank**0.5 if about.get("use_rslora") else alpha)


def _about(path: Path) -> dict[str, Any]:
    """peft's settings: from the file's header, or from adapter_config.json beside it."""
    found = {}
    if sniff.kind(path) == sniff.SAFETENSORS:
        with safe_open(path, framework="numpy") as file:
            found = json.loads((file.metadata() or {}).get(METADATA, "{}"))
    if not found and (path.parent / _PEFT[1]).is_file():
        found = json.loads((path.parent / _PEFT[1]).read_text(encoding="utf-8"))
    return {name.removeprefix(PREFIX + "."): value for name, value in found.items()}


def _sites(names: Iterable[str]) -> list[str]:
    """The sites of adapters by the names of their weights."""
    return sorted({name.split(".lora_")[0] for name in names})


def _stacks(rules: Sequence[Rule]) -> list[Rule]:
    """Of a network's rules those about names; its tables are not the adapters'."""
    return [rule for rule in rules if isinstance(rule, Stack)]
