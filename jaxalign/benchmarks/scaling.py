"""A config on 1 to 256 devices that need not be there: memory, flops, communication, and the time a step would take.

    python -m jaxalign.benchmarks.scaling --config configs/tsa.py:vdit_l --devices 1,2,4,8,16,32,64,128,256
    python -m jaxalign.benchmarks.scaling --config configs/tsa.py:cogvideox_2b --mesh=fsdp=8,data=-1 --devices 8,64,256
    python -m jaxalign.benchmarks.scaling --config configs/tsa.py:cogvideox_2b --mesh=context --devices 1,2,4 --chip v6e

The real step, teachers and codec included, is compiled for so many forced CPU devices (jaxalign/benchmarks/lowering.py
says what that tells of an accelerator). Every row of the mesh (data × fsdp) gets --clips clips, so the batch grows with
data and fsdp and a clip is shared along context and tensor. Printed as Markdown; in --out: scaling.csv, scaling.png.
The times are arithmetic (jaxalign/benchmarks/predict.py), on an assumed share of the chip's peak: --efficiency.
"""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from matplotlib.figure import Figure
from ml_collections import config_flags

from jaxalign.benchmarks import lowering
from jaxalign.benchmarks.predict import EFFICIENCY, predict
from jaxalign.training import chips
from jaxalign.training import config as config_lib
from jaxalign.training.mesh import AXES

COLUMNS = {  # name in the CSV -> (head of the Markdown table, form)
    "devices": ("devices", "{}"),
    "mesh": ("mesh", "{}"),
    "batch_size": ("batch", "{}"),
    "memory_gb": ("GB a device", "{:.2f}"),
    "arguments_gb": ("of which held", "{:.2f}"),
    "fits": ("fits", "{}"),
    "device_tflop": ("TFLOP a device", "{:.2f}"),
    "shared": ("of the step's", "1/{:.2f}"),
    "sent_gb": ("GB sent", "{:.3f}"),
    "compute_s": ("compute, s", "{:.3f}"),
    "communication_s": ("communication, s", "{:.3f}"),
    "overlapped_s": ("step, s: hidden", "{:.3f}"),
    "exposed_s": ("exposed", "{:.3f}"),
    "clips_per_second": ("clips/s: exposed", "{:.2f}"),
}


def mesh_sizes(text: str) -> dict[str, int]:
    """'fsdp' -> {'fsdp': -1}, 'fsdp=8,data=-1' -> both; empty: {}. Raises ValueError for an axis that no mesh has."""
    sizes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if axis not in AXES:
            raise ValueError(f"--mesh={text}: no axis {axis!r}; the axes are {', '.join(AXES)}")
        sizes[axis] = int(size or -1)
    return sizes


