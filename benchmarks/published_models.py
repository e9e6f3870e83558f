"""Published weights, computed here and by programs that nobody here wrote: whether the answers are the same.

    lalia pull smollm2 && lalia pull minilm
    python benchmarks/published_models.py

SmolLM2-135M-Instruct (GGUF, Q4_1), 20 conversations, greedy, up to 64 tokens each, one sequence at a time:

* weights: our dequantised tensors are those of the Python package `gguf`, bit for bit (rotary rows reordered).
* float32 and transformers: `lalia.load(..., quantize="none")` generates the tokens of `LlamaForCausalLM.generate` on a
  folder of the same dequantised weights.
* float32 and llama.cpp: the same, on an F32 GGUF file that we write from those weights.
* the file's own bits and llama.cpp on the same file: no equality is to be expected, because both round activations,
  each in its way (llama.cpp to 8-bit integers in groups of 32; ours to bfloat16, scales and offsets too). So the shares
  of equal tokens are given when both are led along llama.cpp's answer, and how both stand to float32.

Where two programs differ, the gap is the float32 (or own) logit of the best token minus that of the other's token. Two
float32 programs that add in another order may part where two tokens are within TIE; a larger gap fails.

all-MiniLM-L6-v2, 200 texts, in batches: vectors beside those of sentence-transformers, if it is installed, and of
transformers' `BertModel`, one text at a time, with the mean and the scaling to length one written out here.

Limits of the proof: one model of each kind; greedy only; conversations up to about 900 tokens of the 8,192; the prompt
is made into tokens by us and given to every program as ids, after llama.cpp's own template and tokenizer gave the same
ids; on CPU. llama.cpp runs with a float32 cache, without flash attention; its product kernels are those of its build.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lalia
import machine
from lalia.errors import UserError
from lalia.formats.gguf import GGUFFile, save_gguf
from lalia.formats.hf_folder import save_model
from lalia.formats.loading import gguf_path
from lalia.formats.store import find_model
from lalia.inference.language_model import LanguageModel
from lalia.model.cache import KVCache

sys.path.insert(0, str(machine.REPOSITORY))
from tests.formats.gguf.llama_cpp import ask

TIE = 1e-3
"""Logits; sums in another order differ by up to some 1e-4 here."""
EMBEDDING_TOLERANCE = 1e-5
CONTEXT = 1024
Ids = list[int]
Facts = dict[str, Any]
Messages = list[dict[str, str]]

QUESTIONS = [
    "What is the capital of France?",
    "Who wrote Hamlet?",
    "Name the planets of the solar system in order.",
    "What is 12 times 12? Show the steps.",
    "Explain photosynthesis in one sentence.",
    "Why is the sky blue?",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Fix this code: `for i in range(10) print(i`",
    "Write an SQL query for the three oldest users in the table users(name, born).",
    'Turn this into JSON: "Ada, 36, London; Alan, 41, Wilmslow".',
    "Quelle est la capitale de l'Italie\u00a0? R\u00e9ponds en fran\u00e7ais.",
    "Was ist der Unterschied zwischen Gr\u00f6\u00dfe und L\u00e4nge?",
    "\u4f60\u597d\uff0c\u8bf7\u4ecb\u7ecd\u4e00\u4e0b\u5317\u4eac\u3002",
    "\u041a\u0442\u043e \u043d\u0430\u043f\u0438\u0441\u0430\u043b \u00ab\u0412\u043e\u0439\u043d\u0443 \u0438 "
    "\u043c\u0438\u0440\u00bb?",
    "\u3053\u3093\u306b\u3061\u306f\uff01 \U0001f600 What do these mean?",
    "Write a short poem about the sea.",
    "Translate 'good morning' to Spanish, Italian and German.",
]


def conversations() -> list[Messages]:
    """17 questions, one with a system message, one of several turns, one with a long text."""
    license_text = (machine.REPOSITORY / "LICENSE").read_text(encoding="utf-8")[:3600]
    several = [[{"role": "user", "content": question}] for question in QUESTIONS]
    several.append(
        [
            {"role": "system", "content": "You answer like a pirate."},
            {"role": "user", "content": "How do I boil an egg?"},
        ]
    )
    several.append(
        [
            {"role": "user", "content": "My name is Ines and I live in Porto."},
            {"role": "assistant", "content": "Nice to meet you, Ines! What would you like to know?"},
            {"role": "user", "content": "Where do I live, and what is my name?"},
        ]
    )
    several.append([{"role": "user", "content": f"Summarise this text:\n\n{license_text}"}])
    return several


def texts_to_embed(count: int) -> list[str]:
    """Texts of 0 to some 700 words; the longest are cut at the model's limit of 256 tokens."""
    words = (machine.REPOSITORY / "LICENSE").read_text(encoding="utf-8").split()
    texts = [*QUESTIONS, "", " ", "a", "WORLD!!", "caf\u00e9 na\u00efve \u0130stanbul", "x = [i**2 for i in y]\n\tpass"]
    while len(texts) < count:
        start = len(texts) * 7
        length = 700 if len(texts) % 25 == 0 else 1 + len(texts) * 13 % 180
        texts.append(" ".join(words[start : start + length]))
    return texts[:count]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="GGUF file of a Llama, or name of a stored model")
    parser.add_argument("--encoder", default="minilm", help="sentence-transformers folder, or name of a stored model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke run: 2 conversations, 8 tokens, 20 texts")
    options = parser.parse_args()
    machine.restart_with(options.threads)
    torch.set_num_threads(options.threads)
    began = time.perf_counter()
    path = gguf_path(find_model(options.model))
    if path is None:
        raise UserError(f"--model {options.model}: no GGUF file, which llama.cpp could read too")
    with tempfile.TemporaryDirectory() as scratch:
        language = compare_generation(path, Path(scratch), *((2, 8) if options.quick else (20, 64)))
    encoder = compare_embeddings(find_model(options.encoder), 20 if options.quick else 200)
    problems = failures(language, encoder)
    content = {
        "machine": machine.describe(options.threads) | {name: _version(name) for name in ("xllamacpp", "gguf")},
        "tie": TIE,
        "embedding_tolerance": EMBEDDING_TOLERANCE,
        "language_model": language,
        "encoder": encoder,
        "failures": problems,
        "seconds": round(time.perf_counter() - began, 1),
    }
    show(language, encoder)
    machine.write_result("published_models", content, options.quick)
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def compare_generation(path: Path, scratch: Path, count: int, new_tokens: int) -> Facts:
    """All comparisons of the language model."""
    file = GGUFFile(path)
    different = differently_dequantized(file)
    ours, own = lalia.load(path, quantize="none"), lalia.load(path)
    save_model(ours.model, scratch)
    ours.tokenizer.save(scratch)
    f32 = save_gguf(scratch / "f32.gguf", file.config_values(), file, scratch, "F32").path
    link = scratch / "own.gguf"  # `ask` writes beside the file
    link.symlink_to(path.resolve())

    chosen = conversations()[-count:]
    prompts = [ours.encode_chat(messages) for messages in chosen]
    templated = ask(link, [("template", {"messages": messages}) for messages in chosen], CONTEXT)
    encode = [("tokenize", {"content": text, "add_special": False, "parse_special": True}) for text in templated]
    same_ids = {name: ask(at, encode, CONTEXT) == prompts for name, at in (("file", link), ("F32 file", f32))}

    greedy = [("greedy", {"prompt": ids, "n_predict": new_tokens}) for ids in prompts]
    print("generating: llama.cpp", file=sys.stderr)
    end = set(ours.engine.stop_ids)
    theirs_own, theirs_f32 = (_cut(ask(at, greedy, CONTEXT), end) for at in (link, f32))
    print("generating: transformers", file=sys.stderr)
    theirs = _cut(transformers_greedy(scratch, prompts, new_tokens, sorted(end)), end)
    print("generating: ours", file=sys.stderr)
    float32, bits = (_cut(our_greedy(model, prompts, new_tokens), end) for model in (ours, own))

    led = [led_along(ours, own, ids, answer) for ids, answer in zip(prompts, theirs_own, strict=True)]
    tokens = torch.tensor([token for answer in theirs_own for token in answer])
    rows_float32, rows_own = (torch.cat([pair[i] for pair in led]) for i in (0, 1))
    best_float32, best_own = rows_float32.argmax(-1), rows_own.argmax(-1)
    return {
        "model": path.name,
        "conversations": count,
        "prompt_tokens": [len(ids) for ids in prompts],
        "tensors": len(file.names()),
        "tensors_unlike_gguf_package": different,
        "prompt_ids_equal_llama_cpp": same_ids,
        "float32_and_transformers": agreement(ours, prompts, float32, theirs),
        "float32_and_llama_cpp_f32": agreement(ours, prompts, float32, theirs_f32),
        "own_bits_and_llama_cpp": agreement(own, prompts, bits, theirs_own),
        "led_along_llama_cpp": {
            "tokens": len(tokens),
            "own_bits_chooses_the_same": _share(best_own == tokens),
            "float32_chooses_the_same": _share(best_float32 == tokens),
            "own_bits_chooses_as_float32": _share(best_own == best_float32),
            "own_bits_first_two_tie": _share(rows_own.topk(2).values.diff()[:, 0] == 0),
            "float32_first_two_tie": _share(rows_float32.topk(2).values.diff()[:, 0] == 0),
            "largest_own_logit_gap": _largest_gap(rows_own, tokens),
            "largest_float32_logit_gap_of_llama_cpp": _largest_gap(rows_float32, tokens),
            "largest_float32_logit_gap_of_own_bits": _largest_gap(rows_float32, best_own),
            "rms_own_minus_float32": (rows_own - rows_float32).pow(2).mean().sqrt().item(),
        },
        "answers": {
            "float32": [ours.tokenizer.decode(ids) for ids in float32],
            "own_bits": [ours.tokenizer.decode(ids) for ids in bits],
            "llama_cpp": [ours.tokenizer.decode(ids) for ids in theirs_own],
        },
    }


