"""The T5 encoder against transformers: values, gradients, masks, positions, shards, the tokenizer from a folder."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_parity import arrays, bits, close, draw, half, randomise, same_names_and_shapes

from jaxalign import codecs
from jaxalign.codecs import t5
from jaxalign.interop import mapping, safetensors_file
from jaxalign.training import mesh as mesh_lib

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Heads times their channels are not the width; distances reach the last bucket.
TINY = dict(vocabulary=50, width=16, depth=2, num_heads=3, head_dim=4, hidden=24, buckets=8, max_distance=12)
THEIRS = dict(
    vocab_size=50,
    d_model=16,
    num_layers=2,
    num_heads=3,
    d_kv=4,
    d_ff=24,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=12,
)

apply = jax.jit(lambda encoder, tokens, mask: encoder(tokens, mask))


@functools.cache
def theirs():
    model = transformers.T5EncoderModel(transformers.T5Config(**THEIRS, feed_forward_proj="gated-gelu"))
    return randomise(model)


def ours():
    return mapping.load_state_dict(codecs.abstract("t5_xxl", **TINY), arrays(theirs()), t5.RULES)


def tokens(length=21):
    return np.random.default_rng(0).integers(0, 50, (2, length))


def test_embeddings_and_gradients_equal_transformers():
    """Without a mask, as CogVideoX's pipeline: padding is attended to."""
    probe, leaves = draw((2, 21, 16), 1), dict(theirs().named_parameters())
    out = theirs()(torch.from_numpy(tokens())).last_hidden_state
    wanted = torch.autograd.grad((out * torch.from_numpy(probe)).sum(), list(leaves.values()))

    @jax.jit
    def run(encoder):
        def objective(encoder):
            out = encoder(jnp.asarray(tokens()))
            return (out * probe).sum(), out

        return jax.grad(objective, has_aux=True)(encoder)

    gradients, found = run(ours())
    close(found, out)
    named = mapping.state_dict(gradients, t5.RULES)
    for name, gradient in zip(leaves, wanted, strict=True):
        close(named[name], gradient)


def test_a_mask_hides_keys():
    mask = np.arange(21) < np.array([[5], [21]])
    with torch.no_grad():
        out = theirs()(torch.from_numpy(tokens()), attention_mask=torch.from_numpy(mask.astype(np.int64)))
    found = apply(ours(), jnp.asarray(tokens()), jnp.asarray(mask))
    close(found, out.last_hidden_state)
    other = np.where(mask, tokens(), 7)  # what is hidden changes nothing
    close(apply(ours(), jnp.asarray(other), jnp.asarray(mask))[0, :5], np.asarray(found)[0, :5], 1e-6)


@pytest.mark.parametrize(("length", "buckets", "far"), [(300, 32, 128), (40, 8, 12)])
def test_positions_are_transformers(length, buckets, far):
    attention = transformers.models.t5.modeling_t5.T5Attention
    ahead = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    expected = attention._relative_position_bucket(ahead, True, buckets, far)
    np.testing.assert_array_equal(t5.position_buckets(length, buckets, far), expected.numpy())


