"""Our model against transformers' (and Grok-1's equations), in both directions, and with one thing wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lalia.formats.hf_folder import load_model, save_model
from lalia.inference import context
from lalia.model.families.registry import FAMILIES
from lalia.model.transformer import Transformer
from tests.formats.parity import CHECKS, TOLERANCE, VISIBLE, altered, checks_of, control, one_pass, spelled
from tests.formats.references import CAUSAL, MODELS, SWITCHES, make_input, our_output, their_output

Reference = Callable[[str], tuple[Any, Path]]
Loaded = Callable[[str], Transformer]


def test_every_family_has_a_reference() -> None:
    assert {model_type for model_type, _, _ in MODELS.values()} == set(FAMILIES)
    assert {MODELS[name][0] for name in SWITCHES} == set(FAMILIES)


@pytest.mark.parametrize(("name", "check"), [(name, check) for name in MODELS for check in checks_of(name)])
def test_parity(name: str, check: str, reference: Reference, loaded: Loaded, tmp_path: Path) -> None:
    found = CHECKS[check](name, reference(name)[0], loaded(name), tmp_path)
    print(f"{name}, {check}: {found:.2e}")
    assert found <= TOLERANCE


@pytest.mark.parametrize("name", CAUSAL)
def test_decoder_sequence_by_sequence(
    name: str, reference: Reference, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How batches of long sequences attend; `test_parity` takes the padded way of short ones."""
    monkeypatch.setattr(context, "PADDED_BATCH_TOKENS", 0)
    assert CHECKS["decoder"](name, reference(name)[0], loaded(name), tmp_path) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_same_size_and_a_visible_output(name: str, reference: Reference, loaded: Loaded) -> None:
    theirs, _ = reference(name)
    assert their_output(name, theirs, make_input(name)).abs().max() > 0.5
    # Classes with a head of images or of text keep a position buffer, but no other weight than ours.
    assert loaded(name).num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize(
    ("name", "changes"),
    [(name, changes) for name, controls in SWITCHES.items() for changes in controls],
    ids=lambda value: value if isinstance(value, str) else spelled(value),
)
def test_one_thing_wrong_is_seen(name: str, changes: dict[str, Any], reference: Reference, loaded: Loaded) -> None:
    assert control(name, reference(name)[0], loaded(name), changes) > VISIBLE


@pytest.mark.parametrize("name", SWITCHES)
def test_nothing_wrong_is_not_seen(name: str, reference: Reference, loaded: Loaded, tmp_path: Path) -> None:
    """What the controls do, without a change."""
    assert one_pass(name, reference(name)[0], altered(loaded(name), {}), tmp_path) <= TOLERANCE


def test_norm_without_weights_commutes_with_rotation(reference: Reference, loaded: Loaded) -> None:
    """Why nanochat has no control "QK-norm before the rotation": a rotation keeps the length of a vector."""
    changes = {"qk_norm": "before_rope"}
    assert control("nanochat", reference("nanochat")[0], loaded("nanochat"), changes) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in MODELS if name != "grok-1"])
def test_bfloat16_is_as_close_as_theirs(name: str, reference: Reference) -> None:
    """Against their float32, with the error of their own bfloat16 as the yardstick."""
    theirs, folder = reference(name)
    given = make_input(name)
    expected = their_output(name, theirs, given)
    ours = our_output(name, load_model(folder, torch.bfloat16), given)
    assert ours.dtype == torch.bfloat16
    kind = getattr(transformers, MODELS[name][1])
    low = kind.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager").eval()
    if name == "clip vision":
        given = given.to(torch.bfloat16)
    yardstick = (their_output(name, low, given).float() - expected).pow(2).mean().sqrt()
    assert (ours.float() - expected).pow(2).mean().sqrt() < 1.5 * yardstick


@pytest.mark.parametrize("name", MODELS)
def test_our_folder_comes_back_whole(name: str, loaded: Loaded, tmp_path: Path) -> None:
    ours = loaded(name)
    save_model(ours, tmp_path, {"eos_token_id": [1, 2], "bos_token_id": 0})
    again = load_model(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    if name in CAUSAL and name != "grok-1":
        assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == [1, 2]
        auto: Any = transformers.AutoModelForCausalLM
        assert type(auto.from_pretrained(tmp_path)).__name__ == MODELS[name][1]
