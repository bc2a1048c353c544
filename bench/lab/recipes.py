"""The recipes that the lab compares: the defaults, two other trainers' settings, and changes of one setting each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings, run by the project's own code."""

    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Inputs of `train` other than its defaults. A learning rate is for FLUX.1-dev's width, as its source gives it."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `lora.training.fit.Settings` other than those decided from the inputs."""
    rate: float = 1.0
    """Times the learning rate that suits the type, where the inputs name none."""
    gaussian_start: bool = False
    """A LoRA whose A is normal with a standard deviation of 1 / rank, peft's `init_lora_weights="gaussian"`."""
    short_captions: bool = False
    """The trigger word and nothing else of what a picture shows."""


ATTENTION_AND_DOUBLE_FF = r"\.attn\.(to|add)_|\.ff(_context)?\.net"
TIMES = (0.3, 3.0)
RECIPES = {
    "defaults": Recipe(),
    "without preservation": Recipe(inputs={"preservation": "off"}),
    # ostris/flux-dev-lora-trainer on Replicate: the configuration in `train.py` of replicate/flux-fine-tuner, and of
    # ostris/ai-toolkit what that leaves to its defaults. Not so here: its adapters on the modulation, its three sizes
    # of each picture (the toy base has one), Adam's moments in eight bits.
    "ostris": Recipe(
        inputs={"learning_rate": 4e-4, "lora_rank": 16, "caption_dropout_rate": 0.05, "preservation": "off"},
        settings={
            "held": 1.0,
            "ema_decay": 0.99,
            "weight_decay": 1e-2,
            "adam_epsilon": 1e-6,
            "timestep_mean": 0.0,
            "uniform_share": 0.0,
        },
    ),
    # The defaults of diffusers' examples/dreambooth/train_dreambooth_lora_flux.py, with a caption for each picture. One
    # step sees four pictures.
    "diffusers": Recipe(
        inputs={
            "learning_rate": 1e-4,
            "lora_rank": 4,
            "batch_size": 4,
            "caption_dropout_rate": 0.0,
            "preservation": "off",
            "layers_to_optimize_regex": ATTENTION_AND_DOUBLE_FF,
        },
        settings={"held": 1.0, "uniform_share": 1.0, "guidance": 3.5},
        gaussian_start=True,
    ),
    **{f"preservation of {ratio:g}": Recipe(settings={"prior_ratio": ratio}) for ratio in (0.25, 0.5, 1.0, 1.5, 3.0)},
    "preservation every step": Recipe(settings={"prior_every": 1}),
    "preservation every third step": Recipe(settings={"prior_every": 3}),
    "32 drawings": Recipe(settings={"prior_prompts": 32}),
    "held to all kinds": Recipe(settings={"prior_kinds": ("things", "made-up words", "captions")}),
    "held to captions": Recipe(settings={"prior_kinds": ("captions",)}),
    "no near words": Recipe(settings={"prior_kinds": ("captions", "captions", "things")}),
    # No other made-up words: ordinary things alone, and as prior preservation with a class noun has it.
    "preserving things": Recipe(settings={"prior_kinds": ("things",)}),
    "preserving the class noun": Recipe(settings={"prior_kinds": ("things", "noun")}),
    "guidance 3.5": Recipe(settings={"guidance": 3.5}),
    "timesteps around -0.7": Recipe(settings={"timestep_mean": -0.7}),
    "timesteps around 0": Recipe(settings={"timestep_mean": 0.0}),
    "timesteps around 1.2": Recipe(settings={"timestep_mean": 1.2}),
    "timesteps around 2.5": Recipe(settings={"timestep_mean": 2.5}),
    "uniform timesteps": Recipe(settings={"uniform_share": 1.0}),
    "half uniform timesteps": Recipe(settings={"uniform_share": 0.5}),
    "no uniform timesteps": Recipe(settings={"uniform_share": 0.0}),
    "no dropout": Recipe(inputs={"caption_dropout_rate": 0.0}),
    "dropout 0.1": Recipe(inputs={"caption_dropout_rate": 0.1}),
    "running mean": Recipe(settings={"ema_decay": 0.99}),
    "constant rate": Recipe(settings={"held": 1.0}),
    "rate held for no time": Recipe(settings={"held": 0.0}),
    "rate held for half": Recipe(settings={"held": 0.5}),
    "half the rate": Recipe(rate=0.5),
    "twice the rate": Recipe(rate=2.0),
    "batch 4": Recipe(inputs={"batch_size": 4}),
    "rank 4": Recipe(inputs={"lora_rank": 4}),
    "rank 64": Recipe(inputs={"lora_rank": 64}),
    "rank 128": Recipe(inputs={"lora_rank": 128}),
    # The weights themselves, and a LoRA of rank 16 made of their change.
    "full": Recipe(inputs={"finetune_type": "full"}),
    **{f"full at {times:g} times the rate": Recipe(inputs={"finetune_type": "full"}, rate=times) for times in TIMES},
    "full at rank 64": Recipe(inputs={"finetune_type": "full", "lora_rank": 64}),
    "short captions": Recipe(short_captions=True),
    # A part of the layers: the words' own stream, as Custom Diffusion (arXiv:2212.04488) trains what reads the words;
    # either kind of block, as B-LoRA (arXiv:2403.14572) tells a style's from a subject's.
    "text stream": Recipe(inputs={"layers_to_optimize_regex": r"\.attn\.(add_|to_add_out)|\.ff_context"}),
    "double blocks": Recipe(inputs={"layers_to_optimize_regex": r"\.transformer_blocks"}),
    "single blocks": Recipe(inputs={"layers_to_optimize_regex": r"\.single_transformer_blocks"}),
}
