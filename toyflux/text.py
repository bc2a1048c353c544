"""The toy base's text side: both tokenizers, both encoders, and how they learn what captions say."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.multiprocessing
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

from toyflux import world
from toyflux.stage import Machine, fit

TEXT_TOKENS = 40
"""T5's length: enough for two items, a background and a style with made-up names."""


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