def test_names_and_sizes_of_the_real_network():
    with torch.device("meta"):
        real = transformers.T5EncoderModel(
            transformers.T5Config(
                d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"
            )
        )
    encoder = codecs.abstract("t5_xxl")
    assert same_names_and_shapes(encoder, t5.RULES, real) == 4_762_310_656
    assert encoder.width == 4096
    found = jax.eval_shape(apply, encoder, jax.ShapeDtypeStruct((2, 226), jnp.int32), None)
    assert found.shape == (2, 226, 4096)
    named = dict(mapping.named_leaves(encoder)[0])
    mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
    placed = mesh_lib.shardings(encoder, t5.SHARDING_RULES, mesh)
    cut = [name for name, place in mapping.named_leaves(placed)[0] if any(place.spec)]
    assert sum(named[name].size for name in cut) > 0.999 * 4_762_310_656


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_go_in_and_out_bit_for_bit(tmp_path, dtype):
    model = transformers.T5EncoderModel(theirs().config)
    model.load_state_dict(theirs().state_dict())
    model.to(dtype).save_pretrained(tmp_path / "text_encoder", max_shard_size="8KB")
    shards = sorted((tmp_path / "text_encoder").glob("*-of-*.safetensors"))
    assert len(shards) > 1
    stored = safetensors_file.open_index(tmp_path / "text_encoder" / "model.safetensors.index.json")
    encoder = codecs.load("t5_xxl", tmp_path, dtype="keep")
    assert encoder.config == t5.T5Config(**TINY)  # the folder's config.json says what it holds
    after = mapping.state_dict(encoder, t5.RULES)
    assert all(bits(after[name]) == bits(stored[name]) for name in stored)
    assert after.keys() - set(stored) == {"encoder.embed_tokens.weight"}  # tied; transformers leaves it out
    assert bits(after["encoder.embed_tokens.weight"]) == bits(stored["shared.weight"])

    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of {len(shards)} shards are not there: {shards[1].name}"):
        codecs.load("t5_xxl", tmp_path)
    (tmp_path / "text_encoder" / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks its index file"):
        codecs.load("t5_xxl", tmp_path)


def test_half_precision():
    encoder = half(ours())
    found = apply(encoder, jnp.asarray(tokens()), None)
    assert found.dtype == jnp.bfloat16
    with torch.no_grad():
        close(found, theirs()(torch.from_numpy(tokens())).last_hidden_state, 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tokenizer as CogVideoX's has one: spiece.model and its config."""
    pytest.importorskip("sentencepiece")
    from transformers.convert_slow_tokenizer import import_protobuf

    model, words = import_protobuf().ModelProto(), ["▁a", "▁panda", "▁dances", "▁", *"acdenps"]
    pieces = [("<pad>", 3), ("</s>", 3), ("<unk>", 2), *((word, 1) for word in words)]
    for index, (piece, kind) in enumerate(pieces):
        model.pieces.add(piece=piece, type=kind, score=-float(index))
    model.trainer_spec.model_type, model.trainer_spec.unk_id = 1, 2
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.bos_id = 0, 1, -1
    place = tmp_path_factory.mktemp("model") / "tokenizer"
    place.mkdir()
    (place / "spiece.model").write_bytes(model.SerializeToString())
    settings = dict(tokenizer_class="T5Tokenizer", model_max_length=226, extra_ids=3)
    settings |= dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return place.parent


def test_tokens_are_padded_and_cuts_counted(folder):
    ids, cut = t5.tokenize(folder, ["a panda dances", "", "a panda dances a panda dances a panda"], max_length=8)
    np.testing.assert_array_equal(ids, [[3, 4, 5, 1, 0, 0, 0, 0], [1, *[0] * 7], [3, 4, 5, 3, 4, 5, 3, 1]])
    assert cut == 1 and ids.dtype == np.int32
    ids, cut = t5.tokenize(folder / "tokenizer", ["a panda"])
    assert ids.shape == (1, 226) and cut == 0
    ids, cut = t5.tokenize(folder, ["a panda dances"], max_length=4)  # just as long as it may be
    assert cut == 0 and ids[0, -1] == 1


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        t5.tokenize(tmp_path, ["a"])
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        t5.tokenize(tmp_path, ["a"])
    with pytest.raises(ValueError, match="must be 'gated-gelu'"):
        t5.settings_from({"feed_forward_proj": "relu"})
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["CLIPTextModel"]}))
    with pytest.raises(ValueError, match="this is a CLIPTextModel; T5EncoderModel is wanted"):
        codecs.load("t5_xxl", tmp_path)
    (tmp_path / "config.json").write_text("[")
    with pytest.raises(ValueError, match="not a model's config"):
        codecs.load("t5_xxl", tmp_path)
