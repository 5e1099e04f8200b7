"""Everything about devices that only a device can prove, in one go; see gpu-check.

    gpu_check.py PACK OUT          all steps; PACK is what `gpu-check pack` made
    gpu_check.py PACK OUT STEP     one step, in this process

Each step is a process with a time limit and a log in OUT; all limits together are less than eight minutes. A step is ok, FAILED or
skipped with the reason. What it measured is held against limits: each of them is passed, FAILED, or not judged. GPU_CHECK=small measures
small shapes, for a run without a device: speeds are then not judged.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

PACK, OUT = (os.path.abspath(path) for path in sys.argv[1:3])
SMALL = os.environ.get("GPU_CHECK") == "small"
NEMOTRON = os.path.join(PACK, "nemotron")


class Skip(Exception):
    pass


def limit(name, value, at_least=None, at_most=None, is_speed=False):
    """A measured value and what it must be."""
    passed = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
    bound = f">= {at_least}" if at_most is None else f"<= {at_most}"
    return {"name": name, "value": value, "bound": bound, "result": "not judged" if is_speed and SMALL else "passed" if passed else "FAILED"}


def libraries():
    """cuBLASLt, NCCL and NVRTC come with PyTorch."""
    import sysconfig

    site = os.path.join(sysconfig.get_paths()["purelib"], "nvidia")
    folders = [os.path.join(site, name, "lib") for name in (os.listdir(site) if os.path.isdir(site) else [])]
    return ":".join(folder for folder in folders if os.path.isdir(folder))


ENVIRONMENT = {**os.environ, "NEMOTRON_RUN_ROOT": os.path.join(OUT, "runs"), "HOME": OUT}


def command(arguments, log):
    """Standard output of a command that must succeed."""
    with open(os.path.join(OUT, log + ".log"), "w") as errors:
        done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=errors, env=ENVIRONMENT, text=True)
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
        return {"device": command(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"], "gpu").strip()}
    except FileNotFoundError:
        raise Skip("there is no nvidia-smi") from None


def doctor():
    return json.loads(command([NEMOTRON, "doctor", "--json", "--profile", "h100x1"], "doctor"))


def kernels():
    """Each kernel against float64."""
    arguments = [sys.executable, os.path.join(PACK, "gpu_kernels.py"), os.path.join(PACK, "images"), os.path.join(PACK, "args.h")]
    found = json.loads(command(arguments, "kernels"))
    return {"seed": found["seed"], "limits": [limit(name, check["error"], at_most=check["limit"]) for name, check in found["checks"].items()]}


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
    # What rounding to bf16 moves a log-probability of this model by, at most.
    return {"ids_equal": equal, "batch_equals_alone": rows, "limits": [limit("golden log-probabilities", worst, at_most=0.05)]}


def rank():
    """One rank of the large model, beside what the device can do at most; and NCCL with one rank."""
    shapes = ["--layers", "1", "--batch", "1", "--batch", "4", "--prompt-tokens", "32", "--context", "40"] if SMALL else []
    model = ["--model", os.path.join(PACK, "tiny-hf"), "--tp", "1", "--pp", "1"] if SMALL else []
    profile = "h100x1" if SMALL else "h100x16"
    measured = json.loads(command([NEMOTRON, "bench", "rank", "--profile", profile, "--stage", "0", "--json", *model, *shapes], "rank"))
    bounds = {"decode": {"1": 0.85, "4": 0.85, "8": 0.85, "64": 0.80}, "prefill": {"32": 0.60, "2048": 0.60}}
    measured["limits"] = [limit(f"{kind} {size}: share of the ceiling", step["share"], at_least=bounds[kind][size], is_speed=True)
                          for kind in bounds for size, step in measured[kind].items() if size in bounds[kind]]
    measured["limits"].append(limit("NCCL with one rank, recorded too: works", float("error" not in measured["nccl"]), at_least=1.0))
    return measured


SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 4},
    "8b": {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
# How transformers generates; a static cache is compiled on devices unless that is turned off.
MODES = {
    "eager": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "static cache, compiled": {"cache_implementation": "static"},
}
# How many times the best mode of transformers we must be, by batch.
TIMES = {1: 1.3, 32: 2.0}


def best(seconds):
    """The best of two runs, after one that warms up."""
    return min([seconds() for _ in range(2 if SMALL else 3)][1:])


def transformers(name):
    """The same random weights in transformers and here: log-probabilities, and for the larger shape tokens/s of decoding."""
    try:
        import torch
        from transformers import NemotronConfig, NemotronForCausalLM, StoppingCriteria
    except ImportError as error:
        raise Skip(str(error)) from None
    if not SMALL and not torch.cuda.is_available():
        raise Skip("PyTorch sees no device")
    device, is_done = ("cpu", lambda: None) if SMALL else ("cuda", torch.cuda.synchronize)
    torch.manual_seed(340)
    shape = TINY if SMALL else SHAPES[name]
    vocab, new, prompt_tokens = (512, 4, 16) if SMALL else (32768, 64, 128)
    config = NemotronConfig(vocab_size=vocab, max_position_embeddings=4096, partial_rotary_factor=0.5, **shape)
    with torch.device(device):
        reference = NemotronForCausalLM(config).to(torch.bfloat16).eval()
    folder = os.path.join(OUT, "model-" + name)
    reference.save_pretrained(folder)
    for file in os.listdir(os.path.join(PACK, "tiny-hf")):
        if "tokenizer" in file:
            with open(os.path.join(PACK, "tiny-hf", file), "rb") as source, open(os.path.join(folder, file), "wb") as target:
                target.write(source.read())

    class FirstToken(StoppingCriteria):
        """Notes when the first token is there: what follows is decoding. Every run has the same lengths, so nothing is compiled twice."""

        def __init__(self):
            self.at = None

        def __call__(self, ids, scores, **_):
            if self.at is None:
                is_done()
                self.at = time.perf_counter()
            return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def decode_seconds(inputs, options):
        first = FirstToken()
        reference.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=1 + new, min_new_tokens=1 + new, do_sample=False,
                           stopping_criteria=[first], **options)
        is_done()
        return time.perf_counter() - first.at

    modes, batches = (MODES, (1, 32)) if name == "8b" else ({"eager": {}}, (1,))
    results = {"tokens_per_s": {}, "modes_that_failed": {}}
    prompt = [4 + (i * 7919) % (vocab // 2) for i in range(prompt_tokens)]
    ids = torch.tensor([prompt], device=device)
    with torch.inference_mode():
        expected = reference(ids).logits[0, :-1, :].float().log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].tolist()
        for mode, options in modes.items():
            try:
                for batch in batches:
                    inputs = ids.repeat(batch, 1)
                    results["tokens_per_s"].setdefault(mode, {})[batch] = batch * new / best(lambda: decode_seconds(inputs, options))
            except Exception as error:  # another version may not know a mode
                results["tokens_per_s"].pop(mode, None)
                results["modes_that_failed"][mode] = f"{type(error).__name__}: {error}"
    del reference
    if not SMALL:
        torch.cuda.empty_cache()
    with Server(folder, "model-" + name, 32768) as server:
        found = server.put([prompt], 1, compute_logprob=True)["logprob"][0][: len(expected)]
        differences = [abs(f - e) for f, e in zip(found, expected)]
        for batch in batches:
            def ours():
                """Of a client: what `new` more tokens take."""
                times = [time.perf_counter()]
                for length in (1, 1 + new):
                    server.put([prompt] * batch, length)
                    times.append(time.perf_counter())
                return times[2] - times[1] - (times[1] - times[0])
            results["tokens_per_s"].setdefault("nemotron", {})[batch] = batch * new / best(ours)
    shutil.rmtree(folder)
    others = [speed for mode, speed in results["tokens_per_s"].items() if mode != "nemotron"]
    assert len(expected) == prompt_tokens - 1 == len(differences) and others, results
    results["limits"] = [limit(f"{name}: log-probabilities, mean difference", sum(differences) / len(differences), at_most=0.02)]
    if name == "8b":
        results["limits"] += [limit(f"{name}: times the best of transformers at batch {batch}",
                                    results["tokens_per_s"]["nemotron"][batch] / max(other[batch] for other in others), at_least=TIMES[batch], is_speed=True)
                              for batch in batches]
    return results


# With the seconds that each may take: 470 together.
STEPS = {"gpu": (gpu, 5), "doctor": (doctor, 10), "kernels": (kernels, 40), "golden": (golden, 40), "rank": (rank, 85),
         "transformers-1b": (lambda: transformers("1b"), 50), "transformers-8b": (lambda: transformers("8b"), 240)}


def run_step(name):
    """One step in a process of its own, with all that it starts."""
    path = os.path.join(OUT, f"step-{name}.json")
    if os.path.exists(path):
        os.remove(path)
    seconds = STEPS[name][1] * (10 if SMALL else 1)
    with open(os.path.join(OUT, f"step-{name}.log"), "w") as log:
        process = subprocess.Popen([sys.executable, os.path.abspath(__file__), PACK, OUT, name], stdout=log, stderr=log, env=ENVIRONMENT, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"state": "FAILED", "reason": f"it took more than {seconds} s"}
    if not os.path.exists(path):
        return {"state": "FAILED", "reason": f"its process ended with {process.returncode}, see step-{name}.log"}
    with open(path) as file:
        return json.load(file)


def step(name):
    try:
        result = STEPS[name][0]()
        state = "FAILED" if any(limit["result"] == "FAILED" for limit in result.get("limits", [])) else "ok"
        result = {"state": state, **({"reason": "a limit is missed"} if state == "FAILED" else {}), **result}
    except Skip as reason:
        result = {"state": "skipped", "reason": str(reason)}
    except Exception as error:
        result = {"state": "FAILED", "reason": f"{type(error).__name__}: {error}"}
    with open(os.path.join(OUT, f"step-{name}.json"), "w") as file:
        json.dump(result, file)


def main():
    os.makedirs(OUT, exist_ok=True)
    ENVIRONMENT.setdefault("NEMOTRON_CUDA_LIBS", libraries())
    if len(sys.argv) > 3:
        return step(sys.argv[3])
    begun, report, lines = time.time(), {"schema": 2, "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "steps": {}}, []
    for name in STEPS:
        start = time.time()
        result = {"seconds": 0.0, **run_step(name)}
        result["seconds"] = time.time() - start
        report["steps"][name] = result
        lines.append(f"{name:18} {result['state']:8} {result['seconds']:6.1f} s  {result.get('reason', '')}")
        with open(os.path.join(OUT, "gpu-check.json"), "w") as file:
            json.dump(report, file, indent=1)
    steps = report["steps"]
    lines += ["", *(f"{check['result']:10} {check['name']}: {check['value']:.3g} ({check['bound']})" for step in steps.values() for check in step.get("limits", []))]
    for kind in ("decode", "prefill"):
        for size, measured in steps["rank"].get(kind, {}).items():
            lines.append(f"{kind:8} {size:>5} {measured['ms']:9.2f} ms {measured['tokens_per_s']:9.0f} tokens/s {100 * measured['share']:4.0f} % (roofline {measured['roofline_ms']:.2f} ms)")
    print("\n".join([*lines, f"{time.time() - begun:.0f} s, {OUT}/gpu-check.json"]))
    sys.exit(any(step["state"] == "FAILED" for step in steps.values()))


main()
