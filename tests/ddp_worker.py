"""Two ranks, on the CPU or on two GPUs: run by test_hazards.py in processes of its own."""

import copy
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from tests.harness import Harness, assert_same, images
from tests.models import ConvNetClassifier


class OneRankWaits(ConvNetClassifier):
    """Its second rank does what no graph can hold."""

    def validation_step(self, batch, batch_idx):
        if self.is_second_rank:
            batch[0].sum().item()
        super().validation_step(batch, batch_idx)


def run(harness: Harness, model: LightningModule) -> str:
    """Fits and validates with and without graphs on two ranks; gives the steps by mode."""
    callback = harness.callback(warmup_steps=1)
    seen = []
    for extra in ([callback], []):
        torch.manual_seed(1)
        module = copy.deepcopy(model)
        trainer: Trainer = harness.trainer(*extra, strategy="ddp", devices=2)
        module.is_second_rank = trainer.global_rank == 1
        trainer.fit(module, images(48), images(52))
        trainer.validate(module, images(52), verbose=False)
        seen.append((dict(trainer.callback_metrics), dict(module.state_dict())))
    assert_same(*seen)
    assert callback.stats.replays > 0, callback.summary()
    return str(callback.stats.steps)


def main(backend: str, folder: Path) -> None:
    """Each rank writes what it saw."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    harness = Harness(backend, folder)
    alike = run(harness, ConvNetClassifier(4))
    apart = run(harness, OneRankWaits(4))
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}").write_text(f"{alike}\n{apart}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
