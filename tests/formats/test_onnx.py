"""Exported graphs in onnxruntime against our model, and the same comparison with one thing wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lalia.errors import UserError
from lalia.formats.onnx.export import Exported, export_onnx
from lalia.formats.onnx.layers import LARGEST_WEIGHT, quantized
from lalia.model.cache import KVCache
from lalia.model.transformer import Transformer
from tests.formats.references import CAUSAL, MODELS, SWITCHES, make_input, our_output

onnx = pytest.importorskip("onnx", reason="pip install 'lalia[onnx]'")
pytest.importorskip("onnxruntime", reason="pip install 'lalia[onnx]'")
from lalia.formats.onnx.run import OnnxModel, compare  # noqa: E402

TOLERANCE = 1e-5
VISIBLE = 5e-5

Loaded = Callable[[str], Transformer]
Graphs = Callable[[str], tuple[OnnxModel, Exported]]


@pytest.fixture(scope="module")
def graphs(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    """name in MODELS -> its graph in onnxruntime, and what the export said."""
    made: dict[str, tuple[OnnxModel, Exported]] = {}

    def get(name: str) -> tuple[OnnxModel, Exported]:
        if name not in made:
            path = tmp_path_factory.mktemp("onnx") / "model.onnx"
            exported = export_onnx(loaded(name), path)
            made[name] = OnnxModel(path, num_threads=1), exported
        return made[name]

    return get


def main_output(name: str, out: dict[str, np.ndarray]) -> np.ndarray:
    """What `our_output` gives for this model."""
    if name == "bert, pooled":
        return np.concatenate((out["last_hidden_state"], out["pooler_output"][:, None]), 1)
    keys = ("logits", "text_embeds", "image_embeds", "last_hidden_state")
    return out[next(key for key in keys if key in out)]


@pytest.mark.parametrize("name", MODELS)
def test_equals_our_model(name: str, graphs: Graphs, loaded: Loaded) -> None:
    graph, exported = graphs(name)
    onnx.checker.check_model(str(exported.files[0]), full_check=True)
    given = make_input(name)
    expected = our_output(name, loaded(name), given).numpy()
    assert np.abs(expected).max() > 1.0
    difference = np.abs(main_output(name, graph.forward(given.numpy())) - expected).max()
    print(f"{name}: {difference:.1e}")
    assert difference <= TOLERANCE


@pytest.mark.parametrize("name", CAUSAL)
def test_step_by_step_with_cache(name: str, graphs: Graphs, loaded: Loaded) -> None:
    """In pieces of several lengths, beside our cache and beside the whole at once."""
    graph, _ = graphs(name)
    model, tokens = loaded(name), make_input(name)
    whole = our_output(name, model, tokens).numpy()
    cache, past = KVCache(model.config, 2, tokens.shape[1]), None
    for begin, end in ((0, 11), (11, 12), (12, 13), (13, 30), (30, 31), (31, tokens.shape[1])):
        past = graph.forward(tokens[:, begin:end].numpy(), past=past)
        with torch.no_grad():
            ours = model.logits(model(tokens[:, begin:end], cache=cache)).numpy()
        cache.lengths = [end, end]
        assert np.abs(past["logits"] - ours).max() <= TOLERANCE
        assert np.abs(past["logits"] - whole[:, begin:end]).max() <= TOLERANCE
    assert past is not None and past["present.2.key"].shape[2] == tokens.shape[1]


@pytest.mark.parametrize("name", CAUSAL)
def test_batch_padded_on_the_left(name: str, graphs: Graphs, loaded: Loaded) -> None:
    """A row with padding in front computes what it computes alone, also in the step that follows."""
    graph, _ = graphs(name)
    tokens = make_input(name).numpy()
    short, padding = tokens[1:, 14:], 14
    padded = np.concatenate((np.zeros((1, padding), np.int64), short), 1)
    mask = np.ones(tokens.shape, np.int64)
    mask[1, :padding] = 0
    out = graph.forward(np.concatenate((tokens[:1], padded)), mask)
    alone = our_output(name, loaded(name), torch.from_numpy(short)).numpy()
    assert np.abs(out["logits"][1, padding:] - alone[0]).max() <= TOLERANCE
    following = np.array([[7], [9]])
    mask = np.concatenate((mask, np.ones((2, 1), np.int64)), 1)
    step = graph.forward(following, mask, past=out)["logits"]
    longer = torch.from_numpy(np.concatenate((short, following[1:]), 1))
    assert np.abs(step[1, 0] - our_output(name, loaded(name), longer).numpy()[0, -1]).max() <= TOLERANCE
    blind = graph.forward(np.concatenate((tokens[:1], padded)))  # negative control: the mask does it
    assert np.abs(blind["logits"][1, padding:] - alone[0]).max() > VISIBLE


@pytest.mark.parametrize("name", ["bert", "bert, pooled", "bert, classifier", "distilbert", "distilbert, encoder"])
def test_encoders_in_a_padded_batch(name: str, graphs: Graphs, loaded: Loaded) -> None:
    graph, _ = graphs(name)
    tokens = make_input(name).numpy()
    mask = np.ones(tokens.shape, np.int64)
    mask[1, 25:] = 0
    out = graph.forward(tokens, mask)
    model, short = loaded(name), torch.from_numpy(tokens[1:, :25])
    alone = our_output(name, model, short).numpy()[0]
    got = main_output(name, out)[1]
    pooled = name == "bert, pooled"
    difference = np.abs(got[:25] - alone[:25]).max() if got.ndim == 2 else np.abs(got - alone).max()
    assert difference <= TOLERANCE
    if "sentence_embedding" in out:
        with torch.no_grad():
            mean = torch.nn.functional.normalize(model(short).mean(1), dim=-1).numpy()[0]
        assert np.abs(out["sentence_embedding"][1] - mean).max() <= TOLERANCE
        everything = main_output(name, out)[1, : 40 if not pooled else -1].mean(0)
        assert np.abs(everything / np.linalg.norm(everything) - mean).max() > VISIBLE


def test_token_types(graphs: Graphs, loaded: Loaded) -> None:
    graph, _ = graphs("bert")
    tokens, model = make_input("bert"), loaded("bert")
    types = (torch.arange(tokens.shape[1]) > 20).long().expand(tokens.shape)
    with torch.no_grad():
        expected = model.logits(model(tokens, token_types=types)).numpy()
    assert np.abs(graph.forward(tokens.numpy(), token_types=types.numpy())["logits"] - expected).max() <= TOLERANCE
    assert np.abs(graph.forward(tokens.numpy())["logits"] - expected).max() > VISIBLE


NEEDS_OTHER_WEIGHTS = {
    "causal",  # an encoder's head
    "embedding_norm",
    "head_bias",
    "head_transform",
    "norm",
    "norm_order",
    "pooler",
    "qk_norm",
    "qkv_bias",
    "rope_scaling.attention_factor",
    "rope_scaling.beta_fast",
    "type_vocab_size",
}
CHANGES = [
    (name, change)
    for name, changes in SWITCHES.items()
    for change in changes
    if not NEEDS_OTHER_WEIGHTS & change.keys()
]
"""Changes of a switch that leave a model's weights as they are."""


