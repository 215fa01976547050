"""All pictures of a comparison of teachers, out of what metrics.teacher_report measured."""

import re
from collections.abc import Sequence
from pathlib import Path

from jaxalign.figures import flow, pca, teacher_plots, trajectories, xt_slices
from jaxalign.metrics.teacher_report import Clips, Measured


def draw(
    measured: Sequence[Measured], clips: Clips, shown: Sequence[int], ks: Sequence[int], folder: Path
) -> list[Path]:
    """PCA maps, trajectories and flow of each shown clip, X-T slices, IICR and spectra as PNGs; returns their paths."""
    tokens = [one for one in measured if not one.is_flow]
    flows = [one for one in measured if one.is_flow]
    written, slices = [], {}
    for k in shown:
        clip, name = clips.videos[k], Path(clips.names[k]).stem
        said = f"{name}, clip {k + 1} of {len(clips.videos)}"
        end = f"{k + 1:02d}_{re.sub(r'[^A-Za-z0-9]+', '-', name)[:40]}.png"
        panels = {one.asked.label: one.shown[k] for one in tokens}
        if tokens:
            written += [folder / f"pca_{end}", folder / f"trajectories_{end}"]
            pca.pca_figure(clip, panels, written[-2], title=f"Principal components of tokens: {said}")
            title = f"Points followed by their tokens: {said}"
            trajectories.trajectory_figure(clip, panels, written[-1], title=title)
        if flows:
            written.append(folder / f"flow_{end}")
            fields = {one.asked.label: one.shown[k] for one in flows}
            flow.flow_figure(clip, fields, written[-1], title=f"Optical flow: {said}")
        colours = {label: pca.principal_colours(found)[0] for label, found in panels.items()}
        slices[f"{name} ({k + 1})"] = clip, colours
    written.append(folder / "xt_slices.png")
    xt_slices.xt_figure(slices, written[-1], title="X-T slices")
    if tokens:
        written.append(folder / "iicr.png")
        teacher_plots.iicr_figure(ks, {one.asked.label: one.iicr for one in tokens}, written[-1])
    if spectra := {one.asked.label: one.spectrum for one in tokens if one.gap is not None}:
        written.append(folder / "spectrum.png")
        teacher_plots.spectrum_figure(spectra, written[-1])
    return written
