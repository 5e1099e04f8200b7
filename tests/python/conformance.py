"""The conformance cases of NeMo's `PUT /generate`, black box: conformance.py URL; Python's standard library only.

Cases that need a model of their own, a dead rank or hours of idleness are Rust tests beside this program.
"""
import http.client, json, math, sys, threading, urllib.parse

URL = urllib.parse.urlsplit(sys.argv[1])
P = "<extra_id_0>System\n\n<extra_id_1>User\nWrite a poem on NVIDIA in the style of Shakespeare\n<extra_id_1>Assistant\n"
BASE = {"sentences": [P], "tokens_to_generate": 8, "greedy": True, "end_strings": []}


def call(method, path, body=None, kind="application/json"):
    connection = http.client.HTTPConnection(URL.hostname, URL.port, timeout=120)
    connection.request(method, path, body, {"Content-Type": kind} if body is not None and kind else {})
    answer = connection.getresponse()
    raw = answer.read()
    connection.close()
    return answer.status, answer.getheader("Content-Type") or "", raw


def put(**change):
    status, _, raw = call("PUT", "/generate", json.dumps({**BASE, **change}))
    return status, json.loads(raw)


def ok(**change):
    status, out = put(**change)
    assert status == 200 and isinstance(out, dict), (change, status, out)
    return out


def refused(text, status=200, **change):
    got = put(**change)
    assert got == (status, text), (change, got)


def accepted(**change):
    assert isinstance(ok(**change), dict)


base = ok()
IDS = base["token_ids"][0]
N = len(IDS) - 8
NEW, PIECES = IDS[N:], base["tokens"][0][N:]
TEXT = base["sentences"][0]

# C01-C07: transport
assert call("PUT", "/")[0] == 404
assert call("POST", "/generate", "{}")[0] == 405 and call("GET", "/generate")[0] in (404, 405)
status, kind, raw = call("PUT", "/generate", json.dumps(BASE), "text/plain")
assert status in (400, 415) and "message" in json.loads(raw)
for body in ("{", "", "nonsense", '{"sentences": ["a"], "temperature": NaN}'):
    status, kind, raw = call("PUT", "/generate", body)
    assert status == 400 and "message" in json.loads(raw), body
for body in ("{}", "[1]", '{"sentences": null}', '{"sentences": 5}'):
    status, kind, raw = call("PUT", "/generate", body)
    assert status in (400, 500) and json.loads(raw), body
    assert ok() == base
assert call("PUT", "/generate", json.dumps(BASE), "application/json; charset=utf-8")[0] == 200

# C08-C19: validation
refused("Maximum number of sentences is 128", 400, sentences=["a"] * 129)
TEMPERATURE = "temperature must be a positive number less than or equal to 100.0"
for value in (0, -1, 101, "1", True, None):
    refused(TEMPERATURE, temperature=value)
for value in (100, 1e-8, 1):
    accepted(temperature=value)
for value in (0, 5.0, "5", None):
    refused("tokens_to_generate must be an integer greater than 0", tokens_to_generate=value)
for value in (1.01, -0.1):
    refused("top_p must be a positive number less than or equal to 1.0", top_p=value)
for value in (0, 1, 0.5):
    accepted(top_p=value)
for value in (-1, True):
    refused("top_k must be a positive integer number", top_k=value)
for value in (0, 0.0, 40):
    accepted(top_k=value)
refused("repetition_penalty must be a positive number no less than 1.0", repetition_penalty=0.9)
accepted(repetition_penalty=1)
for value in ("x", [1], None):
    refused("expect end_strings to be a list of strings", end_strings=value)
refused("all_probs must be a boolean value", all_probs=0)
refused("add_BOS must be a boolean value", add_BOS="no")
refused("greedy must be a boolean value", greedy=1)
refused("compute_logprob must be a boolean value", compute_logprob=None)
refused(TEMPERATURE, temperature=0, greedy=1, random_seed=-1)
refused("all_probs must be a boolean value", all_probs=0, temperature=0)
for value in (-1, 1.5):
    refused("random_seed must be a positive integer number or None", random_seed=value)
for value in (None, 0, 4294967295):
    accepted(random_seed=value)
