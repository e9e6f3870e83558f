"""Files of a run that are damaged or gone: said clearly, and mended by what the message says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import SETTINGS, Main, refused


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run to damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def garble(path: Path) -> None:
    path.write_bytes(b"\xff\xfe not what it was")


def replace_by_list(path: Path) -> None:
    path.write_text("[]\n", encoding="utf-8")


Damage = Callable[[Path], None]
DAMAGES = (cut, empty, garble)


@pytest.mark.parametrize("damage", [*DAMAGES, flip])
@pytest.mark.parametrize("name", ["train-00000.bin", "validation-00000.bin", "train-00000.idx.npy"])
def test_damaged_shard(main: Main, run: Path, name: str, damage: Damage) -> None:
    damage(run / "tokens" / name)
    base = (run / "base" / "model.safetensors").read_bytes()
    refused(main("pretrain", str(run), "pretrain.seed=9"), str(run / "tokens" / name), "delete the tokens folder")
    assert (run / "base" / "model.safetensors").read_bytes() == base
    if damage is cut and name == "train-00000.bin":
        shutil.rmtree(run / "tokens")  # the remedy
        answer = main("pretrain", str(run), "pretrain.seed=9")
        assert answer.code == 0, answer.err


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokenizer(main: Main, run: Path, damage: Damage) -> None:
    damage(run / "tokens" / "tokenizer" / "tokenizer.json")
    answer = main("pretrain", str(run), "pretrain.seed=9")
    refused(answer, "tokenizer.json", "run tokenize again")
    damage(run / "base" / "tokenizer.json")
    refused(main("generate", str(run / "base"), "The"), "tokenizer.json")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_plan(main: Main, run: Path, damage: Damage) -> None:
    path = run / "plan" / "plan.json"
    damage(path)
    refused(main("run", str(run)), str(path), "delete it and run the same command again")
    path.unlink()  # the remedy
    answer = main("run", str(run))
    assert answer.code == 0, answer.err
    assert f"plan: made anew because {path} is missing" in answer.err
    assert "tokens: done" in answer.err


@pytest.mark.parametrize("damage", [*DAMAGES, flip])
def test_damaged_parquet(main: Main, run: Path, damage: Damage) -> None:
    damage(run / "documents" / "train.parquet")
    answer = main("tokenize", str(run), "tokenizer.vocab_size=448")
    refused(answer, "train.parquet", "damaged", "run the collect stage again")
    shutil.rmtree(run / "documents")  # the remedy
    answer = main("tokenize", str(run), "tokenizer.vocab_size=448")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("damage", [*DAMAGES, replace_by_list])
def test_damaged_receipt(main: Main, run: Path, damage: Damage) -> None:
    damage(run / "tokens" / "receipt.json")
    refused(main("run", str(run)), str(run / "tokens" / "receipt.json"), "delete", "run the same command again")
    refused(main("run", str(run), "--dry-run"), "receipt.json")
    (run / "tokens" / "receipt.json").unlink()  # the remedy
    answer = main("run", str(run))
    assert answer.code == 0, answer.err
    assert "base: done" in answer.err  # the tokens come out the same, so what was made of them stays


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_recipe_of_a_run(main: Main, run: Path, corpus: Path, damage: Damage) -> None:
    damage(run / "recipe.toml")
    refused(main("run", str(run)), "recipe.toml")
    answer = main("run", str(corpus), *SETTINGS, "--run", str(run))
    assert answer.code == 0, answer.err
    assert answer.err.count("done (finished in") == 7


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_model(main: Main, run: Path, name: str, damage: Damage) -> None:
    damage(run / "base" / name)
    damage(run / "chat" / name)
    refused(main("generate", str(run), "The"), name)
    refused(main("chat", str(run), stdin="Hello\n"), name)
    refused(main("evaluate", str(run), "evaluate.samples=2"), name)
    (run / "base" / name).unlink()
    planned = json.loads(main("run", str(run), "--dry-run", "--json").out)["stages"]
    assert planned["base"] == ["make", f"made anew because {run / 'base' / name} is missing"]


def test_a_model_that_is_gone(main: Main, run: Path) -> None:
    (run / "chat" / "model.safetensors").unlink()
    refused(main("chat", str(run), stdin="Hello\n"), "model.safetensors", "did not finish")
    shutil.rmtree(run / "chat")
    assert main("chat", str(run), stdin="Hello\n").code == 0  # the base model of the same run answers
    shutil.rmtree(run / "base")
    refused(main("chat", str(run), stdin="Hello\n"), "has no config.json")


@pytest.fixture
def interrupted(main: Main, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a run that was stopped in the middle of pretraining, with two checkpoints on disk."""
    from lalia.training.trainer import Trainer

    arguments = [
        "pretrain",
        str(corpus),
        *SETTINGS,
        "pretrain.checkpoint_seconds=0.001",
        "--run",
        str(tmp_path / "run"),
    ]
    train_step = Trainer._train_step

    def stop_at_12(self: Trainer, batch: object) -> object:
        if self.step == 12:
            raise KeyboardInterrupt
        return train_step(self, batch)  # pyright: ignore[reportArgumentType]

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stop_at_12)
        answer = main(*arguments)
    assert answer.code == 130
    assert answer.err.endswith("lalia: stopped; the same command continues where it left off\n")
    assert len(checkpoints(tmp_path / "run")) == 2
    return arguments


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / ".base.partial").glob("step-*/*.safetensors"))


