"""Everything about devices that only a device can prove, in one go; see gpu-check.

    gpu_check.py PACK OUT     PACK is what `gpu-check pack` made

Each step has a time limit and a log in OUT, and is ok, FAILED or skipped with the reason. GPU_CHECK=small measures small shapes, for
a run without a device.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

PACK, OUT = (os.path.abspath(path) for path in sys.argv[1:3])
SMALL = os.environ.get("GPU_CHECK") == "small"
NEMOTRON = os.path.join(PACK, "nemotron")
# What rounding to bf16 moves a log-probability of the golden model by, at most.
LOGPROB_LIMIT = 0.05
# Shares of the measured ceilings that one rank of the large model must reach.
DECODE_SHARE, PREFILL_SHARE = {1: 0.85, 8: 0.85, 64: 0.80}, {2048: 0.60}


class Skip(Exception):
    pass


def libraries():
    """cuBLASLt and NCCL come with PyTorch."""
    import sysconfig

    site = os.path.join(sysconfig.get_paths()["purelib"], "nvidia")
    folders = [os.path.join(site, name, "lib") for name in (os.listdir(site) if os.path.isdir(site) else [])]
    return ":".join(folder for folder in folders if os.path.isdir(folder))


ENVIRONMENT = {**os.environ, "NEMOTRON_RUN_ROOT": os.path.join(OUT, "runs"), "HOME": OUT}
ENVIRONMENT.setdefault("NEMOTRON_CUDA_LIBS", libraries())


def command(arguments, limit, log):
    """Standard output of a command that must succeed."""
    with open(os.path.join(OUT, log + ".log"), "w") as errors:
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=errors, timeout=limit, env=ENVIRONMENT, text=True)
    assert done.returncode == 0, f"exit code {done.returncode}, see {log}.log: {done.stdout[-500:]}"
    return done.stdout


class Server:
    """`nemotron serve` on the device."""

    def __init__(self, model, log, kv_tokens):
        self.errors = open(os.path.join(OUT, log + ".log"), "w")
        arguments = [NEMOTRON, "serve", "--profile", "h100x1", "--model", model, "--port", "0", "--no-auth", "--set", f"limits.kv_tokens={kv_tokens}"]
        self.process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=self.errors, env=ENVIRONMENT, text=True)
        self.url = self.process.stdout.readline().strip().rstrip("/")
        assert self.url.startswith("http"), f"no server, see {log}.log"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(60)

    def put(self, sentences, tokens, **more):
        body = {"sentences": sentences, "tokens_to_generate": tokens, "min_tokens_to_generate": tokens, "temperature": 1.0, "top_k": 1, "top_p": 0.0,
                "greedy": True, "add_BOS": False, "repetition_penalty": 1.0, "end_strings": ["<extra_id_1>"], **more}
        request = urllib.request.Request(self.url + "/generate", json.dumps(body).encode(), {"content-type": "application/json"}, method="PUT")
        answer = json.load(urllib.request.urlopen(request, timeout=300))
        assert isinstance(answer, dict), answer
        return answer


def gpu():
    try:
        fields = "name,driver_version,memory.total,clocks.max.sm,clocks.max.mem"
        return {"device": command(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], 30, "gpu").strip()}
    except FileNotFoundError:
        raise Skip("there is no nvidia-smi") from None


def doctor():
    return json.loads(command([NEMOTRON, "doctor", "--json", "--profile", "h100x1"], 60, "doctor"))


def kernels():
    return json.loads(command([sys.executable, os.path.join(PACK, "gpu_kernels.py"), os.path.join(PACK, "images"), os.path.join(PACK, "args.h")], 120, "kernels"))


def golden():
    """Whole-model parity with transformers in f32, recorded; and a row's bytes alone and in a batch."""
    with open(os.path.join(PACK, "expected.json")) as file:
        cases = json.load(file)
    new = 8 if SMALL else 32
    worst, equal = 0.0, []
    with Server(os.path.join(PACK, "tiny-hf"), "golden", 32768) as server:
        alone = []
        for case in cases:
            reply = server.put([case["prompt"]], new, all_probs=True, compute_logprob=True)
            found, count = reply["full_logprob"][0][len(case["ids"]) - 1], len(case["ids"])
            worst = max(worst, *(abs(f - (e - case["last_logsumexp"])) for f, e in zip(found, case["logits_last_first16"])))
            same = reply["token_ids"][0] == case["ids"] + case["greedy32"][:new]
            equal.append(same)
            # Where the runner-up is nearer than what rounding moves, another token may win.
            assert same or case["greedy32_min_margin"] < 0.02, f"other tokens for {case['prompt']!r}"
            alone.append(server.put([case["prompt"]], new, compute_logprob=True))
        rows = 8 if SMALL else 64
        with ThreadPoolExecutor(rows) as clients:
            ask = lambda i: server.put([cases[i % len(cases)]["prompt"]], new, compute_logprob=True)
            for i, reply in enumerate(clients.map(ask, range(rows))):
                assert reply == alone[i % len(cases)], f"row {i} of {rows} at once is another than alone"
    assert worst <= LOGPROB_LIMIT, f"log-probabilities differ by {worst}"
    return {"ids_equal": equal, "logprob_error": worst, "batch_equals_alone": rows}


