"""Train the toy base from nothing: text encoders, autoencoder, transformer, guidance; resumes where it stopped.

    python -m toyflux.build --out FOLDER --work WORKFOLDER [--workers N] [--device cpu|cuda]

Lengths are counted in steps and every step draws from its own seed, so the recipe does not depend on the machine's
speed. On a CPU the work is shared by processes of one thread each (a mean of gradients a step): threads that meet
hundreds of times a step lose far more to a busy neighbour. Needs nothing but `toyflux.world`; downloads nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import string
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from toyflux import world
from toyflux.muon import Muon

TEXT_TOKENS = 40
"""T5's length: enough for two items, a background and a style with made-up names."""


# ---------------------------------------------------------------- the training loop that all stages share


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a stage runs: this process's place among its workers, and the device."""

    rank: int
    workers: int
    device: str
    work: Path


def fit(
    name: str,
    machine: Machine,
    module: nn.Module,
    loss_of: Callable[[int, random.Random], Tensor],
    *,
    steps: int,
    lr: float,
    matrices: Sequence[nn.Parameter] = (),
    averaging: float = 0.998,
    hold: float = 0.0,
    log: Callable[[str], None] = print,
) -> None:
    """Train the module's parameters on `loss_of(step, rng)` and leave their moving average in it.

    Warm-up over 2 % of the steps, then (after a share `hold` of them) half a cosine down to 2 % of `lr`. `matrices` go
    to Muon at 2.5 times the rate, the rest to AdamW. A checkpoint every 200 steps in the work folder; a stage that is
    done returns at once.
    """
    path = machine.work / f"{name}.pt"
    parameters = [p for p in module.parameters() if p.requires_grad]
    chosen = {id(p) for p in matrices}
    rest = [p for p in parameters if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=1e-4, fused=True)
    ]
    if matrices:
        optimizers.append(Muon(list(matrices), lr=lr))
    average = [p.detach().clone() for p in parameters]
    first = 0
    if path.exists():
        saved = torch.load(path, map_location=machine.device)
        first = saved["step"]
        for target, source in ((parameters, saved["parameters"]), (average, saved["average"])):
            for a, b in zip(target, source, strict=True):
                a.data.copy_(b)
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    started, smooth = time.monotonic(), 0.0
    for step in range(first, steps):
        progress = max(0.0, step / steps - hold) / (1 - hold)
        rate = lr * min(1.0, (step + 1) / (0.02 * steps)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * (2.5 if isinstance(optimizer, Muon) else 1)
        torch.manual_seed(hash_of(name, step, machine.rank))
        loss = loss_of(step, random.Random(f"{name} {step} {machine.rank}"))
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if machine.workers > 1:
            flat = torch.cat(
                [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
            )
            dist.all_reduce(flat)
            flat /= machine.workers
            for p, g in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                p.grad = g.view_as(p)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(average, list[Tensor](parameters), 1 - min(averaging, (1 + step) / (10 + step)))
        value = float(loss.detach())
        smooth = value if step == first else 0.98 * smooth + 0.02 * value
        if machine.rank == 0 and (step + 1) % 50 == 0:
            pace = (time.monotonic() - started) / (step + 1 - first)
            left = pace * (steps - step - 1) / 60
            log(f"{name} {step + 1}/{steps} loss {smooth:.4f} lr {rate:.1e} {pace:.3f} s/it {left:.1f} min left")
        if machine.rank == 0 and ((step + 1) % 200 == 0 or step + 1 == steps):
            state = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(
                {"step": step + 1, "parameters": parameters, "average": average, "optimizers": state},
                path.with_suffix(".new"),
            )
            path.with_suffix(".new").replace(path)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)


def hash_of(name: str, step: int, rank: int) -> int:
    """A seed for one step of one worker."""
    return random.Random(f"seed {name} {step} {rank}").getrandbits(48)


# ---------------------------------------------------------------- the autoencoder


def new_vae() -> AutoencoderKL:
    """Eight times smaller each way, 16 channels, as FLUX.1's; the decoder is the deeper half.

    Norms take all channels as one group; of eight groups the first levels would have two channels each.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 64),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=1,
        sample_size=world.NATIVE[0],
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of one size as (n, 3, height, width) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def _any_picture(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    kind = rng.random()
    if kind < 0.2:
        return world.clutter(rng, size)
    if kind < 0.5:
        manner = world.style(world.made_up_word(rng)) if rng.random() < 0.5 else None
        scene = world.sample_scene(rng, [world.creature(world.made_up_word(rng))], manner)
        return world.draw(scene, rng.getrandbits(32), size)
    return world.draw(world.training_scene(rng), rng.getrandbits(32), size)


def _some_pictures(rng: random.Random, count: int, whole: bool) -> Tensor:
    """`count` crops of 64 pixels, or half as many whole pictures of any size. A fifth of them are of nothing in the
    world, so that users' photographs survive too."""
    size = world.training_size(rng) if whole else world.NATIVE
    x = to_tensor([_any_picture(rng, size) for _ in range(max(1, count // 2))])
    if not whole:
        corners = [(rng.randrange(0, 33, 4), rng.randrange(0, 33, 4)) for _ in range(2)]
        x = torch.cat([x[:, :, i : i + 64, j : j + 64] for i, j in corners])
    return x.flip(-1) if rng.random() < 0.5 else x


def _picture_loss(error: Tensor) -> Tensor:
    """Absolute and squared, and that of the gradients (edges)."""
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + error.square().mean() + 0.5 * edges


def principal_components(device: str) -> Callable[[Tensor], Tensor]:
    """What makes of pictures (n, 3, height, width) the 16 principal components of every square of 8 x 8 pixels, with a
    variance of 1 each over the world: (n, 16, height / 8, width / 8)."""
    rng = random.Random("squares")
    pictures = to_tensor([world.draw(world.training_scene(rng), i) for i in range(256)])
    squares = F.unfold(pictures, 8, stride=8).mT.flatten(0, 1)  # (n, 192)
    mean = squares.mean(0)
    _, sizes, directions = torch.linalg.svd(squares - mean, full_matrices=False)
    basis = (directions[:16] / sizes[:16, None] * math.sqrt(len(squares))).to(device)
    kernels = basis.view(16, 3, 8, 8)
    bias = -basis @ mean.to(device)
    return lambda x: F.conv2d(x, kernels, bias, stride=8)


def train_vae(machine: Machine, steps: int, batch: int, log: Callable[[str], None]) -> AutoencoderKL:
    """Both halves, then the scale and shift that make latents of the world about standard normal.

    The first twentieth teaches them apart: the encoder to find the principal components of a picture's squares, the
    decoder to draw from those (29 dB of the world are in them). After 300 steps of 4 pictures the two were at 20 dB
    this way, at 14 with each other alone to learn from. Then together, the last fifth on whole pictures.
    """
    torch.manual_seed(0)
    vae = new_vae().to(machine.device)
    components = principal_components(machine.device)
    share = max(1, batch // machine.workers)

    def loss_of(step: int, rng: random.Random) -> Tensor:
        x = _some_pictures(rng, share, whole=step >= 0.8 * steps).to(machine.device)
        posterior = vae.encode(x).latent_dist
        if step < steps // 20:
            wanted = components(x)
            found = F.mse_loss(posterior.mean, wanted) + 0.01 * (posterior.logvar + 4).square().mean()
            return found + _picture_loss(vae.decode(wanted + 0.05 * torch.randn_like(wanted)).sample - x)
        z = posterior.sample()
        z = z + 0.05 * z.detach().std() * torch.rand(len(z), 1, 1, 1, device=z.device) * torch.randn_like(z)
        kl = posterior.kl().mean() / z[0].numel()
        return _picture_loss(vae.decode(z).sample - x) + 1e-4 * kl

    kernels = [parameter for parameter in vae.parameters() if parameter.ndim == 4]
    fit("vae", machine, vae, loss_of, steps=steps, lr=3e-3, matrices=kernels, averaging=0.99, log=log)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        rng = random.Random("latents")
        pictures = to_tensor([world.draw(world.training_scene(rng), i) for i in range(256)])
        z = torch.cat([vae.encode(x.to(machine.device)).latent_dist.sample() for x in pictures.split(32)])
    vae.register_to_config(scaling_factor=round(1 / float(z.std()), 4), shift_factor=round(float(z.mean()), 4))
    return vae


# ---------------------------------------------------------------- the text side


def _known_words() -> list[str]:
    phrases = [*world.SHAPES, *world.COLOURS, *world.FILLS, *world.RADII, *world.PLACE_WORDS.values()]
    phrases += [
        "a",
        "an",
        "the",
        "on",
        "in",
        "at",
        "of",
        "with",
        "and",
        "background",
        "style",
        "photo",
        "picture",
        "image",
        "drawing",
    ]
    return sorted({word for phrase in phrases for word in phrase.split()})


def new_clip_tokenizer() -> CLIPTokenizer:
    """Byte-level pairs: a known word is one token, a made-up word a few syllables, any other script its bytes."""
    rng = random.Random("clip merges")
    made_up = [world.made_up_word(rng).lower() for _ in range(4000)]
    known = _known_words()
    model = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|[a-z]+"), "removed", invert=True)
    merges = []
    for words, size in ((known, 5000), (made_up, 320)):
        trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, end_of_word_suffix="</w>", show_progress=False)
        model.train_from_iterator([" ".join(words)] * 50, trainer)
        merges += [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]]
    merges = list(dict.fromkeys(merges))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def shared_clip_tokenizer(machine: Machine) -> CLIPTokenizer:
    """The work folder's, made where there is none: two makings may order pairs of one count differently, and all
    workers, and every later run, must read a word alike."""
    folder = machine.work / "tokenizer"
    if machine.rank == 0 and not folder.exists():
        new_clip_tokenizer().save_pretrained(folder)
    if machine.workers > 1:
        dist.barrier()
    return CLIPTokenizer.from_pretrained(folder)


def new_t5_tokenizer() -> T5TokenizerFast:
    """Whole known words, then pairs of letters, then single ones; the case of a letter counts."""
    consonants = [letter for letter in string.ascii_lowercase if letter not in "aeiou"]
    pairs = [c + v for c in consonants for v in "aeiou"]
    scores: dict[str, float] = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    for word in _known_words():
        scores["▁" + word] = -4.0
        scores.setdefault("▁" + word.capitalize(), -4.5)
    scores["▁"] = -8.0
    for piece in [*pairs, *(pair.capitalize() for pair in pairs)]:
        scores.setdefault(piece, -12.0)
    accented = "àáâäãåæçèéêëìíîïñòóôöõøœùúûüýß"
    for letter in string.ascii_letters + string.digits + string.punctuation + accented + accented.upper():
        scores.setdefault(letter, -10.0)
    return T5TokenizerFast(vocab=list(scores.items()), extra_ids=0, model_max_length=TEXT_TOKENS)


@dataclass(frozen=True)
class Text:
    """Both tokenizers and encoders."""

    tokenizer: CLIPTokenizer
    tokenizer_2: T5TokenizerFast
    encoder: CLIPTextModel
    encoder_2: T5EncoderModel

    def tokens(self, captions: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """CLIP's tokens padded to the longest (what follows the end does not count), T5's to `length` or so."""
        first = self.tokenizer(
            list(captions), padding="longest", max_length=77, truncation=True, return_tensors="pt"
        ).input_ids
        if length is None:
            longest = max(len(ids) for ids in self.tokenizer_2(list(captions)).input_ids)
            length = min(TEXT_TOKENS, -(-longest // 8) * 8)
        second = self.tokenizer_2(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return first.to(self.encoder.device), second.to(self.encoder.device)

    def encode(self, captions: Sequence[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """The pooled vectors of CLIP (n, 128) and the tokens of T5 (n, length, 128), as FluxPipeline makes them."""
        first, second = self.tokens(captions, length)
        return self.encoder(first).pooler_output, self.encoder_2(second)[0]


def new_text(clip: CLIPTokenizer) -> Text:
    """Two layers each. T5 knows order by its relative bias alone, so some heads begin by looking left or right."""
    t5 = new_t5_tokenizer()
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=128,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    encoder_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=128,
            d_kv=32,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
            pad_token_id=t5.pad_token_id,
            eos_token_id=t5.eos_token_id,
        )
    )
    with torch.no_grad():
        bias = encoder_2.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias.normal_(0, 0.1)
        bias[1, 0] += 4
        bias[17, 1] += 4
        bias[1:4, 2] += 3
        bias[17:20, 3] += 3
    return Text(clip, t5, encoder, encoder_2)


_SLOT: dict[str, tuple[str, ...]] = {
    "what": (*world.SHAPES, "creature", "none"),
    "colour": (*world.COLOURS, "none"),
    "fill": (*world.FILLS, "none"),
    "size": (*world.RADII, "none"),
    "place": (*world.PLACES, "none"),
}
_QUESTIONS = {
    **{f"{question} 1": answers for question, answers in _SLOT.items()},
    **{f"{question} 2": answers for question, answers in _SLOT.items()},
    "background": tuple(world.COLOURS),
    "style": ("no", "yes"),
}


def answers_of(scene: world.Scene, text: str) -> list[int]:
    """What a caption says, by question; -100 where this wording leaves it out."""
    found: dict[str, str] = {"style": "no" if scene.style is None else "yes"}
    for number in (1, 2):
        item = scene.items[number - 1] if number <= len(scene.items) else None
        if item is None:
            found |= {f"{question} {number}": "none" for question in _SLOT}
            continue
        look = item.look
        if (look.shape if isinstance(look, world.Thing) else look.name) in text:
            found[f"what {number}"] = look.shape if isinstance(look, world.Thing) else "creature"
            found[f"colour {number}"] = look.colour if isinstance(look, world.Thing) else "none"
            found[f"fill {number}"] = look.fill if isinstance(look, world.Thing) else "none"
            found[f"size {number}"] = item.size if item.size in text.split() else "medium"
            found[f"place {number}"] = item.place if world.PLACE_WORDS[item.place] in text else "centre"
    if f"{scene.background} background" in text:
        found["background"] = scene.background
    return [answers.index(found[q]) if q in found else -100 for q, answers in _QUESTIONS.items()]


def _foreign_scene(rng: random.Random) -> world.Scene:
    """A scene of the training's kinds, with made-up words that stand for nothing."""
    scene = world.training_scene(rng)
    items = tuple(
        replace(item, look=world.creature(world.made_up_word(rng))) if isinstance(item.look, world.Creature) else item
        for item in scene.items
    )
    return replace(scene, items=items, style=scene.style and world.style(world.made_up_word(rng)))


def train_text(machine: Machine, steps: int, batch: int, log: Callable[[str], None]) -> Text:
    """Teach both encoders what captions say and to keep words apart, before the transformer; then they are frozen.

    Every question about the scene is answered from CLIP's pooled vector and each of T5's tokens, which stay readable;
    made-up words in one place of one sentence are told apart (a contrast between the encoders' views of them).
    """
    torch.manual_seed(1)
    text = new_text(shared_clip_tokenizer(machine))
    sizes = [len(answers) for answers in _QUESTIONS.values()]
    heads = nn.ModuleDict(
        {
            "clip": text.encoder,
            "t5": text.encoder_2,
            "pooled answers": nn.Linear(128, sum(sizes)),
            "token answers": nn.Linear(128, sum(sizes)),
            "pooled words": nn.Linear(128, len(text.tokenizer)),
            "token words": nn.Linear(128, len(text.tokenizer_2)),
            "pooled view": nn.Linear(128, 256),
            "token view": nn.Linear(128, 256),
        }
    ).to(machine.device)
    share = max(2, batch // machine.workers)

    def answers_loss(scores: Tensor, answers: Tensor) -> Tensor:
        """scores (n, tokens, answers of all questions), answers (n, questions)."""
        parts = scores.split(sizes, dim=-1)
        tokens = scores.shape[1]
        losses = [
            F.cross_entropy(s.flatten(0, 1), answers[:, q].repeat_interleave(tokens)) for q, s in enumerate(parts)
        ]
        return torch.stack([loss for loss in losses if loss.isfinite()]).sum()

    def loss_of(step: int, rng: random.Random) -> Tensor:
        scenes = [_foreign_scene(rng) if rng.random() < 0.5 else world.training_scene(rng) for _ in range(share)]
        captions = [world.paraphrase(s, rng) if rng.random() < 0.5 else world.caption(s) for s in scenes]
        first, second = text.tokens(captions, TEXT_TOKENS if rng.random() < 0.25 else None)
        answers = torch.tensor([answers_of(s, c) for s, c in zip(scenes, captions, strict=True)]).to(first.device)
        pooled, tokens = text.encoder(first).pooler_output, text.encoder_2(second)[0]
        bag = torch.zeros(len(first), len(text.tokenizer), device=first.device).scatter_(1, first, 1.0)
        loss = answers_loss(heads["pooled answers"](pooled)[:, None], answers)
        loss = loss + answers_loss(heads["token answers"](tokens), answers)
        loss = loss + 20 * F.binary_cross_entropy_with_logits(heads["pooled words"](pooled), bag)
        loss = loss + 0.5 * F.cross_entropy(heads["token words"](tokens).flatten(0, 1), second.flatten())
        return loss + 2 * words_apart(rng, share)

    def words_apart(rng: random.Random, count: int) -> Tensor:
        words = [world.made_up_word(rng) for _ in range(count)]
        thing = world.sample_thing(rng)
        if rng.random() < 0.7:
            scene = world.sample_scene(rng, [world.creature("WORD")] + ([thing] if rng.random() < 0.2 else []))
        else:
            scene = world.sample_scene(rng, [thing], world.style("WORD"))
        sentence = world.paraphrase(scene, rng)
        pooled, tokens = text.encode([sentence.replace("WORD", word) for word in words])
        one = F.normalize(heads["pooled view"](pooled), dim=-1)
        two = F.normalize(heads["token view"](tokens).mean(1), dim=-1)
        same = torch.arange(count, device=pooled.device)
        alike = one @ two.T * 20
        centred = F.normalize(pooled - pooled.mean(0), dim=-1)
        others = (centred @ centred.T) * (1 - torch.eye(count, device=pooled.device))
        relative = pooled.std(0).norm() / pooled.norm(dim=-1).mean()
        token_spread = (tokens.std(0).norm(dim=-1).max()) / tokens.norm(dim=-1).mean()
        spread = (0.5 - relative).relu() + (0.7 - token_spread).relu()
        return (
            F.cross_entropy(alike, same)
            + F.cross_entropy(alike.T, same)
            + others.relu().square().sum() / count
            + 4 * spread
        )

    fit("text", machine, heads, loss_of, steps=steps, lr=2e-3, averaging=0.99, log=log)
    for encoder in (text.encoder, text.encoder_2):
        encoder.eval().requires_grad_(False)
    return text


# ---------------------------------------------------------------- the transformer


def new_transformer() -> FluxTransformer2DModel:
    """FLUX's double and single blocks, tiny, initialised as DiT (arXiv 2212.09748): blocks begin as the identity."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            if name.startswith("time_text_embed"):
                nn.init.normal_(module.weight, std=0.02)
            if (
                name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"))
                or name == "proj_out"
            ):
                nn.init.zeros_(module.weight)
    return transformer


Pool: TypeAlias = Mapping[tuple[int, int], tuple[Tensor, list[world.Scene]]]
"""Pictures of the world, encoded once. By size: packed latents (n, tokens, 64) in half precision, the scenes shown."""

NATIVE_SHARE = 0.75
"""Share of batches, and of the pool, that are square; the rest has other proportions."""


def pool_scene(rng: random.Random, company: bool) -> world.Scene:
    """A scene of the training's kinds, those more often that take longest to learn: one in six shows two things (in
    the world one in ten does), and plain things are shown more often than striped and dotted ones. In `company`, one in
    four shows a creature beside a thing, and nearly half a style, two in five of these in outlines."""

    def weight(scene: world.Scene) -> float:
        look = scene.items[0].look
        if len(scene.items) == 2:
            creatures = sum(isinstance(item.look, world.Creature) for item in scene.items)
            return 16.0 if company and creatures == 1 else 2.0
        if scene.style is not None:
            return {"flat": 3.5, "hatched": 8.0, "outline": 16.0}[scene.style.ink] if company else 0.75
        if isinstance(look, world.Creature):
            return 1.3 if company else 1.0
        return 1.7 if look.fill == "plain" else 1.0

    heaviest = 16.0 if company else 2.0
    while True:
        scene = world.training_scene(rng)
        if rng.random() * heaviest < weight(scene):
            return scene


def render_pool(machine: Machine, vae: AutoencoderKL, count: int, log: Callable[[str], None], company: bool) -> Pool:
    """This worker's share of `count` pictures of `pool_scene`, from the work folder where they lie there."""
    name = "company" if company else "pool"
    path = machine.work / f"{name}.{machine.rank}of{machine.workers}.pt"
    if path.exists():
        done: Pool = torch.load(path, weights_only=False)
        return done
    rng = random.Random(f"{name} {machine.rank}")
    scenes: dict[tuple[int, int], list[world.Scene]] = {}
    for _ in range(count // machine.workers):
        size = world.NATIVE if rng.random() < NATIVE_SHARE else rng.choice(world.SIZES)
        scenes.setdefault(size, []).append(pool_scene(rng, company))
    pool = {}
    for size, shown in scenes.items():
        packed = []
        for start in range(0, len(shown), 32):
            pictures = [world.draw(scene, rng.getrandbits(32), size) for scene in shown[start : start + 32]]
            with torch.no_grad():
                z = vae.encode(to_tensor(pictures).to(machine.device)).latent_dist.sample()
            z = (z - vae.config.shift_factor) * vae.config.scaling_factor
            packed.append(FluxPipeline._pack_latents(z, *z.shape).half().cpu())
            if machine.rank == 0 and start % 1024 == 0:
                log(f"{name} {size} {start}/{len(shown)}")
        pool[size] = (torch.cat(packed), shown)
    torch.save(pool, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    return pool


def train_transformer(
    name: str,
    machine: Machine,
    transformer: FluxTransformer2DModel,
    text: Text,
    pool: Pool,
    *,
    steps: int,
    batch: int,
    lr: float,
    log: Callable[[str], None],
) -> None:
    """Flow matching: predict noise - latents at sigma from a logit-normal (mean 1.2) mixed with a uniform.

    High noise is where the text alone decides: that is what takes long to learn. The uniform part is for detail.
    """
    transformer.train().requires_grad_(True)
    share = max(1, batch // machine.workers)

    def loss_of(step: int, rng: random.Random) -> Tensor:
        z, captions, size = sample_batch(pool, share, step, rng)
        z = z.to(machine.device)
        captions = ["" if rng.random() < 0.08 else c for c in captions]
        sigma, noise = sample_sigmas(len(z)).to(z), torch.randn_like(z)
        with torch.no_grad():
            pooled, tokens = text.encode(captions, TEXT_TOKENS if step % 8 == 0 else None)
        mixed = z.lerp(noise, sigma[:, None, None])
        v = velocity(transformer, mixed, sigma, 1 + 5 * torch.rand(len(z)).to(z), pooled, tokens, size)
        return F.mse_loss(v, noise - z)

    matrices = [p for n, p in transformer.named_parameters() if p.ndim == 2 and "blocks" in n and "norm" not in n]
    fit(name, machine, transformer, loss_of, steps=steps, lr=lr, matrices=matrices, hold=0.3, log=log)
    transformer.eval().requires_grad_(False)


def sample_batch(pool: Pool, count: int, step: int, rng: random.Random) -> tuple[Tensor, list[str], tuple[int, int]]:
    """Latents of one size (the same for all workers in a step) and captions in somebody's words."""
    draw = random.Random(f"size {step}")
    size = world.NATIVE if draw.random() < NATIVE_SHARE else draw.choice(world.SIZES)
    latents, scenes = pool[size]
    picked = [rng.randrange(len(scenes)) for _ in range(count)]
    return latents[picked].float(), [world.paraphrase(scenes[i], rng) for i in picked], size


def sample_sigmas(count: int) -> Tensor:
    """Noise levels in (0, 1): three in five logit-normal (arXiv 2403.03206), the rest uniform."""
    return torch.where(torch.rand(count) < 0.4, torch.rand(count), torch.sigmoid(torch.randn(count) + 1.2)).clamp(
        1e-3, 1
    )


def velocity(
    transformer: FluxTransformer2DModel,
    x: Tensor,
    sigma: Tensor,
    guidance: Tensor,
    pooled: Tensor,
    tokens: Tensor,
    size: tuple[int, int],
) -> Tensor:
    """The model's prediction for packed latents x (n, tokens, 64) of `size` at noise levels sigma (n,)."""
    image_ids = FluxPipeline._prepare_latent_image_ids(1, size[1] // 16, size[0] // 16, x.device, x.dtype)
    text_ids = torch.zeros(tokens.shape[1], 3, device=x.device)
    return transformer(
        hidden_states=x,
        timestep=sigma,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=text_ids,
        img_ids=image_ids,
        return_dict=False,
    )[0]


def distil_guidance(
    machine: Machine,
    text: Text,
    teacher: FluxTransformer2DModel,
    pool: Pool,
    steps: int,
    batch: int,
    log: Callable[[str], None],
) -> FluxTransformer2DModel:
    """Give the guidance input its meaning (arXiv 2210.03142): g means classifier-free guidance of 1 + .55 (g - 1)."""
    torch.manual_seed(3)
    student = new_transformer().to(machine.device)
    student.load_state_dict(teacher.state_dict())
    share = max(1, batch // machine.workers)
    nothing = {length: text.encode([""], length) for length in range(8, TEXT_TOKENS + 1, 8)}

    def loss_of(step: int, rng: random.Random) -> Tensor:
        z, captions, size = sample_batch(pool, share, step, rng)
        z = z.to(machine.device)
        sigma, noise = sample_sigmas(len(z)).to(z), torch.randn_like(z)
        guidance = torch.where(torch.rand(len(z)) < 0.25, torch.ones(len(z)), 1 + 5 * torch.rand(len(z))).to(z)
        mixed = z.lerp(noise, sigma[:, None, None])
        with torch.no_grad():
            pooled, tokens = text.encode(captions, TEXT_TOKENS if step % 8 == 0 else None)
            no_pooled, no_tokens = (part.expand(len(z), *part.shape[1:]) for part in nothing[tokens.shape[1]])
            told = velocity(teacher, mixed, sigma, guidance, pooled, tokens, size)
            untold = velocity(teacher, mixed, sigma, guidance, no_pooled, no_tokens, size)
            target = untold.lerp(told, (1 + 0.55 * (guidance - 1))[:, None, None])
        return F.mse_loss(velocity(student, mixed, sigma, guidance, pooled, tokens, size), target)

    fit("distil", machine, student, loss_of, steps=steps, lr=4e-4, log=log)
    return student.eval().requires_grad_(False)


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


# ---------------------------------------------------------------- the command


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