def test_an_interrupted_run_continues(main: Main, interrupted: list[str]) -> None:
    answer = main(*interrupted)
    assert answer.code == 0, answer.err
    assert "base: continuing" in answer.err
    assert "continuing at step 12 of 60" in answer.err


def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    main: Main, interrupted: list[str], tmp_path: Path, finished_run: Path
) -> None:
    cut(checkpoints(tmp_path / "run")[-1])
    answer = main(*interrupted)
    assert answer.code == 0, answer.err
    assert "damaged" in answer.err
    assert "continuing at step 11 of 60" in answer.err
    ours = (tmp_path / "run" / "base" / "model.safetensors").read_bytes()
    assert ours == (finished_run / "base" / "model.safetensors").read_bytes()


def test_without_a_whole_checkpoint_the_stage_starts_anew_and_says_so(
    main: Main, interrupted: list[str], tmp_path: Path, finished_run: Path
) -> None:
    for path in checkpoints(tmp_path / "run"):
        garble(path)
    answer = main(*interrupted)
    assert answer.code == 0, answer.err
    assert answer.err.count("is damaged") == 2
    assert "warning: no checkpoint is whole; this stage starts at step 0 again" in answer.err
    ours = (tmp_path / "run" / "base" / "model.safetensors").read_bytes()
    assert ours == (finished_run / "base" / "model.safetensors").read_bytes()


def test_damaged_checkpoints_do_not_outlive_new_ones(
    main: Main, interrupted: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest two are kept by step: a damaged step 12 must not push out the new steps 1 to 5."""
    from lalia.training.trainer import Trainer

    for path in checkpoints(tmp_path / "run"):
        garble(path)
    train_step = Trainer._train_step

    def stop_at_5(self: Trainer, batch: object) -> object:
        if self.step == 5:
            raise KeyboardInterrupt
        return train_step(self, batch)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(Trainer, "_train_step", stop_at_5)
    assert main(*interrupted).code == 130
    assert [path.parent.name for path in checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000005"]


def test_an_interrupted_run_with_another_setting_says_what_changed(main: Main, interrupted: list[str]) -> None:
    answer = main(*interrupted, "pretrain.seed=9")
    assert answer.code == 0, answer.err
    assert "base: started anew because" in answer.err
    assert "changed since it was interrupted" in answer.err


def test_a_run_folder_of_another_recipe_says_why_things_are_redone(main: Main, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for number in range(4):
        (other / f"{number}.txt").write_text(f"Document {number} says something else. " * 100, encoding="utf-8")
    model = (run / "base" / "model.safetensors").read_bytes()
    answer = main("collect", str(other), "--run", str(run))
    assert answer.code == 0, answer.err
    assert "documents: made anew because data.path changed" in answer.err
    assert (run / "base" / "model.safetensors").read_bytes() == model  # until a new one is whole


def test_a_stage_stopped_just_before_its_rename_is_not_done_twice(
    main: Main, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(temporary: Path, target: Path) -> None:
        raise KeyboardInterrupt

    arguments = ["tokenize", str(corpus), *SETTINGS, "--run", str(tmp_path / "run")]
    assert main("collect", *arguments[1:]).code == 0
    with monkeypatch.context() as patch:
        patch.setattr("lalia.pipeline.replace_directory", crash)
        assert main(*arguments).code == 130
    answer = main(*arguments)
    assert answer.code == 0, answer.err
    assert "training a vocabulary" not in answer.err
    assert (tmp_path / "run" / "tokens" / "receipt.json").exists()
