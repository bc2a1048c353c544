"""Train the toy base from nothing: text encoders, autoencoder, transformer, guidance; resumes where it stopped.

    python -m toyflux.build --out FOLDER --work WORKFOLDER [--workers N] [--device cpu|cuda]

Lengths are counted in steps and every step draws from its own seed, so the recipe does not depend on the machine's
speed. On a CPU the work is shared by processes of one thread each (a mean of gradients a step): threads that meet
hundreds of times a step lose far more to a busy neighbour. Needs nothing but `toyflux.world`; downloads nothing.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from toyflux.autoencoder import train_vae
from toyflux.stage import Machine
from toyflux.text import Text, train_text
from toyflux.transformer import distil_guidance, new_transformer, render_pool, train_transformer


def save_pipeline(folder: Path, vae: AutoencoderKL, text: Text, transformer: FluxTransformer2DModel) -> None:
    """The whole base as a FluxPipeline folder, weights in bfloat16, readable by all."""
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    half = [copy.deepcopy(module).to(torch.bfloat16) for module in (vae, text.encoder, text.encoder_2, transformer)]
    FluxPipeline(
        scheduler=scheduler,
        vae=half[0],
        text_encoder=half[1],
        tokenizer=text.tokenizer,
        text_encoder_2=half[2],
        tokenizer_2=text.tokenizer_2,
        transformer=half[3],
    ).save_pretrained(folder)
    for path in folder.rglob("*.*"):
        path.chmod(0o644)


def _work(rank: int, arguments: argparse.Namespace) -> None:
    machine = Machine(rank=rank, workers=arguments.workers, device=arguments.device, work=arguments.work)
    if machine.workers > 1:
        torch.set_num_threads(1)
        rendezvous = f"file://{(arguments.work / 'rendezvous').resolve()}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=machine.workers)
    log: Callable[[str], None] = lambda line: print(line, flush=True)  # noqa: E731
    text = train_text(machine, 1000, 48, log)
    vae = train_vae(machine, 8000, 8, log)
    pool = render_pool(machine, vae, 64000, log, company=False)
    torch.manual_seed(2)
    teacher = new_transformer().to(machine.device)
    train_transformer("transformer", machine, teacher, text, pool, steps=36000, batch=32, lr=2e-3, log=log)
    pool = render_pool(machine, vae, 168000, log, company=True)
    train_transformer("company", machine, teacher, text, pool, steps=51500, batch=32, lr=1e-3, log=log)
    student = distil_guidance(machine, text, teacher, pool, 500, 32, log)
    if rank == 0:
        save_pipeline(arguments.out, vae, text, student)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m toyflux.build", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the pipeline's folder")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; a stage found here resumes")
    parser.add_argument("--workers", type=int, default=2, help="processes that share a step (CPU only)")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    (arguments.work / "rendezvous").unlink(missing_ok=True)
    if arguments.workers > 1:
        torch.multiprocessing.spawn(_work, (arguments,), nprocs=arguments.workers)
    else:
        _work(0, arguments)


if __name__ == "__main__":
    main()