def rank():
    shapes = ["--layers", "1", "--batch", "1", "--batch", "4", "--prompt-tokens", "32", "--context", "40"] if SMALL else []
    model = ["--model", os.path.join(PACK, "tiny-hf"), "--tp", "1", "--pp", "1"] if SMALL else []
    profile = "h100x1" if SMALL else "h100x16"
    measured = json.loads(command([NEMOTRON, "bench", "rank", "--profile", profile, "--stage", "0", "--json", *model, *shapes], 240, "rank"))
    if not SMALL:
        missed = [f"{kind} {size}: {steps[str(size)]['share']:.2f} < {share}"
                  for kind, shares in (("decode", DECODE_SHARE), ("prefill", PREFILL_SHARE))
                  for steps in [measured[kind]] for size, share in shares.items() if steps[str(size)]["share"] < share]
        measured["missed"] = missed
    return measured


SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4},
    "8b": {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}


def transformers(name):
    """The same random weights in transformers and here: log-probabilities, and tokens/s of decoding at batch 1 and 32."""
    try:
        import torch
        from transformers import NemotronConfig, NemotronForCausalLM
    except ImportError as error:
        raise Skip(str(error)) from None
    if not torch.cuda.is_available():
        raise Skip("PyTorch sees no device")
    torch.manual_seed(340)
    vocab = 32768
    config = NemotronConfig(vocab_size=vocab, max_position_embeddings=4096, partial_rotary_factor=0.5, torch_dtype="bfloat16", **SHAPES[name])
    with torch.device("cuda"):
        reference = NemotronForCausalLM(config).to(torch.bfloat16).eval()
    folder = os.path.join(OUT, "model-" + name)
    reference.save_pretrained(folder)
    for file in os.listdir(os.path.join(PACK, "tiny-hf")):
        if "tokenizer" in file:
            with open(os.path.join(PACK, "tiny-hf", file), "rb") as source, open(os.path.join(folder, file), "wb") as target:
                target.write(source.read())
    new, results = 64, {"tokens_per_s": {}}
    prompt = [4 + (i * 7919) % 1000 for i in range(128)]
    ids = torch.tensor([prompt], device="cuda")
    with torch.inference_mode():
        expected = reference(ids).logits[0, :-1, :].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
        for mode, options in (("eager", {}), ("static cache, compiled", {"cache_implementation": "static"})):
            for batch in (1, 32):
                inputs, best = ids.repeat(batch, 1), float("inf")
                for _ in range(3):
                    times = []
                    for length in (1, 1 + new):
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                        reference.generate(inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False, **options)
                        torch.cuda.synchronize()
                        times.append(time.perf_counter() - start)
                    best = min(best, times[1] - times[0])
                results["tokens_per_s"].setdefault(mode, {})[batch] = batch * new / best
    del reference
    torch.cuda.empty_cache()
    with Server(folder, "model-" + name, 32768) as server:
        found = server.put([prompt], 1, compute_logprob=True)["logprob"][0][: len(expected)]
        differences = [abs(f - e) for f, e in zip(found, expected)]
        results["logprob_error"] = {"mean": sum(differences) / len(differences), "max": max(differences)}
        for batch in (1, 32):
            best = float("inf")
            for _ in range(3):
                times = []
                for length in (1, 1 + new):
                    start = time.perf_counter()
                    server.put([prompt] * batch, length)
                    times.append(time.perf_counter() - start)
                best = min(best, times[1] - times[0])
            results["tokens_per_s"].setdefault("nemotron", {})[batch] = batch * new / best
    ours, others = results["tokens_per_s"]["nemotron"], [speed for mode, speed in results["tokens_per_s"].items() if mode != "nemotron"]
    results["times_the_best"] = {batch: ours[batch] / max(other[batch] for other in others) for batch in (1, 32)}
    assert results["logprob_error"]["mean"] < 0.02, f"log-probabilities differ: {results['logprob_error']}"
    return results


def main():
    os.makedirs(OUT, exist_ok=True)
    begun, report, lines = time.time(), {"schema": 1, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "steps": {}}, []
    steps = [("gpu", gpu), ("doctor", doctor), ("kernels", kernels), ("golden", golden), ("rank", rank)]
    steps += [(f"transformers-{name}", lambda name=name: transformers(name)) for name in SHAPES]
    for name, step in steps:
        start, result = time.time(), {}
        try:
            state, result = "ok", step()
        except Skip as reason:
            state, result = "skipped", {"reason": str(reason)}
        except Exception as error:  # a step that fails must not hide the others
            state, result = "FAILED", {"reason": f"{type(error).__name__}: {error}"}
        report["steps"][name] = {"state": state, "seconds": time.time() - start, **result}
        lines.append(f"{name:18} {state:8} {time.time() - start:6.1f} s  {result.get('reason', '')}")
        with open(os.path.join(OUT, "gpu-check.json"), "w") as file:
            json.dump(report, file, indent=1)
    measured = report["steps"]["rank"]
    for kind in ("decode", "prefill"):
        for size, step in measured.get(kind, {}).items():
            lines.append(f"{kind:8} {size:>5} {step['ms']:9.2f} ms {step['tokens_per_s']:9.0f} tokens/s {100 * step['share']:4.0f} % (roofline {step['roofline_ms']:.2f} ms)")
    print("\n".join([*lines, f"{time.time() - begun:.0f} s, {OUT}/gpu-check.json"]))
    sys.exit(any(step["state"] == "FAILED" for step in report["steps"].values()))


main()