def differently_dequantized(file: GGUFFile) -> list[str]:
    """Names of tensors whose values are not exactly those that the package `gguf` gives."""
    import gguf

    values = file.config_values()
    heads = {"attn_q": values["num_attention_heads"], "attn_k": values["num_key_value_heads"]}
    theirs: dict[str, np.ndarray] = {}
    for tensor in gguf.GGUFReader(file.path).tensors:
        array = np.asarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        parts = tensor.name.split(".")
        if len(parts) == 4 and parts[2] in heads:  # pairs of neighbours -> two halves of each head
            array = array.reshape(heads[parts[2]], -1, 2, array.shape[-1]).swapaxes(1, 2).reshape(array.shape)
        theirs[_hugging_face_name(parts)] = array
    ours = {name: file.tensor(name).float().numpy() for name in file.names()}
    return sorted({n for n in ours if not np.array_equal(ours[n], theirs.pop(n, np.empty(0)))} | set(theirs))


def _hugging_face_name(parts: Sequence[str]) -> str:
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    names = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    name = f"model.layers.{parts[1]}.{names[parts[2]]}" if parts[0] == "blk" else whole[parts[0]]
    return f"{name}.weight"


def our_greedy(model: LanguageModel, prompts: Sequence[Ids], new_tokens: int) -> list[Ids]:
    """Through the engine, as every user's request, one at a time."""
    from lalia.inference.sampling import SamplingParams

    params = SamplingParams(max_tokens=new_tokens, temperature=0.0)
    answers = []
    for ids in prompts:
        request = model.engine.submit(ids, params)
        request.wait()
        answers.append(list(request.token_ids))
    return answers


