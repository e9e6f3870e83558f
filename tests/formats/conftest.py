"""The references' folders and our models of them, made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lalia.formats.hf_folder import load_model
from lalia.model.transformer import Transformer
from tests.formats.references import make_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """name in MODELS -> the reference and the folder that its save_pretrained wrote."""
    made: dict[str, tuple[Any, Path]] = {}

    def get(name: str) -> tuple[Any, Path]:
        if name not in made:
            model, folder = make_reference(name), tmp_path_factory.mktemp("reference")
            model.save_pretrained(folder)
            made[name] = model, folder
        return made[name]

    return get


@pytest.fixture(scope="session")
def loaded(reference: Callable[[str], tuple[Any, Path]]) -> Callable[[str], Transformer]:
    """name -> our model of the reference's folder. Shared: do not change it."""
    made: dict[str, Transformer] = {}

    def get(name: str) -> Transformer:
        if name not in made:
            made[name] = load_model(reference(name)[1])
        return made[name]

    return get
