"""Training on several ranks: weights, gradients, metrics and logs equal those of eager."""

import pytest
import torch

from tests.processes import run_two_ranks


@pytest.fixture
def two_ranks(backend):
    if backend == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return backend


EAGER = {
    # case: the ranks that no graph runs on, and a word of the reason
    "one rank waits": ((1,), "host sync"),
    "one rank lacks memory": ((1,), "OutOfMemoryError: out of memory"),
    "one rank lacks memory in its backward": ((1,), "OutOfMemoryError: out of memory"),
    "checkpoint": ((0, 1), "CheckpointFunction runs another one"),
    "logs over ranks in the step": ((0, 1), "collective"),
    "normalized over ranks": ((0, 1), "collective"),
    "reduced in the backward": ((0, 1), "ReducedBackward runs a collective"),
    "reduced in a hook": ((0, 1), "plus_mean_over_ranks runs a collective"),
    "reduced in a hook of a module": ((0, 1), "plus_mean_of_input runs a collective"),
    "reduced in a pre-hook of a module": ((0, 1), "before_plus_mean runs a collective"),
    "logs over ranks in a hook": ((0, 1), "collective"),
    "reads cleared gradients": ((0, 1), "ReadsClearedGradients.on_before_backward"),
    "synchronized norm": ((0, 1), "collective"),
    "synchronized norm, other shapes": ((0, 1), "collective"),
}


BY_DDP = {
    *("unused", "static", "buckets", "without gradient", "freezes"),
    *("hook of the communication", "hook that reads gradients"),
    "built-in hook of the communication",
}
"""Cases in which DDP does more than to reduce gradients, or something else."""


def test_everything_is_equal_on_both_ranks(tmp_path, two_ranks):
    """Hazard 44: also if the ranks do not capture in the same step, or one cannot."""
    done = run_two_ranks("tests.ddp_training_worker", "main", two_ranks, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    _check_ranks(tmp_path, 2, 28)


@pytest.mark.exhaustive
def test_everything_is_equal_on_three_ranks(tmp_path, backend):
    """Hazard 44: a sum over three ranks depends on the order in which gradients are reduced."""
    if backend == "cuda" and torch.cuda.device_count() < 3:
        pytest.skip("needs three CUDA devices")
    arguments = ("three", backend, str(tmp_path))  # its Trainer starts the others
    done = run_two_ranks("tests.ddp_training_worker", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    _check_ranks(tmp_path, 3, 6)


def _check_ranks(folder, ranks, cases):
    for rank in range(ranks):
        lines = (folder / f"rank{rank}").read_text().splitlines()
        assert len(lines) >= cases
        for line in lines:
            name, replays, reduced, *reasons = line.split("\t")
            ranks, words = EAGER.get(name, ((), ""))
            if rank in ranks:
                assert int(replays) == 0, line
                assert words in str(reasons), line
            else:
                assert int(replays) > 4, line
                # private: the reducer of DDP shows its buckets
                assert (int(reduced) > 4) == (name not in BY_DDP), line


def test_an_error_on_one_rank_ends_both(tmp_path, two_ranks):
    done = run_two_ranks("tests.ddp_training_worker", "stop", two_ranks, str(tmp_path))
    assert done.returncode != 0
    assert "the second rank stops" in done.stderr
    assert "replays 0" not in done.stdout
    assert "replays " in done.stdout


ENDS = {
    # job: whether the processes end with the status 0
    "end": True,
    "interrupt": False,
    "interrupt_one": False,
}


@pytest.mark.parametrize(
    "job", ["end", "interrupt_one", pytest.param("interrupt", marks=pytest.mark.exhaustive)]
)
def test_both_ranks_end(tmp_path, two_ranks, job):
    """At the end of a script, by Ctrl-C, and if one process is interrupted."""
    done = run_two_ranks("tests.ddp_training_worker", job, two_ranks, str(tmp_path))
    assert (done.returncode == 0) == ENDS[job], done.stdout + done.stderr
    replays = [int(line.split()[1]) for line in done.stdout.splitlines() if "replays" in line]
    assert min(replays, default=0) > 3, done.stdout + done.stderr


def test_a_strategy_that_moves_parameters(tmp_path, backend):
    """It is said once, training is as without the callback, and with ``strict`` it is an error."""
    done = run_two_ranks("tests.ddp_training_worker", "moved", backend, str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    words = "ModelParallelStrategy moves parameters between steps"
    said = [line for line in done.stdout.splitlines() if words in line]
    assert [line.split()[0] for line in said] == ["said:", "strict:"]
    assert "modes: NONE" in done.stdout.splitlines()
