"""Runs llama.cpp on one GGUF file, in a process of its own: `python llama_cpp_child.py JOB`.

JOB is a JSON file {"model", "context", "result", "requests"}; each request is [kind, argument], and the answers go, as
a list, into the JSON file `result`. See `tests.formats.gguf.llama_cpp` for the kinds.
"""

import importlib
import json
import os
import sys
import urllib.request
from pathlib import Path
from typing import Any

xllamacpp: Any = importlib.import_module("xllamacpp")  # brings no types


def main(job: dict[str, Any]) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = job["model"]
    params.n_ctx = job["context"]
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    # float32 wherever llama.cpp lets one choose, so that what differs is the weights.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    params.use_jinja = True
    params.port = 0
    params.embedding = job.get("embedding", False)
    server = xllamacpp.Server(params)

    def post(path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            server.listening_address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def answer(kind: str, argument: Any) -> Any:
        if kind == "tokenize":
            return post("/tokenize", argument)["tokens"]
        if kind == "template":
            return post("/apply-template", argument)["prompt"]
        if kind == "greedy":
            got = post("/completion", {"temperature": 0, "return_tokens": True, "cache_prompt": False} | argument)
            return got["tokens"]
        if kind == "log_probs":
            body = {"prompt": argument["tokens"], "n_predict": 1, "n_probs": argument["vocab_size"], "temperature": 0}
            # A visible ASCII character must win: where a special or half a character does, no probabilities come. They
            # are those before the bias.
            got = post("/completion", body | {"cache_prompt": False, "logit_bias": [[32, 1000.0]]})
            entries = got["completion_probabilities"][0]["top_logprobs"]
            return [entry["logprob"] for entry in sorted(entries, key=lambda entry: entry["id"])]
        if kind == "raw":
            return post("/completion", argument)
        raise ValueError(kind)

    answers = [answer(kind, argument) for kind, argument in job["requests"]]
    Path(job["result"]).write_text(json.dumps(answers), encoding="utf-8")
    os._exit(0)  # without the server's destructor, which at times waits for ever


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