@pytest.mark.parametrize(("name", "change"), CHANGES, ids=str)
def test_one_switch_wrong_is_seen(name: str, change: dict[str, Any], loaded: Loaded, tmp_path: Path) -> None:
    """Negative controls: the graph of the same weights with one switch changed is another function."""
    model, given = loaded(name), make_input(name)
    other = Transformer(model.config.model_copy(update=change))
    other.load_state_dict(model.state_dict())
    export_onnx(other, tmp_path / "model.onnx")
    got = main_output(name, OnnxModel(tmp_path / "model.onnx", 1).forward(given.numpy()))
    assert np.abs(got - our_output(name, model, given).numpy()).max() > VISIBLE


def test_names_are_those_of_other_tools(graphs: Graphs) -> None:
    _, decoder = graphs("llama")
    layers = [f"{i}.{part}" for i in range(3) for part in ("key", "value")]
    assert decoder.inputs == ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in layers)]
    assert decoder.outputs == ["logits", *(f"present.{name}" for name in layers)]
    _, encoder = graphs("bert, pooled")
    assert encoder.inputs == ["input_ids", "attention_mask", "token_type_ids"]
    assert encoder.outputs == ["last_hidden_state", "pooler_output", "sentence_embedding"]


def test_a_task_that_does_not_fit_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'fill-mask' does not fit this llama model; choose one of text-generation"):
        export_onnx(loaded("llama"), tmp_path / "model.onnx", task="fill-mask")
    assert not list(tmp_path.iterdir())


