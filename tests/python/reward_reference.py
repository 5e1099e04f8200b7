"""Makes tests/fixtures/reward: a regression head for the tiny NeMo model, and what it gives for some token ids; needs numpy.

reward_reference.py NEMO_FOLDER OUT_FOLDER. An independent forward pass in float64: LayerNorm1P, half rotary embedding, grouped-query attention,
squared ReLU, then rm_head on the final norm's output at the last token.
"""
import json, pathlib, sys

import numpy as np

source, out = map(pathlib.Path, sys.argv[1:])
LAYERS, HIDDEN, HEADS, GROUPS, DIM, EPS, ATTRIBUTES = 4, 128, 8, 2, 16, 1e-5, 9


def array(name):
    folder = source / "model_weights" / f"model.{name}"
    meta = json.loads((folder / ".zarray").read_text())
    whole = np.zeros(meta["shape"], np.float32)
    grid = [range(size // chunk) for size, chunk in zip(meta["shape"], meta["chunks"])]
    for place in np.ndindex(*map(len, grid)):
        raw = np.fromfile(folder / ".".join(map(str, place)), np.uint16).astype(np.uint32) << 16
        where = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, meta["chunks"]))
        whole[where] = raw.view(np.float32).reshape(meta["chunks"])
    return whole.astype(np.float64)


def norm(x, gamma, beta):
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + EPS) * (1 + gamma) + beta


def rotate(x):  # [tokens, heads, dim]; the first half of each head is rotated, halves paired
    half = DIM // 4
    angle = np.arange(len(x))[:, None] * 10000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], -1)


def last_hidden(ids):
    x = array("embedding.word_embeddings.weight")[ids]
    layers = {name: array(f"decoder.layers.{name}") for name in (
        "self_attention.linear_qkv.layer_norm_weight", "self_attention.linear_qkv.layer_norm_bias",
        "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.layer_norm_bias", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight")}
    mask = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    per_group = HEADS // GROUPS
    for layer in range(LAYERS):
        of = {name: value[layer] for name, value in layers.items()}
        h = norm(x, of["self_attention.linear_qkv.layer_norm_weight"], of["self_attention.linear_qkv.layer_norm_bias"])
        qkv = (h @ of["self_attention.linear_qkv.weight"].T).reshape(len(ids), GROUPS, per_group + 2, DIM)
        q = rotate(qkv[:, :, :per_group].reshape(len(ids), HEADS, DIM))
        k, v = rotate(qkv[:, :, per_group]), qkv[:, :, per_group + 1]
        heads = []
        for head in range(HEADS):
            scores = q[:, head] @ k[:, head // per_group].T / np.sqrt(DIM) + mask
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, head // per_group])
        x = x + np.concatenate(heads, -1) @ of["self_attention.linear_proj.weight"].T
        h = norm(x, of["mlp.linear_fc1.layer_norm_weight"], of["mlp.linear_fc1.layer_norm_bias"])
        x = x + np.maximum(h @ of["mlp.linear_fc1.weight"].T, 0) ** 2 @ of["mlp.linear_fc2.weight"].T
    return norm(x, array("decoder.final_layernorm.weight"), array("decoder.final_layernorm.bias"))[-1]


random = np.random.default_rng(340)
weight = (random.standard_normal((ATTRIBUTES, HIDDEN)) / np.sqrt(HIDDEN)).astype(np.float32)
bias = random.standard_normal(ATTRIBUTES).astype(np.float32)
for name, value in (("weight", weight), ("bias", bias)):
    folder = out / f"model.rm_head.{name}"
    folder.mkdir(parents=True, exist_ok=True)
    meta = dict(zarr_format=2, shape=value.shape, chunks=value.shape, dtype="<f4", compressor=None, fill_value=None, filters=None, order="C")
    (folder / ".zarray").write_text(json.dumps(meta))
    value.tofile(folder / ".".join(["0"] * value.ndim))
texts = [random.integers(4, 1024, size).tolist() for size in (1, 2, 17, 64, 200)]
cases = [{"ids": ids, "rewards": (weight @ last_hidden(ids) + bias).tolist()} for ids in texts]
(out / "expected.json").write_text(json.dumps(cases) + "\n")
