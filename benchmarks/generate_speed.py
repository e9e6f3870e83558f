"""Generation speed with a key-value cache: Lalia beside transformers' `generate`, from the same model folder.

    python benchmarks/generate_speed.py --model runs/shakespeare/base

Greedy, a 32-token prompt, 128 new tokens, batch 1, float32 on both sides, in turn; transformers with eager and with
sdpa attention, the faster counts. Then our batch of 16 different prompts beside our batch of 1. The new texts of both
programs are compared: a speed for different tokens would be no comparison.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import lalia
import machine
from lalia.errors import UserError

TARGETS = {"ours_to_transformers": 3.0, "batch_16_to_batch_1": 6.0}

Generate = Callable[[Sequence[str]], list[list[int]]]
"""From prompts to the ids of their new tokens."""

PROSE = (
    "When the long rain had ended, the old king walked down to the harbour and asked every sailor for news of his "
    "daughter, for she had gone away in the spring with nothing but a lantern, a loaf of bread and her own good name. "
    "Some had seen a light upon the water; some had heard a song; none could say where she slept. So he sat among the "
    "nets and waited, and the gulls came near him as if he had been a stone, and the tide went out and returned. "
)
"""Text the prompts are cut from."""


def prompts_of(tokenizer: Any, count: int, length: int) -> list[str]:
    """`count` different texts that the tokenizer encodes to `length` tokens each (its special tokens not counted)."""
    ids: list[int] = tokenizer(PROSE * (1 + count * length // 40), add_special_tokens=False)["input_ids"]
    prompts: list[str] = []
    for start in range(len(ids) - length):
        text: str = tokenizer.decode(ids[start : start + length])
        fits = len(tokenizer(text, add_special_tokens=False)["input_ids"]) == length
        if fits and text not in prompts:
            prompts.append(text)
        if len(prompts) == count:
            return prompts
    raise UserError(f"could not cut {count} prompts of {length} tokens with this tokenizer; lower --prompt-tokens")


def transformers_generate(
    folder: Path, attention: str, tokenizer: Any, new: int
) -> Callable[[Sequence[str]], list[list[int]]]:
    """A function that generates `new` tokens for prompts with transformers, never stopping early."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    model.eval()
    model.generation_config = GenerationConfig(do_sample=False, use_cache=True, max_new_tokens=new)

    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]  # as Lalia begins a text

    def generate(prompts: Sequence[str]) -> list[list[int]]:
        ids = [begin + tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
        with torch.inference_mode():
            output = model.generate(input_ids=torch.tensor(ids), attention_mask=torch.ones(len(ids), len(ids[0])))
        return output[:, len(ids[0]) :].tolist()

    return generate


def ours_generate(folder: Path, new: int) -> Generate:
    """The same with Lalia."""
    model = lalia.load(folder)

    def generate(prompts: Sequence[str]) -> list[list[int]]:
        answers = model.generate(list(prompts), max_tokens=new, temperature=0.0, ignore_eos=True)
        return [list(answer.token_ids) for answer in answers]

    return generate


def random_model(folder: Path, quick: bool) -> None:
    """A Qwen3 folder with random weights and a small byte-level tokenizer, to try the script without training."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    vocab_size, width, layers = (512, 64, 2) if quick else (4096, 256, 6)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=special)  # pyright: ignore
    bpe.train_from_iterator([PROSE], trainer)
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32 if quick else 4,
        num_key_value_heads=width // 32 if quick else 4,
        head_dim=32 if quick else 64,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    model: Any = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight[bpe.get_vocab_size() :] = 0.0  # ids without text: never the likeliest
    model.save_pretrained(folder)


def measure(ways: dict[str, tuple[Generate, Sequence[str]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Each way once to warm up, then `repeats` times in turn: tokens per second, and the tokens of the last time."""
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    tokens: dict[str, list[list[int]]] = {}
    for repeat in range(repeats + 1):
        for name, (generate, prompts) in ways.items():
            began = time.perf_counter()
            tokens[name] = generate(prompts)
            seconds = time.perf_counter() - began
            if repeat > 0:
                speeds[name].append(sum(map(len, tokens[name])) / seconds)
    return {
        name: {
            "batch": len(ways[name][1]),
            "tokens_per_second": statistics.median(speeds[name]),
            "tokens_per_second_repeats": speeds[name],
            "new_tokens": sum(map(len, tokens[name])),
            "tokens": tokens[name],
        }
        for name in ways
    }


def agreement(ours: Sequence[Sequence[int]], peer: Sequence[Sequence[int]]) -> float:
    """Share of the new tokens that are equal up to the first difference of each row (a rounding tie ends a row)."""
    equal = 0
    for a, b in zip(ours, peer, strict=True):
        equal += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return equal / sum(map(len, ours))


def main() -> None:
    """Measure, compare, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model folder (runs/NAME/base)")
    parser.add_argument("--random", action="store_true", help="random weights instead of a trained model")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="smoke run: a tiny model with --random, one repeat")
    options = parser.parse_args()
    machine.restart_with(options.threads)
    scratch = tempfile.TemporaryDirectory()
    folder: Path | None = options.model
    if options.random:
        folder = Path(scratch.name)
        random_model(folder, options.quick)
    if folder is None or not (folder / "config.json").is_file():
        raise UserError(f"--model {folder}: no config.json there; give a model folder such as runs/shakespeare/base")
    new, repeats = (16, 1) if options.quick else (options.new_tokens, options.repeats)

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompts = prompts_of(tokenizer, 16, options.prompt_tokens)
    ways: dict[str, tuple[Generate, Sequence[str]]] = {}
    mine = ours_generate(folder, new)
    ways |= {"ours, batch 1": (mine, prompts[:1]), "ours, batch 16": (mine, prompts)}
    for attention in ("eager", "sdpa"):
        peer = transformers_generate(folder, attention, tokenizer, new)
        ways[f"transformers {attention}, batch 1"] = (peer, prompts[:1])
        ways[f"transformers {attention}, batch 16"] = (peer, prompts)
    results = measure(ways, repeats)

    best = {
        b: max(r["tokens_per_second"] for n, r in results.items() if "transformers" in n and r["batch"] == b)
        for b in (1, 16)
    }
    one, many = results["ours, batch 1"], results["ours, batch 16"]
    ratios = {
        "ours_to_transformers": one["tokens_per_second"] / best[1],
        "batch_16_to_batch_1": many["tokens_per_second"] / one["tokens_per_second"],
        "ours_to_transformers_batch_16": many["tokens_per_second"] / best[16],
    }
    same = {
        "batch 1 as transformers": agreement(one["tokens"], results["transformers sdpa, batch 1"]["tokens"]),
        "batch 16 as transformers": agreement(many["tokens"], results["transformers sdpa, batch 16"]["tokens"]),
    }
    rows = [
        (
            n,
            r["tokens_per_second"],
            min(r["tokens_per_second_repeats"]),
            max(r["tokens_per_second_repeats"]),
            r["new_tokens"],
        )
        for n, r in results.items()
    ]
    print(machine.table(("", "tokens/s", "lowest", "highest", "new tokens"), rows))
    for name, ratio in ratios.items():
        target = f" (target {TARGETS[name]:g})" if name in TARGETS else ""
        print(f"{name.replace('_', ' ')}: {ratio:.2f}{target}")
    for name, share in same.items():
        print(f"greedy tokens of {name}: {share:.1%} equal")
    machine.write_result(
        "generate_speed",
        {
            "machine": machine.describe(options.threads),
            "model": "random weights" if options.random else str(folder),
            "settings": {
                "prompt_tokens": options.prompt_tokens,
                "new_tokens": new,
                "repeats": repeats,
                "greedy": True,
                "dtype": "float32",
                "transformers": "dynamic cache, no end-of-text stop",
            },
            "ratios": ratios,
            "targets": TARGETS,
            "share_of_equal_tokens": same,
            "results": {n: {k: v for k, v in r.items() if k != "tokens"} for n, r in results.items()},
        },
        options.quick,
    )


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        sys.exit(str(problem))
