"""Writes tests/fixtures/foreign: one small Nemotron as other software writes checkpoints, and what transformers computes with it in f32.

usage: foreign_checkpoints.py LLAMA_CPP    (a source tree of llama.cpp, for its convert_hf_to_gguf.py)
needs: torch, transformers, zarr<3, gguf, sentencepiece
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
import zarr
from sentencepiece import SentencePieceProcessor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import NemotronConfig, NemotronForCausalLM

ROOT = pathlib.Path(__file__).resolve().parent.parent / "fixtures"
OUT = ROOT / "foreign"
TOKENIZER = ROOT / "golden/tiny-hf/tokenizer.model"
LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD, FFN, VOCAB = 2, 32, 4, 2, 16, 64, 1024
PROMPTS = ["Shall I compare thee", "<extra_id_0>System\n\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\n", "0123 \u00e9\u2603"]


def make_model():
    torch.manual_seed(340)
    config = NemotronConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD, max_position_embeddings=128, partial_rotary_factor=0.5, norm_eps=1e-5,
        tie_word_embeddings=False, bos_token_id=2, eos_token_id=3, pad_token_id=0)
    model = NemotronForCausalLM(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 0.1 if "norm" in name else 2.0 * parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return model


def expected(model):
    """Greedy ids and their log-probabilities in f32."""
    tokenizer = SentencePieceProcessor(str(TOKENIZER))
    # A model that was rounded as a whole has rounded its rotary frequencies too.
    exact = NemotronForCausalLM(model.config).float().eval()
    exact.load_state_dict(model.state_dict())
    model = exact
    cases = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        greedy, logprobs = [], []
        with torch.no_grad():
            for _ in range(24):
                row = torch.log_softmax(model(torch.tensor([ids + greedy])).logits[0, -1], -1)
                greedy.append(int(row.argmax()))
                logprobs.append(float(row.max()))
        cases.append({"prompt": prompt, "ids": ids, "greedy": greedy, "logprobs": logprobs})
    return cases


def nemo_arrays(model):
    """The model's tensors under NeMo's names, layers stacked, with the axis along which tensor parallelism cuts them."""
    state = model.state_dict()
    layers = [{key.split(".", 3)[3]: value for key, value in state.items() if key.startswith(f"model.layers.{i}.")} for i in range(LAYERS)]

    def qkv(layer):
        q, k, v = (layer[f"self_attn.{x}_proj.weight"].view(KV_HEADS, -1, HIDDEN) for x in "qkv")
        return torch.cat([q, k, v], 1).reshape(-1, HIDDEN)

    def stack(of):
        return torch.stack([of(layer) for layer in layers])

    layer = "model.decoder.layers."
    return {
        "model.embedding.word_embeddings.weight": (state["model.embed_tokens.weight"], 0),
        layer + "self_attention.linear_qkv.layer_norm_weight": (stack(lambda x: x["input_layernorm.weight"]), None),
        layer + "self_attention.linear_qkv.layer_norm_bias": (stack(lambda x: x["input_layernorm.bias"]), None),
        layer + "self_attention.linear_qkv.weight": (stack(qkv), 1),
        layer + "self_attention.linear_proj.weight": (stack(lambda x: x["self_attn.o_proj.weight"]), 2),
        layer + "mlp.linear_fc1.layer_norm_weight": (stack(lambda x: x["post_attention_layernorm.weight"]), None),
        layer + "mlp.linear_fc1.layer_norm_bias": (stack(lambda x: x["post_attention_layernorm.bias"]), None),
        layer + "mlp.linear_fc1.weight": (stack(lambda x: x["mlp.up_proj.weight"]), 1),
        layer + "mlp.linear_fc2.weight": (stack(lambda x: x["mlp.down_proj.weight"]), 2),
        "model.decoder.final_layernorm.weight": (state["model.norm.weight"], None),
        "model.decoder.final_layernorm.bias": (state["model.norm.bias"], None),
        "model.output_layer.weight": (state["lm_head.weight"], 0),
    }


def nemo_folder(folder, backend):
    weights = folder / "model_weights"
    weights.mkdir(parents=True)
    (weights / "metadata.json").write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}))
    shutil.copy(TOKENIZER, folder / "0123456789abcdef_nemotron_2_256k.model")
    (folder / "model_config.yaml").write_text(f"""mcore_gpt: true
