"""A CogVideoX pipeline of diffusers at tiny size with random weights, and its folder: what tests give to our verbs."""

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

WORDS = ("a", "panda", "plays", "guitar", "cat", "runs")
LENGTH = 6  # tokens of a prompt
SIZE = dict(num_frames=9, height=8, width=16)


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Every weight random, zero-initialised ones too: kernels of about unit gain, norms around 1, biases small."""
    rng, state = np.random.default_rng(seed), {}
    for name, value in model.state_dict().items():
        values = rng.standard_normal(tuple(value.shape))
        if value.ndim == 1:
            values = 1 + 0.2 * values if name.endswith("weight") else 0.3 * values
        else:
            values = values / np.prod(value.shape[1:]) ** 0.5
        state[name] = torch.from_numpy(values.astype(np.float32))
    model.load_state_dict(state)
    return model.eval()


def write_tokenizer(place: Path) -> None:
    """A sentencepiece model of whole words, as T5's tokenizer reads it."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), *(("\u2581" + word, 1) for word in WORDS), ("\u2581", 1)]
    for number, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, score=-float(number), type=kind)
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.bos_id = 0, 1, -1
    place.mkdir(parents=True)
    (place / "spiece.model").write_bytes(model.SerializeToString())
    settings = dict(tokenizer_class="T5Tokenizer", model_max_length=LENGTH, extra_ids=3)
    settings |= dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    (place / "tokenizer_config.json").write_text(json.dumps(settings))


def build(folder: Path, scheduler: str = "ddim", **transformer):
    """The pipeline, also written to `folder` as `save_pretrained` writes it."""
    write_tokenizer(folder / "written" / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder / "written" / "tokenizer"))
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=16, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=24, feed_forward_proj="gated-gelu"
        )
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 8, 8),
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        scaling_factor=0.7,
    )
    student = diffusers.CogVideoXTransformer3DModel(
        **dict(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=16,
            text_embed_dim=16,
            num_layers=2,
            sample_width=4,
            sample_height=2,
            sample_frames=9,
            max_text_seq_length=LENGTH,
        )
        | transformer
    )
    kind = dict(ddim=diffusers.CogVideoXDDIMScheduler, dpm=diffusers.CogVideoXDPMScheduler)[scheduler]
    rules = dict(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    pipeline = diffusers.CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=randomise(encoder, 1),
        vae=randomise(vae, 2),
        transformer=randomise(student, 3),
        scheduler=kind(snr_shift_scale=3.0, clip_sample=False, **rules),
    )
    pipeline.save_pretrained(str(folder / "published"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, folder / "published"
