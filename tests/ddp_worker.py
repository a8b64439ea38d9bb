"""Two ranks on the CPU: run by test_hazards.py in processes of its own."""

import copy
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from tests.harness import Harness, assert_same, images
from tests.models import ConvNetClassifier


def main(folder: Path) -> None:
    """Fits with and without graphs on two ranks; rank 0 writes what it saw."""
    folder.mkdir(exist_ok=True)
    harness = Harness("recorder", folder)
    model = ConvNetClassifier(4)
    callback = harness.callback(warmup_steps=1)
    seen = []
    for extra in ([callback], []):
        torch.manual_seed(1)
        module = copy.deepcopy(model)
        trainer: Trainer = harness.trainer(*extra, strategy="ddp", devices=2, accelerator="cpu")
        trainer.fit(module, images(48), images(52))
        trainer.validate(module, images(52), verbose=False)
        seen.append((dict(trainer.callback_metrics), dict(module.state_dict())))
    assert_same(*seen)
    assert callback.stats.replays > 0, callback.summary()
    (folder / f"rank{trainer.global_rank}").write_text(str(callback.stats.steps))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.manual_seed(0)
    main(Path(sys.argv[1]))