def test_weights_in_a_second_file(graphs: Graphs, loaded: Loaded, tmp_path: Path) -> None:
    exported = export_onnx(loaded("llama"), tmp_path / "model.onnx", max_inline_bytes=1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data"]
    assert exported.files[0].stat().st_size < 0.3 * exported.num_bytes
    onnx.checker.check_model(str(exported.files[0]), full_check=True)
    tokens = make_input("llama").numpy()
    one, other = (graph.forward(tokens)["logits"] for graph in (graphs("llama")[0], OnnxModel(tmp_path / "model.onnx")))
    assert np.array_equal(one, other)
    export_onnx(loaded("llama"), tmp_path / "model.onnx")  # a second file that is no longer needed goes away
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_greedy_generation_equals_ours(graphs: Graphs, loaded: Loaded) -> None:
    model, ids = loaded("qwen3"), make_input("qwen3")[0, :9].tolist()
    got = graphs("qwen3")[0].generate(ids, 20)
    expected: list[int] = []
    for _ in range(20):
        with torch.no_grad():
            hidden = model(torch.tensor([ids + expected]))
        expected.append(int(model.logits(hidden)[0, -1].argmax()))
    assert got == expected and len(set(got)) > 3
    assert graphs("qwen3")[0].generate(ids, 20, frozenset(expected[4:5])) == expected[: expected.index(expected[4]) + 1]


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3_text", "bert", "distilbert, encoder"])
def test_int8_is_smaller_and_near(name: str, loaded: Loaded, graphs: Graphs, tmp_path: Path) -> None:
    model = loaded(name)
    exported = export_onnx(model, tmp_path / "q.onnx", int8=True)
    assert exported.num_bytes < 0.45 * graphs(name)[1].num_bytes  # tiny models are half graph
    figures = compare(model, OnnxModel(tmp_path / "q.onnx", 1), make_input(name).tolist())
    print(name, figures)
    assert 1e-4 < figures["relative_error"] < (0.2 if name == "mixtral" else 0.1)  # a router may choose otherwise
    assert figures.get("top1_agreement", 1.0) > 0.85
    exact = compare(model, graphs(name)[0], make_input(name).tolist())
    assert exact["relative_error"] < 1e-5 and exact.get("top1_agreement", 1.0) == 1.0


@pytest.mark.parametrize("per_channel", [False, True])
def test_int8_is_nearer_than_onnxruntimes_own(
    per_channel: bool, loaded: Loaded, graphs: Graphs, tmp_path: Path
) -> None:
    """quantize_dynamic has one range of activations for all tokens; a first token of another size spoils it."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    source = loaded("llama")
    model = Transformer(source.config)
    model.load_state_dict(source.state_dict())
    with torch.no_grad():
        model.embedding.weight[0] *= 50.0
    tokens = make_input("llama")
    tokens[:, 0] = 0
    export_onnx(model, tmp_path / "f.onnx")
    export_onnx(model, tmp_path / "q.onnx", int8=True)
    quantization.quantize_dynamic(tmp_path / "f.onnx", tmp_path / "theirs.onnx", per_channel=per_channel)
    ours, theirs = (
        compare(model, OnnxModel(tmp_path / name, 1), tokens.tolist())["relative_error"]
        for name in ("q.onnx", "theirs.onnx")
    )
    print(f"{ours:.3f} {theirs:.3f}")
    assert ours < theirs


def test_quantized_rows() -> None:
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 5)[:, None]
    weight[4] = 0.0
    values, scale = quantized(weight)
    assert values.dtype == torch.int8 and values.abs().max() == LARGEST_WEIGHT
    error = (values * scale[:, None] - weight).abs().amax(-1)
    assert torch.all(error <= scale * 0.5001)


def test_damaged_file(tmp_path: Path, graphs: Graphs) -> None:
    _, exported = graphs("llama")
    content = exported.files[0].read_bytes()
    (tmp_path / "model.onnx").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"model\.onnx does not load in onnxruntime"):
        OnnxModel(tmp_path / "model.onnx")
    with pytest.raises(UserError, match="there is no file"):
        OnnxModel(tmp_path / "other.onnx")