num_layers: {LAYERS}
hidden_size: {HIDDEN}
ffn_hidden_size: {FFN}
num_attention_heads: {HEADS}
num_query_groups: {KV_HEADS}
kv_channels: {HEAD}
max_position_embeddings: 128
encoder_seq_length: 128
normalization: layernorm1p
layernorm_epsilon: 1.0e-05
activation: squared-relu
bias: false
position_embedding_type: rope
rotary_percentage: 0.5
share_embeddings_and_output_weights: false
tokenizer:
  library: sentencepiece
  model: nemo:0123456789abcdef_nemotron_2_256k.model
  sentencepiece_legacy: false
""")
    return weights


def write_zarr(model, tp):
    weights = nemo_folder(OUT / f"zarr-tp{tp}", "zarr")
    for name, (tensor, axis) in nemo_arrays(model).items():
        chunks = list(tensor.shape)
        if tensor.dim() == 3 or "layers" in name:
            chunks[0] = 1
        if axis is not None:
            chunks[axis] //= tp
        # Megatron Core writes two raw bytes an element and then calls the type bfloat16.
        array = zarr.open(str(weights / name), mode="w", shape=tuple(tensor.shape), chunks=tuple(chunks), dtype="<i2", compressor=None, fill_value=None, write_empty_chunks=True)
        array[:] = tensor.view(torch.int16).numpy()
        metadata = json.loads((weights / name / ".zarray").read_text())
        metadata["dtype"] = "bfloat16"
        (weights / name / ".zarray").write_text(json.dumps(metadata))


def write_torch_dist(rank, world, state, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    placed = {name: distribute_tensor(tensor, mesh, [Replicate() if axis is None else Shard(axis)]) for name, (tensor, axis) in state.items()}
    dcp.save(placed, checkpoint_id=folder)
    dist.destroy_process_group()


def write_fp8(model, name, config, channel, static):
    """Linear layers as FP8 with scales; returns the model with the weights that they stand for."""
    from safetensors.torch import save_file
    folder = OUT / name
    folder.mkdir()
    tensors, rounded = {}, {}
    for key, value in model.state_dict().items():
        if key.endswith("_proj.weight"):
            amax = value.float().abs().amax(1, keepdim=True) if channel else value.float().abs().max().reshape(())
            scale = amax / 448
            codes = (value.float() / scale).to(torch.float8_e4m3fn)
            tensors[key], tensors[f"{key}_scale"] = codes, scale
            if static:
                tensors[key.replace("weight", "input_scale")] = torch.tensor(1.0)
            rounded[key] = (codes.float() * scale).to(torch.bfloat16)
        else:
            tensors[key] = rounded[key] = value.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    full = json.loads((OUT / "transformers/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(full | {"quantization_config": config}, indent=1))
    shutil.copy(TOKENIZER, folder / "tokenizer.model")
    quantized = make_model()
    quantized.load_state_dict(rounded)
    return quantized


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    model = make_model()
    for name, size in [("transformers", "5GB"), ("transformers-sharded", "60KB")]:
        model.save_pretrained(OUT / name, max_shard_size=size)
        shutil.copy(TOKENIZER, OUT / name / "tokenizer.model")
    cases = {"bf16": expected(make_model())}
    for tp in [1, 2, 8]:
        write_zarr(model, tp)
    folder = nemo_folder(OUT / "torch_dist", "torch_dist")
    mp.spawn(write_torch_dist, (2, nemo_arrays(model), str(folder)), 2)
    subprocess.run([sys.executable, f"{sys.argv[1]}/convert_hf_to_gguf.py", OUT / "transformers", "--outtype", "bf16", "--outfile", OUT / "llama.cpp-bf16.gguf"], check=True)
    with tarfile.open(OUT / "archive.nemo", "w:") as archive:
        archive.add(OUT / "zarr-tp2", ".")
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
    config = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    cases["fp8-channel"] = expected(write_fp8(model, "fp8-channel", config, channel=True, static=False))
    config = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    cases["fp8-tensor"] = expected(write_fp8(model, "fp8-tensor", config, channel=False, static=True))
    (OUT / "expected.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
