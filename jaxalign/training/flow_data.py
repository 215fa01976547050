"""The clips of the task motion_subspace with their flow beside them: exact, by OpenCV, stored, or not yet computed."""

import dataclasses
import functools

import ml_collections

from jaxalign import teachers
from jaxalign.data import host_flow, precomputed, precomputed_source
from jaxalign.data.clips import Source
from jaxalign.data.sources import open_source
from jaxalign.tasks.motion_subspace import FLOW_PART, TARGET_PART
from jaxalign.training import contents, subspaces
from jaxalign.training.data_settings import source_settings
from jaxalign.training.subspaces import FLOW_NETWORKS, ON_HOST

STORED = "flow_target"  # precompute's name for it


def open_with_flow(config: ml_collections.ConfigDict) -> Source:
    """config.data.source whose batches have the flow beside the clips, unless a network computes it while training.

    Of a precomputed folder the stored flow targets are taken. Raises ValueError or OSError, one line; ImportError
    where OpenCV is asked and not installed.
    """
    source, flow = open_source(config.data.source, **source_settings(config)), config.motion.flow.name
    if source.recall is not None:
        return _stored(config, source.name)
    if flow == "exact" and source.render is None:
        raise ValueError(
            f"config.motion.flow.name = 'exact', but data.source = {source.name!r} does not know the flow of its "
            f"clips: write dis, or one of {', '.join(FLOW_NETWORKS)}"
        )
    if flow == "dis":
        host_flow.opencv()
    if flow not in ON_HOST:
        return source
    return dataclasses.replace(source, beside=functools.partial(ON_HOST[flow], FLOW_PART))


def _stored(config, path: str) -> Source:
    """Clips and flow targets of a precomputed folder, made by the flow network and for the clips that config names.

    Raises ValueError, one line, for a network, settings or clips of another kind: what differs, with both values.
    """
    folder = precomputed.open_folder(path)
    contents.refuse_clips(folder, config)
    video, target = folder.series.get("video"), folder.series.get(STORED)
    if video is None or target is None:
        raise ValueError(f"data.source={path!r} lacks {'videos' if video is None else 'flow'}: add --what=video,flow")
    name, weights, settings = subspaces.asked_flow(config)
    made = target.fields["flow.name"]
    if made != name:
        raise ValueError(
            f"data.source={path!r} holds flow of {made}: write --config.motion.flow.name={made}, or give the videos "
            "themselves"
        )
    network = teachers.abstract(name, weights, **settings)
    asked = contents.of_teacher(name, weights, network, config.precision, "flow")
    contents.refuse(folder, target.fields, asked, "flow targets")
    frames = subspaces.token_frames(config)
    if target.shape[0] != frames:
        raise ValueError(
            f"data.source={path!r} holds flow of {target.shape[0]} token frames, config.teacher makes {frames}: "
            "precompute it with this config, into another folder"
        )
    return precomputed_source.taken(
        folder, {"video": video, TARGET_PART: target}, None, [f"flow of {made} is not computed"]
    )