refused("min_tokens_to_generate must be an integer no less than 0", min_tokens_to_generate=-1)
refused("num of neighbors must be an integer no less than 0", neighbors=-1)
status, text = put(task_ids=[1])
assert status == 200 and isinstance(text, str) and "(context_tokens_tensor, context_length_tensor)" in text
assert ok(foo=1) == base
for value in ([], [""], "abc", [[]], [{}], [None], [True], [[1, -1]], [[1, 10**9]]):
    status, _ = put(sentences=value)
    assert status in (200, 400), (value, status)
    assert ok() == base, value

# C20-C29: shape
assert sorted(base) == ["logprob", "offsets", "sentences", "token_ids", "tokens"] and base["logprob"] is None
assert len(base["tokens"][0]) == len(IDS) == len(base["offsets"][0]) == N + 8
for prompt in (P, " two  spaces ", "tab\tand\r\nCRLF\n", "smile 🙂 and 漢字", "\n\n", "é", " ", "</s><s><|endoftext|>"):
    out = ok(sentences=[prompt])
    assert out["sentences"][0].startswith(prompt), prompt
    assert not {2, 3} & set(out["token_ids"][0][:-8]), prompt
assert call("PUT", "/generate", json.dumps(BASE))[2] == call("PUT", "/generate", json.dumps(BASE))[2]
bos = ok(add_BOS=True)
assert bos["token_ids"][0][0] == 2 and bos["tokens"][0][0] == "<s>" and bos["sentences"][0].startswith(P)
assert len(bos["token_ids"][0]) == N + 9
scored = ok(compute_logprob=True)
assert len(scored["logprob"][0]) == len(IDS) - 1 and all(math.isfinite(x) and x <= 0 for x in scored["logprob"][0])
full = ok(compute_logprob=True, all_probs=True)
for index, row in enumerate(full["full_logprob"][0]):
    assert abs(sum(map(math.exp, row)) - 1) < 1e-3
    assert abs(row[IDS[index + 1]] - full["logprob"][0][index]) < 1e-6
    if index >= N - 1:
        assert max(row) == row[IDS[index + 1]]
assert "full_logprob" in ok(all_probs=True) and ok() == base
offsets, pieces = base["offsets"][0], base["tokens"][0]
assert offsets[0] == 0 and all(b - a == len(p) for a, b, p in zip(offsets, offsets[1:], pieces))
assert len(ok(tokens_to_generate=1)["token_ids"][0]) == N + 1
assert ok(sentences=[""], add_BOS=True)["token_ids"][0][0] == 2

# C30-C33, C36-C38: stops
def text_of(count):
    return ok(tokens_to_generate=count)["sentences"][0][len(P):]

texts, checked = [text_of(count) for count in range(1, 9)], 0
for index in range(1, 8):
    piece = texts[index][len(texts[index - 1]):]
    if not piece or any(text.endswith(piece) for text in [TEXT[:len(P)], *texts[:index]]):
        continue
    out = ok(end_strings=[piece])
    assert out["token_ids"][0] == IDS[:N + index + 1] and out["sentences"][0].endswith(piece), (index, piece)
    checked += 1
assert checked >= 2, "hardly a piece of this text occurs once"
joined = text_of(3)[len(text_of(1)):]
out = ok(end_strings=[joined])
assert len(out["token_ids"][0]) == N + 3 and out["sentences"][0].endswith(joined)
assert len(ok(end_strings=[""])["token_ids"][0]) == N + 1
assert ok(end_strings=["<|endoftext|>"]) == base
assert ok(end_strings=[text_of(1)], min_tokens_to_generate=4)["token_ids"][0] == IDS[:N + 1]
across = P[-4:] + text_of(1)
assert len(ok(end_strings=[across])["token_ids"][0]) == N + 1, "a stop across the prompt's end"
recipe = ok(tokens_to_generate=256, min_tokens_to_generate=1,
            end_strings=["<|endoftext|>", "<extra_id_1>", "\x11", "<extra_id_1>User"])
assert recipe["token_ids"][0][-1] == 5 and recipe["sentences"][0].endswith("<extra_id_1>")