def numbers(found: Mapping[str, Any], chip: chips.Chip, efficiency: float) -> dict[str, Any]:
    """A row: what `lowering.lower` found and what follows from it on a chip."""
    p = predict(found, chip, efficiency=efficiency)
    by_axes = {f"sent_{axes}_gb": size / 1e9 for (axes,), size in lowering.wire_by(found, "axes").items()}
    return {
        "devices": found["devices"],
        "mesh": " · ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one",
        "batch_size": found["batch_size"],
        "memory_gb": lowering.memory_of(found) / 1e9,
        "arguments_gb": found["memory"]["arguments"] / 1e9,
        "fits": "yes" if p.fits else "no",
        "device_tflop": found["device_flops"] / 1e12,
        "shared": found["flops"]["step"] / found["device_flops"],
        "sent_gb": sum(by_axes.values()),
        "compute_s": p.compute,
        "memory_s": p.memory,
        "communication_s": p.communication,
        "overlapped_s": p.overlapped,
        "exposed_s": p.exposed,
        "clips_per_second": found["batch_size"] / p.exposed,
        "tokens_per_second": found["batch_size"] * found["tokens"] / p.exposed,
        "mfu": found["flops"]["model"] / found["devices"] / p.exposed / chip.flops,
        **by_axes,
    }


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """All numbers of all rows; an axis that a row does not send along is 0."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval=0)
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[Mapping[str, Any]], chip: chips.Chip, title: str) -> Figure:
    """Memory, bytes sent by axes, and the bounds of the time of a step, over the number of devices."""
    x = [row["devices"] for row in rows]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title)
    memory, sent, seconds = figure.subplots(1, 3)

    held, whole = ([row[name] for row in rows] for name in ("arguments_gb", "memory_gb"))
    memory.fill_between(x, 0, held, color="tab:blue", alpha=0.45, label="held (parameters, optimizer, frozen, batch)")
    memory.fill_between(x, held, whole, color="tab:orange", alpha=0.45, label="temporary (upper bound)")
    memory.plot(x, whole, "o-", color="tab:orange", markersize=4)
    for count, size in zip(x, whole, strict=True):
        memory.annotate(
            f"{size:.1f}", (count, size), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8
        )
    memory.axhline(chip.memory / 1e9, color="black", linestyle="--", linewidth=1)
    memory.annotate(chip.name, (x[0], chip.memory / 1e9), xytext=(2, 3), textcoords="offset points")
    memory.set(title="memory of a device", ylabel="GB", ylim=(0, 1.35 * max(*whole, chip.memory / 1e9)))

    axes = list(dict.fromkeys(name for row in rows for name in row if name.startswith("sent_") and name != "sent_gb"))
    for name in axes:
        label = name.removeprefix("sent_").removesuffix("_gb")
        sent.plot(x, [row.get(name, 0.0) for row in rows], "o-", markersize=4, label=f"along {label}")
    most = max((row.get(name, 0.0) for row in rows for name in axes), default=0.0)
    sent.set(title="sent by a device in a step", ylabel="GB", ylim=(0, 1.35 * most or 1.0))

    low, high = ([row[name] for row in rows] for name in ("overlapped_s", "exposed_s"))
    seconds.fill_between(x, low, high, color="tab:green", alpha=0.3)
    seconds.plot(x, high, "o-", color="tab:green", markersize=4, label="communication exposed")
    seconds.plot(x, low, "o--", color="tab:green", markersize=4, label="hidden")
    seconds.plot(x, [row["compute_s"] for row in rows], ":", color="black", label="compute alone")
    seconds.set(title=f"predicted time of a step on {chip.name}", ylabel="s", ylim=(0, 1.3 * max(high)))

    for part in (memory, sent, seconds):
        part.set_xscale("log", base=2)
        part.set_xticks(x, [str(count) for count in x])
        part.minorticks_off()
        part.set_xlabel("devices")
        part.grid(alpha=0.3)
        if part.get_legend_handles_labels()[0]:
            part.legend(loc="upper right", fontsize="small")
    return figure


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise ValueError(f"{argv[1]!r}: not understood; everything here is a --flag")
    values = flags.FLAGS
    if values.config is None:
        raise ValueError("--config is missing; write for example --config configs/tsa.py:vdit_l")
    if values.chip not in chips.CHIPS:
        raise ValueError(f"--chip={values.chip}: write one of {', '.join(chips.CHIPS)}")
    chip, sizes = chips.CHIPS[values.chip], mesh_sizes(values.mesh)
    configs = [lowering.planned(values.config, int(count), values.clips, **sizes) for count in values.devices]
    name = config_flags.get_config_filename(values["config"])
    print(f"{name}: {values.clips} clip(s) a row of the mesh, {configs[0].precision}, chip {chip.name}, ", end="")
    print(f"{values.efficiency:.0%} of its peak assumed", end="\n\n")
    heads = [head for head, _ in COLUMNS.values()]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}", flush=True)
    rows = []
    for found in lowering.lower_all(configs):
        rows.append(numbers(found, chip, values.efficiency))
        print("| " + " | ".join(f.format(rows[-1][key]) for key, (_, f) in COLUMNS.items()) + " |", flush=True)
    folder = Path(values.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(rows, folder / "scaling.csv")
    plot(rows, chip, f"{Path(name).name}, {values.clips} clip(s) a row of the mesh").savefig(
        folder / "scaling.png", dpi=150
    )
    print(f"\n{folder / 'scaling.csv'}\n{folder / 'scaling.png'}")
    return 0


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Config file, with a scale after a colon.", lock_config=True)
    flags.DEFINE_list("devices", ["1", "2", "4", "8"], "Numbers of devices, up to 256.")
    flags.DEFINE_string("mesh", "", "fsdp, data, context=-1, fsdp=8,data=-1, ...; default: the config's.")
    flags.DEFINE_string("chip", "h100", f"One of {', '.join(chips.CHIPS)}.")
    flags.DEFINE_integer("clips", 1, "Clips of a batch on each row of the mesh (data × fsdp).")
    flags.DEFINE_float("efficiency", EFFICIENCY, "Assumed share of the chip's peak that the computation reaches.")
    flags.DEFINE_string("out", "runs/scaling", "Folder of the CSV and the plot.")
    config_lib.run_verb(main)
