"""Write the golden files beside this script from the public Latte diffusion code (needs torch).

    python tests/diffusion/make_golden.py PATH_OF_A_LATTE_CHECKOUT

The checkout (github.com/Vchitect/Latte; the files were made with commit b27c24a) is only read. Stored are
numbers that it computes: training losses with their gradients, ends of sampling chains, spacings. It is run
in float64 (its tables stay fp32), so what a test sees as a difference is our own rounding.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch
from toy_denoiser import toy_denoiser

HERE = pathlib.Path(__file__).parent
LOSSES = {  # name -> create_diffusion settings
    "epsilon_learned": {},
    "epsilon_fixed": {"learn_sigma": False},
    "sample_learned": {"predict_xstart": True},
}
CHAINS = {  # name -> create_diffusion settings, method, its options
    "ddim50": ({"timestep_respacing": "ddim50"}, "ddim_sample_loop", {}),
    "ddim50_eta": ({"timestep_respacing": "ddim50"}, "ddim_sample_loop", {"eta": 0.7}),
    "ddim_even": ({"timestep_respacing": "12"}, "ddim_sample_loop", {}),
    "ddpm_learned": ({"timestep_respacing": "50"}, "p_sample_loop", {}),
    "ddpm_clip": ({"timestep_respacing": "50"}, "p_sample_loop", {"clip_denoised": True}),
    "ddpm_large": ({"timestep_respacing": "50", "learn_sigma": False}, "p_sample_loop", {}),
    "ddpm_small": (
        {"timestep_respacing": "50", "learn_sigma": False, "sigma_small": True},
        "p_sample_loop",
        {},
    ),
    "ddpm_sample": ({"timestep_respacing": "50", "predict_xstart": True}, "p_sample_loop", {}),
}


def load_upstream(checkout):
    """Import the checkout's `diffusion` package under another name, without touching sys.path."""
    folder = pathlib.Path(checkout) / "diffusion"
    spec = importlib.util.spec_from_file_location(
        "latte_diffusion", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["latte_diffusion"] = module
    spec.loader.exec_module(module)
    return module


def to_upstream(video):
    """[b,t,h,w,c] -> Latte's [b,t,c,h,w] in torch, float64."""
    return torch.as_tensor(video).double().permute(0, 1, 4, 2, 3)


def from_upstream(video):
    return video.permute(0, 1, 3, 4, 2)


def to_numpy(values):
    return values.detach().float().contiguous().numpy()


def toy_network(learn_sigma):
    return lambda x, t: to_upstream(toy_denoiser(torch, from_upstream(x), t.double(), learn_sigma))


def training_losses(upstream, rng):
    timesteps = np.array([0, 0, 1, 37, 500, 999])
    shape = (len(timesteps), 2, 3, 2, 3)
    x0 = np.clip(rng.normal(size=shape) * 0.7, -1, 1).astype(np.float32)  # its ends meet the open outer bins
    eps = rng.normal(size=shape).astype(np.float32)
    arrays = {"x0": x0, "eps": eps, "timesteps": timesteps.astype(np.int32)}
    for name, settings in LOSSES.items():
        diffusion = upstream.create_diffusion("", **settings)
        kept = []

        def network(x, t, settings=settings, kept=kept):
            output = toy_network(settings.get("learn_sigma", True))(x, t).detach().requires_grad_()
            kept.append(output)
            return output

        terms = diffusion.training_losses(network, to_upstream(x0), torch.as_tensor(timesteps), noise=to_upstream(eps))
        terms["loss"].sum().backward()
        for term, value in terms.items():
            arrays[f"{name}/{term}"] = to_numpy(value)
        arrays[f"{name}/gradient"] = to_numpy(from_upstream(kept[0].grad))
    return arrays


def sampling_chains(upstream, rng):
    shape = (2, 2, 2, 2, 3)
    noise = rng.normal(size=shape).astype(np.float32)
    steps = rng.normal(size=(50, *shape)).astype(np.float32)
    arrays = {"noise": noise, "step_noise": steps}
    for name, (settings, method, options) in CHAINS.items():
        settings = dict(settings)
        diffusion = upstream.create_diffusion(settings.pop("timestep_respacing"), **settings)
        queue = iter(steps)
        drawn, torch.randn_like = torch.randn_like, lambda x, queue=queue: to_upstream(next(queue))
        end = getattr(diffusion, method)(
            toy_network(settings.get("learn_sigma", True)),
            to_upstream(noise).shape,
            to_upstream(noise),
            device="cpu",
            **{"clip_denoised": False, **options},
        )
        torch.randn_like = drawn
        arrays[name] = to_numpy(from_upstream(end))
    return arrays


def spacings(upstream):
    """One number for each count of steps (0 where there is no such spacing), and two spacings in full."""

    def digest(spec):
        try:
            kept = sorted(upstream.space_timesteps(1000, spec))
        except ValueError:
            return 0
        return sum((place + 1) * timestep for place, timestep in enumerate(kept))

    counts = range(2, 1001)
    return {
        "even": np.array([digest(str(count)) for count in counts]),
        "ddim": np.array([digest(f"ddim{count}") for count in counts]),
        "even_50": np.array(sorted(upstream.space_timesteps(1000, "50"))),
        "ddim_50": np.array(sorted(upstream.space_timesteps(1000, "ddim50"))),
    }


def main(checkout):
    upstream = load_upstream(checkout)
    rng = np.random.default_rng(0)
    np.savez_compressed(HERE / "golden_losses.npz", **training_losses(upstream, rng))
    np.savez_compressed(HERE / "golden_chains.npz", **sampling_chains(upstream, rng))
    np.savez_compressed(HERE / "golden_spacings.npz", **spacings(upstream))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/diffusion/make_golden.py PATH_OF_A_LATTE_CHECKOUT")
    main(sys.argv[1])