def transformers_greedy(folder: Path, prompts: Sequence[Ids], new_tokens: int, end: Ids) -> list[Ids]:
    """`LlamaForCausalLM.generate` in float32."""
    from transformers import GenerationConfig, LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=end, pad_token_id=end[0]
    )
    answers = []
    for ids in prompts:
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            out = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        answers.append(out[0, len(ids) :].tolist())
    return answers


def led_logits(model: LanguageModel, ids: Ids, answer: Ids) -> Tensor:
    """Logits before each token of `answer`, (len(answer), vocab_size), token by token as the engine decodes."""
    decoder = model.engine.decoder
    cache = KVCache(model.config, 1, len(ids) + len(answer))
    decoder(torch.tensor([ids[:-1]]), cache)
    singly = [ids[-1], *answer[:-1]]
    return torch.cat([decoder.logits(decoder(torch.tensor([[token]]), cache)) for token in singly])


def led_along(ours: LanguageModel, own: LanguageModel, ids: Ids, answer: Ids) -> tuple[Tensor, Tensor]:
    """`led_logits` of both; nothing for an empty answer."""
    if not answer:
        return torch.empty(0, ours.config.vocab_size), torch.empty(0, ours.config.vocab_size)
    return led_logits(ours, ids, answer), led_logits(own, ids, answer)


def agreement(model: LanguageModel, prompts: Sequence[Ids], ours: Sequence[Ids], theirs: Sequence[Ids]) -> Facts:
    """How many answers are identical, and for the others where they part and by how little in `model`'s logits."""
    partings = []
    for number, (ids, mine, other) in enumerate(zip(prompts, ours, theirs, strict=True)):
        if mine == other:
            continue
        place = next((i for i, pair in enumerate(zip(mine, other, strict=False)) if pair[0] != pair[1]), None)
        gap = None  # one is the beginning of the other
        if place is not None:
            row = led_logits(model, ids, mine[: place + 1])[-1]
            gap = abs(row[mine[place]] - row[other[place]]).item()
        partings.append({"conversation": number, "place": place, "logit_gap": gap})
    first = [len(mine) for mine in ours]
    for parting in partings:
        if parting["place"] is not None:
            first[parting["conversation"]] = parting["place"]
    return {
        "identical": len(prompts) - len(partings),
        "of": len(prompts),
        "tokens": sum(map(len, ours)),
        "tokens_before_parting": sum(first),
        "partings": partings,
    }


