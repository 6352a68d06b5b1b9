"""Peak memory, measured in a process that does nothing else."""

import multiprocessing
import signal
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import nn

from train.bench.contenders import Workshop
from train.bench.jobs import Job, prepared
from train.bench.machine import peak_of
from train.memory import keep_freed_memory


def peak_memory(job: Job) -> int | None:
    """Bytes that a process of its own holds at most for this job, beyond Python and libraries.

    That is weights and activations; training, gradients and the optimiser's state too; decoding, a
    packed copy of the weights beside those it was made of. None where the system does not tell.

    Raises:
        MemoryError: if there is not enough for it.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit what is held here
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_work, args=(job, torch.get_num_threads(), sender), daemon=True
    )
    process.start()
    sender.close()
    try:
        found: int | None = receiver.recv()
    except EOFError:
        raise MemoryError from None
    finally:
        process.terminate()
        process.join()
        receiver.close()
    return found


def _work(job: Job, threads: int, sender: Connection) -> None:
    """Of the process: does the job twice, as what an optimiser keeps is there after the first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent alone hears of Ctrl-C
    torch.set_num_threads(threads)
    keep_freed_memory()
    if job.contender.library != "ebb":
        from train.bench import peers

        peers.load(job.contender.library)

    _load_lazily()

    def work() -> None:
        run = prepared(job, Workshop().build(job.contender))
        run()
        run()

    sender.send(peak_of(work))


def _load_lazily() -> None:
    """A step of the smallest model: what PyTorch loads and starts only then is no one's memory."""
    layer = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    loss = F.cross_entropy(layer(torch.zeros(64, 64)), torch.zeros(64, dtype=torch.long))
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
