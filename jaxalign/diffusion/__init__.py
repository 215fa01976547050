"""Noise processes (what the network learns to undo) and samplers (how a video is drawn from it)."""

from jaxalign.diffusion.ddpm import DDPM
from jaxalign.diffusion.flow import RectifiedFlow
from jaxalign.diffusion.process import fixed_times
from jaxalign.diffusion.samplers import SAMPLERS, guided, sample
from jaxalign.diffusion.v_prediction import VPrediction, dynamic_guidance

# `objective` in a config -> the process. Every process has `learn_sigma`, `timesteps_at`, `noise`, `loss_at`
# and `training_loss` with the same signatures, so a task or an evaluation need not know which one it holds.
PROCESSES = {"ddpm": DDPM, "v": VPrediction, "flow": RectifiedFlow}

__all__ = [
    "DDPM",
    "PROCESSES",
    "SAMPLERS",
    "RectifiedFlow",
    "VPrediction",
    "dynamic_guidance",
    "fixed_times",
    "guided",
    "sample",
]
