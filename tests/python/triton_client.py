"""Asks a reward model as NeMo-Aligner's attribute_annotate.py does, with PyTriton's client: HOST:PORT TEXT..."""

import json
import sys

import numpy as np
from pytriton.client import ModelClient

address, *texts = sys.argv[1:]
sentences = np.char.encode(np.array(texts)[:, None], "utf-8")
with ModelClient(f"http://{address}", "reward_model", init_timeout_s=60) as client:
    plain = client.infer_batch(sentences=sentences)
    again = client.infer_batch(sentences=sentences, add_EOS=np.zeros((len(texts), 1), dtype=bool))
assert (plain["rewards"] == again["rewards"]).all()
print(json.dumps({name: values.tolist() for name, values in plain.items()}))
