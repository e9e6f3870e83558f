"""SmolLM2 and MiniLM as published, beside implementations that nobody here wrote.

    lalia pull smollm2; lalia pull minilm
    python benchmarks/published_models.py

SmolLM2-135M-Instruct, 20 prompts in its chat template, up to 64 greedy tokens each:
- ours in float32 against transformers on a folder of the same dequantised weights;
- ours with the file's own bits, and ours in float32, against llama.cpp on the same file (through xllamacpp). llama.cpp
  rounds activations to 8 bits, so near-ties fall differently: counted are answers that are equal throughout, and the
  share of llama.cpp's tokens that ours would choose after the same beginning, with the largest difference of logits
  where it would not;
- ours in float32 against llama.cpp on the same weights written as float32.
MiniLM, 40 texts: the largest difference from transformers' BertModel with mean pooling and normalisation written out.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import lalia
import machine
from lalia.devices import use_threads
from lalia.formats.gguf import GGUFFile, save_gguf
from lalia.formats.hf_folder import save_model
from lalia.formats.loading import gguf_path
from lalia.formats.store import find_model
from lalia.inference.language_model import LanguageModel
from lalia.inference.sampling import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.formats.gguf.llama_cpp import ask

PROMPTS = (
    "What is the capital of France?", "Hello! Who are you?", "Write a haiku about the sea.", "What is 12 times 12?",
    "Explain gravity to a child.", "Write a Python function that reverses a string.", "Name three primary colours.",
    "Was ist die Hauptstadt von Deutschland?", "Raconte-moi une histoire courte.", "Give me a recipe for pancakes.",
    "Who wrote Hamlet?", "What does DNA stand for?", "Translate 'good morning' into Spanish.", "Tell me a joke.",
    "How do I boil an egg?", "What is a prime number?", "Summarise: the cat sat on the mat and slept all day long.",
    "List the planets of the solar system.", "Why is the sky blue?", "Write an e-mail asking for a day off.",
)  # fmt: skip
NUM_TOKENS = 64


def main() -> None:
    """Compare, print and write the result."""
    use_threads(2)
    path = gguf_path(find_model("smollm2"))
    assert path is not None
    floats, own = lalia.load(path, quantize="none"), lalia.load(path)
    prompts = [floats.encode_chat(prompt) for prompt in PROMPTS]
    ours = [greedy(floats, ids) for ids in prompts]
    result: dict[str, Any] = {"num_prompts": len(prompts), "num_tokens": NUM_TOKENS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "folder"
        save_model(floats.model, folder, {"eos_token_id": 2})
        floats.tokenizer.save(folder)
        result["transformers, ours float32"] = transformers_greedy(folder, prompts, ours)
        source = GGUFFile(path)
        as_floats = save_gguf(Path(scratch) / "f32.gguf", source.config_values(), source, folder, "F32").path
        link = Path(scratch) / "own.gguf"
        link.symlink_to(path)
        for label, file, model, answers in (
            ("llama.cpp same file, ours float32", link, floats, ours),
            ("llama.cpp same file, ours own bits", link, own, [greedy(own, ids) for ids in prompts]),
            ("llama.cpp F32 file, ours float32", as_floats, floats, ours),
        ):
            theirs = ask(file, [("greedy", {"prompt": ids, "n_predict": NUM_TOKENS}) for ids in prompts], context=512)
            result[label] = agreement(model, prompts, answers, theirs)
    result["MiniLM, largest difference"] = minilm_difference()
    print(json.dumps(result, indent=2))
    machine.write_result("published_models", {"machine": machine.describe(2), **result}, quick=False)


def greedy(model: LanguageModel, ids: list[int]) -> list[int]:
    """Token ids of the answer, an end token included."""
    request = model.engine.submit(ids, SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0))
    request.wait()
    return list(request.token_ids)


def transformers_greedy(folder: Path, prompts: list[list[int]], ours: list[list[int]]) -> dict[str, Any]:
    """How many answers of transformers are equal to ours, token by token."""
    import transformers

    theirs: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    equal, tokens = 0, 0
    for ids, answer in zip(prompts, ours, strict=True):
        given = torch.tensor([ids])
        out = theirs.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=2,
            pad_token_id=2,
        )  # fmt: skip
        answer_of_theirs = out[0, len(ids) :].tolist()
        equal += answer_of_theirs == answer
        tokens += len(answer_of_theirs)
    return {"equal_answers": equal, "tokens": tokens}


@torch.no_grad()
def agreement(
    model: LanguageModel, prompts: list[list[int]], ours: list[list[int]], theirs: list[list[int]]
) -> dict[str, Any]:
    """Equal answers (up to the end token, which llama.cpp leaves out), and agreement after the same beginning."""
    equal = chosen = tokens = 0
    gap = 0.0
    for ids, one, other in zip(prompts, ours, theirs, strict=True):
        ended = [token for token in one if token != 2]
        equal += ended == [token for token in other if token != 2]
        logits = model.model.logits(model.model(torch.tensor([ids + other])))[0, len(ids) - 1 : -1].float()
        behind = logits.amax(-1) - logits.gather(-1, torch.tensor(other)[:, None])[:, 0]
        chosen, tokens = chosen + int((behind == 0).sum()), tokens + len(other)
        gap = max(gap, float(behind.max()))
    return {"equal_answers": equal, "share_of_tokens": round(chosen / tokens, 4), "tokens": tokens, "largest_gap": gap}


def minilm_difference() -> float:
    """Largest difference of an embedding's value from transformers'."""
    import transformers

    folder = find_model("minilm")
    texts = [*PROMPTS, *(prompt * 20 for prompt in PROMPTS)]
    ours = lalia.embed(str(folder), texts, truncate=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs: Any = transformers.BertModel.from_pretrained(folder).eval()
    largest = 0.0
    for text, vector in zip(texts, ours, strict=True):
        given = tokenizer(text, return_tensors="pt", truncation=True, max_length=256)
        with torch.no_grad():
            mean = theirs(**given).last_hidden_state[0].mean(0)
        largest = max(largest, float((torch.from_numpy(vector) - mean / mean.norm()).abs().max()))
    return largest


if __name__ == "__main__":
    main()
