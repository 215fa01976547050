"""Where student meets teacher: relation losses, their named methods, the head between the two token grids."""

from jaxalign.alignment.methods import METHODS, AlignmentSettings, alignment_loss
from jaxalign.alignment.projector import Projector, ProjectorConfig, check_grids
from jaxalign.alignment.relations import cosine_distance, relation_l1, tempered_kl
from jaxalign.alignment.saliency import motion_saliency, select_queries
from jaxalign.alignment.tokens import frame_weights

__all__ = [
    "METHODS",
    "AlignmentSettings",
    "Projector",
    "ProjectorConfig",
    "alignment_loss",
    "check_grids",
    "cosine_distance",
    "frame_weights",
    "motion_saliency",
    "relation_l1",
    "select_queries",
    "tempered_kl",
]
