"""Dropout: where it is, what it drops, and that an interrupted run drops what an uninterrupted one would have."""

from pathlib import Path
from unittest import mock

import pytest
import torch

from lalia.model.transformer import Transformer
from lalia.training.activation_checkpointing import _checkpoint, checkpoint_activations
from lalia.training.trainer import Trainer
from tests.training.conftest import RandomBatches, make_trainer, tiny_model
from tests.training.test_activation_checkpointing import step, wide_model
from tests.training.test_trainer import DyingBatches, Killed, largest_difference, weights

ORDERS = ("pre", "sandwich", "post", "parallel")


@pytest.mark.parametrize("order", ORDERS)
def test_a_share_of_what_each_branch_adds_is_dropped(order: str) -> None:
    model = wide_model(norm_order=order)
    model.set_dropout(0.25)
    shares: list[float] = []

    def look(module: torch.nn.Module, given: tuple[torch.Tensor], result: torch.Tensor) -> None:
        kept = result != 0
        shares.append(1.0 - kept.float().mean().item())
        torch.testing.assert_close(result[kept], given[0][kept] / 0.75)  # so that the mean stays

    hooks = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    tokens = torch.randint(0, model.config.vocab_size, (8, 32), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model.train()(tokens)
    assert len(shares) == 1 + 2 * model.config.num_hidden_layers  # the embedding, and both branches of each layer
    assert shares == pytest.approx([0.25] * len(shares), abs=0.02)
    whole = wide_model(norm_order=order)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(model.eval()(tokens), whole(tokens), rtol=0, atol=0)


def dropped(folder: Path, dies_at: int | None = None) -> Trainer:
    folder.mkdir(exist_ok=True)
    batches = RandomBatches() if dies_at is None else DyingBatches(dies_at)
    return make_trainer(folder, batches=batches, dropout=0.2, micro_batch_size=2, checkpoint_seconds=0.0)


def test_resuming_with_dropout_equals_never_stopping(tmp_path: Path) -> None:
    whole = dropped(tmp_path / "whole")
    whole.train()
    with pytest.raises(Killed):
        dropped(tmp_path / "parts", dies_at=5).train()
    torch.manual_seed(1)  # another process
    resumed = dropped(tmp_path / "parts")
    resumed.train()
    assert largest_difference(weights(resumed), weights(whole)) == 0.0
    other = make_trainer(tmp_path, dropout=0.2, micro_batch_size=2, seed=5)
    other.train()
    assert largest_difference(weights(other), weights(whole)) > 1e-4  # the seed counts


def test_what_is_dropped_depends_on_seed_batch_and_part_alone(tmp_path: Path) -> None:
    def draw(seed: int, step: int, passed_over: int, part: int) -> list[float]:
        trainer = make_trainer(tmp_path, dropout=0.2, seed=seed)
        trainer.step, trainer.passed_over = step, passed_over
        trainer._seed_dropout(part)
        return torch.rand(4).tolist()

    assert draw(1, 3, 0, 0) == draw(1, 3, 0, 0) == draw(1, 1, 2, 0)  # a batch after going back is the same batch
    others = [draw(1, 4, 0, 0), draw(1, 3, 1, 0), draw(1, 3, 0, 1), draw(2, 3, 0, 0), draw(-1, 3, 0, 0)]
    assert draw(1, 3, 0, 0) not in others
    assert len({tuple(values) for values in others}) == 4  # steps 4 + 0 and 3 + 1 are one batch


def test_dropout_that_nobody_seeds_would_show(tmp_path: Path) -> None:
    """Negative control of the above."""
    whole, again = dropped(tmp_path / "one"), dropped(tmp_path / "two")
    with mock.patch.object(Trainer, "_seed_dropout"):
        whole.train()
        again.train()
    assert largest_difference(weights(again), weights(whole)) > 1e-4


def seeded(model: Transformer) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return step(model.train())[1]


def test_a_layer_that_is_computed_again_drops_the_same_again() -> None:
    model = wide_model()
    model.set_dropout(0.2)
    expected = seeded(model)
    for mode in ("selective", "full"):
        checkpoint_activations(model, mode)
        for name, gradient in seeded(model).items():
            assert torch.equal(gradient, expected[name]), (mode, name)
    checkpoint_activations(model, "none")
    for layer in model.layers:
        _checkpoint(layer, random=False)  # negative control: dropping others the second time
    assert any(not torch.equal(gradient, expected[name]) for name, gradient in seeded(model).items())


def test_none_means_none() -> None:
    model = tiny_model().train()
    tokens = torch.arange(16)[None]
    torch.testing.assert_close(model(tokens), model.eval()(tokens), rtol=0, atol=0)