# C39-C42: batches
short, long = "Shall I", P
pair = ok(sentences=[short, long], tokens_to_generate=4)
alone = [ok(sentences=[prompt], tokens_to_generate=4) for prompt in (short, long)]
assert [len(row) for row in pair["token_ids"]] == [N + 4] * 2
assert all(row[:len(one["token_ids"][0])] == one["token_ids"][0] for row, one in zip(pair["token_ids"], alone))
first = ok(sentences=[short], tokens_to_generate=1)
stop = first["sentences"][0][len(short):]
assert stop and stop not in alone[1]["sentences"][0][len(long):]
stopped = ok(sentences=[short, long], tokens_to_generate=4, end_strings=[stop], compute_logprob=True)
rows, ended = stopped["token_ids"], first["token_ids"][0]
assert rows[1] == alone[1]["token_ids"][0] and rows[0] == ended + [3] * (len(rows[1]) - len(ended))
assert stopped["tokens"][0][len(ended):] == ["</s>"] * (len(rows[1]) - len(ended))
assert [len(row) for row in stopped["logprob"]] == [len(rows[1]) - 1] * 2
assert stopped["sentences"] == [first["sentences"][0], alone[1]["sentences"][0]]
many = ok(sentences=[P] * 128)
assert all(row == IDS for row in many["token_ids"])
prompts = [f"Act {i}" for i in range(20)]
assert all(text.startswith(prompt) for text, prompt in zip(ok(sentences=prompts)["sentences"], prompts))

# C43-C50: sampling
assert ok(greedy=False, top_k=1)["token_ids"] == base["token_ids"]
assert ok(greedy=False, temperature=1e-8, top_k=0, top_p=1)["token_ids"] == base["token_ids"]
assert ok(temperature=5, top_p=.1, top_k=7, repetition_penalty=2, random_seed=3)["token_ids"] == base["token_ids"]
seeded = [ok(greedy=False, random_seed=seed)["token_ids"] for seed in (7, 7, 1, 2, 3, 4, 5, 6, 8)]
assert seeded[0] == seeded[1] and any(ids != seeded[0] for ids in seeded[2:])
assert ok(greedy=False, random_seed=9, top_p=0) == ok(greedy=False, random_seed=9, top_p=1)
assert ok(greedy=False, random_seed=9) == ok(greedy=False, random_seed=9, repetition_penalty=1.0)
accepted(greedy=False, top_k=10**9)
one = ok(tokens_to_generate=1, all_probs=True)["full_logprob"][0][N - 1]
best = sorted(range(len(one)), key=lambda i: (-one[i], i))[:5]
weights = [math.exp(one[i]) for i in best]
counts, draws = dict.fromkeys(best, 0), 0
for seed in range(16):
    out = ok(sentences=[P] * 128, tokens_to_generate=1, greedy=False, top_k=5, top_p=0, temperature=1.0, random_seed=seed)
    for row in out["token_ids"]:
        counts[row[-1]] += 1
        draws += 1
for id, weight in zip(best, weights):
    share = weight / sum(weights)
    assert abs(counts[id] / draws - share) <= 3 * math.sqrt(share * (1 - share) / draws), (id, counts[id] / draws, share)

# C51-C55: robustness
results = {}
def one_request(i):
    results[i] = ok(sentences=[f"Scene {i}"])
threads = [threading.Thread(target=one_request, args=(i,)) for i in range(16)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
assert all(results[i]["sentences"][0].startswith(f"Scene {i}") for i in range(16))
connection = http.client.HTTPConnection(URL.hostname, URL.port)
connection.request("PUT", "/generate", json.dumps({**BASE, "tokens_to_generate": 900}), {"Content-Type": "application/json"})
connection.close()
assert ok() == base
assert len(ok(tokens_to_generate=5000, min_tokens_to_generate=5000)["token_ids"][0]) == 1024, "clipped to the context"
status, text = put(sentences=["word " * 3000])
assert status == 200 and isinstance(text, str), text
assert ok() == base
emoji = ok(sentences=["🙂"], tokens_to_generate=1)
assert emoji["sentences"][0].startswith("🙂")
emoji = emoji["token_ids"][0][:-1]
assert len(emoji) >= 4, "an emoji of single bytes"
for cut in range(1, 4):
    half = ok(sentences=[emoji[:-cut]], tokens_to_generate=1)
    assert "\ufffd" in half["sentences"][0] or half["token_ids"][0] == emoji, half
print("all cases hold")