def compare_embeddings(folder: Path, count: int) -> Facts:
    """Largest differences of vectors."""
    encoder = lalia.load(folder)
    texts = texts_to_embed(count)
    ids = [encoded.ids for encoded in encoder.tokenizer.encode_with_specials(texts, max_tokens=encoder.max_length)]
    vectors = encoder.embed_ids(ids)
    facts: Facts = {
        "model": folder.name,
        "texts": count,
        "tokens": {"shortest": min(map(len, ids)), "longest": max(map(len, ids))},
        "sentence_transformers": None,
        "sentence_transformers_version": _version("sentence-transformers"),
        "bert_model": _difference(vectors, bert_vectors(folder, texts, encoder.max_length)),
        "control_without_scaling": _difference(vectors, bert_vectors(folder, texts, encoder.max_length, scale=False)),
    }
    if facts["sentence_transformers_version"]:
        from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

        peer = SentenceTransformer(str(folder), device="cpu")
        facts["sentence_transformers"] = _difference(vectors, peer.encode(texts, show_progress_bar=False))
    return facts


def bert_vectors(folder: Path, texts: Sequence[str], max_length: int, scale: bool = True) -> np.ndarray:
    """transformers' tokenizer and `BertModel`, mean of the last hidden states, length one."""
    from transformers import AutoTokenizer, BertModel

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = BertModel.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    vectors = []
    for text in texts:
        inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
        with torch.inference_mode():
            mean = model(**inputs).last_hidden_state[0].mean(0)
        vectors.append((mean / mean.norm() if scale else mean).numpy())
    return np.stack(vectors)


def failures(language: Facts, encoder: Facts) -> list[str]:
    """What does not hold."""
    found = [f"tensor {name} is not the gguf package's" for name in language["tensors_unlike_gguf_package"]]
    found += [f"prompt ids of the {n} differ" for n, same in language["prompt_ids_equal_llama_cpp"].items() if not same]
    for name in ("float32_and_transformers", "float32_and_llama_cpp_f32"):
        for parting in language[name]["partings"]:
            if parting["logit_gap"] is None or parting["logit_gap"] > TIE:
                found.append(f"{name}: {parting}")
    for name in ("sentence_transformers", "bert_model"):
        if encoder[name] is not None and encoder[name] > EMBEDDING_TOLERANCE:
            found.append(f"{name}: vectors differ by {encoder[name]:.2e}")
    if encoder["control_without_scaling"] < 1e3 * EMBEDDING_TOLERANCE:
        found.append("the control without scaling does not show")
    return found


def show(language: Facts, encoder: Facts) -> None:
    """The tables."""
    rows = []
    for name in ("float32_and_transformers", "float32_and_llama_cpp_f32", "own_bits_and_llama_cpp"):
        facts = language[name]
        gaps = [parting["logit_gap"] for parting in facts["partings"] if parting["logit_gap"] is not None]
        shown = f"{facts['identical']}/{facts['of']}", f"{facts['tokens_before_parting']}/{facts['tokens']}"
        rows.append((name, *shown, max(gaps, default=None)))
    print(machine.table(("greedy answers", "identical", "tokens before parting", "largest gap there"), rows))
    print()
    print(machine.table(("led along llama.cpp's answers", ""), list(language["led_along_llama_cpp"].items())))
    print()
    kinds = ("bert_model", "sentence_transformers", "control_without_scaling")
    print(machine.table((f"{encoder['texts']} texts", "largest difference"), [(k, encoder[k]) for k in kinds]))


def _cut(answers: Sequence[Ids], end: set[int]) -> list[Ids]:
    """Answers up to the first token that ends one, which not every program gives back."""
    return [ids[: next((i for i, token in enumerate(ids) if token in end), len(ids))] for ids in answers]


def _share(equal: Tensor) -> float:
    return round(equal.float().mean().item(), 4)


def _largest_gap(rows: Tensor, tokens: Tensor) -> float:
    return (rows.amax(-1) - rows.gather(1, tokens[:, None])[:, 0]).max().item()


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as problem:
        sys.exit(str(problem))
