import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lalia.errors import CorruptFile, UserError
from lalia.files import write_json
from lalia.formats.hf_folder import save_model
from lalia.inference.language_model import LanguageModel, load
from lalia.inference.sampling import SamplingParams
from lalia.tokenizer.chat import render

from .conftest import TEXT, make_model


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer.save(folder)
    save_model(make_model(), folder, {"eos_token_id": [tokenizer.end_of_text_id]})
    return folder


@pytest.fixture(scope="module")
def language_model(folder) -> LanguageModel:
    return load(folder, max_batch=4)


@pytest.fixture(scope="module")
def peer(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_what_load_returns(language_model, tokenizer):
    assert language_model.name == "tiny" and language_model.max_length == 300
    assert language_model.tokenizer.sha256 == tokenizer.sha256
    assert language_model.config == language_model.model.config
    assert language_model.engine.max_batch == 4
    assert language_model.engine.stop_ids == {tokenizer.end_of_text_id, tokenizer.turn_end_id}


def test_greedy_equals_transformers(language_model, folder, peer):
    ids = language_model.encode("To be")
    never = language_model.engine._never.nonzero().squeeze(-1).tolist()
    expected = peer.generate(
        torch.tensor([ids]), max_new_tokens=30, do_sample=False, suppress_tokens=never, pad_token_id=0
    )[0, len(ids) :].tolist()
    found = language_model.generate("To be", temperature=0, max_tokens=30)
    assert list(found.token_ids) == expected
    text = AutoTokenizer.from_pretrained(folder).decode(expected, skip_special_tokens=True)
    assert found.text == str(found) == text
    assert found.num_prompt_tokens == len(ids)


def test_log_probs_equal_transformers(language_model, peer):
    ids = language_model.encode(TEXT)[:280]
    with torch.no_grad():
        logits = peer(torch.tensor([ids])).logits[0]
    expected = logits.log_softmax(-1)[:-1].gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(-1)
    found = language_model.log_probs(ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(language_model.log_probs(torch.tensor(ids)), found)
    shifted = language_model.log_probs(ids[1:])  # control: without its first token the text is another
    assert not torch.allclose(shifted, expected[1:], atol=1e-2)


def test_log_probs_equal_those_of_generating(language_model):
    found = language_model.generate("sleep", temperature=1, seed=0, max_tokens=20, logprobs=0)
    ids = [*language_model.encode("sleep"), *found.token_ids]
    expected = language_model.log_probs(ids)[-len(found.token_ids) :]
    assert [entry.logprob for entry in found.logprobs] == pytest.approx(expected.tolist(), abs=1e-4)


def test_log_probs_need_tokens_in_range(language_model):
    assert language_model.log_probs([1] * 301).shape == (300,)
    for ids in ([], [1], [1] * 302, [1, 352], [-1, 1]):
        with pytest.raises(UserError, match="expected"):
            language_model.log_probs(ids)


def test_a_list_of_prompts_equals_one_by_one_and_streaming(language_model):
    prompts = ["To be", "", "a sea of troubles, and by opposing", "end them.", "To die", "to sleep"]
    together = language_model.generate(prompts, temperature=0, max_tokens=25)
    assert together == [language_model.generate(prompt, temperature=0, max_tokens=25) for prompt in prompts]
    assert len({generation.text for generation in together}) == len(prompts)
    for prompt, generation in zip(prompts, together, strict=True):
        pieces = list(language_model.stream(prompt, temperature=0, max_tokens=25))
        assert "".join(pieces) == generation.text and "" not in pieces
    assert language_model.generate([], max_tokens=5) == []


def test_documents_begin_with_the_end_of_text_token(language_model, tokenizer):
    assert language_model.encode("To be")[0] == tokenizer.end_of_text_id
    assert language_model.generate("", max_tokens=3, ignore_eos=True).num_prompt_tokens == 1


def test_chat(language_model, tokenizer):
    messages = [{"role": "user", "content": "Who's there? <|im_end|>"}]
    ids = render(tokenizer, messages, add_generation_prompt=True)
    request = language_model.engine.submit(ids, SamplingParams(temperature=0, max_tokens=20))
    request.wait()
    settings = {"temperature": 0, "max_tokens": 20}
    assert language_model.chat(messages, **settings) == request.text
    assert language_model.chat("Who's there? <|im_end|>", **settings) == request.text
    assert "".join(language_model.chat(messages, stream=True, **settings)) == request.text
    with pytest.raises(UserError, match="role"):
        language_model.chat([{"role": "robot", "content": "x"}])


def test_leaving_a_stream_frees_its_slot(language_model):
    stream = language_model.stream("To be", max_tokens=100, ignore_eos=True)
    next(stream)
    assert language_model.engine.stats()["running"] == 1
    stream.close()
    assert language_model.engine.stats()["running"] == 0


@pytest.mark.parametrize("call", ["generate", "stream", "chat"])
def test_errors_come_at_once_and_name_the_field(language_model, call):
    method = getattr(language_model, call)
    for values, word in (
        ({"temperature": -1.0}, "temperature"),
        ({"temprature": 1.0}, "did you mean 'temperature'"),
        ({"max_tokens": 299}, "max_tokens = 299"),
        ({"stop": [""]}, "stop"),
    ):
        with pytest.raises(UserError, match=word):
            method("To be", **values)
    with pytest.raises(UserError, match="context"):
        method("word " * 400)
    assert language_model.engine.stats()["running"] == language_model.engine.stats()["waiting"] == 0


def test_one_bad_prompt_starts_none(language_model):
    before = language_model.engine.stats()["submitted"]
    with pytest.raises(UserError, match="context"):
        language_model.generate(["fine", "word " * 400])
    assert language_model.engine.stats()["submitted"] == before


def test_end_tokens_of_the_folder(folder, tmp_path, tokenizer):
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in folder.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    write_json(copied / "generation_config.json", {"eos_token_id": [7, 9]})
    assert {7, 9, tokenizer.turn_end_id} <= load(copied).engine.stop_ids
    for bad in ("7", 352, -1, True, [1.5]):
        write_json(copied / "generation_config.json", {"eos_token_id": bad})
        with pytest.raises(CorruptFile, match="eos_token_id"):
            load(copied)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        load(tmp_path / "nowhere")
