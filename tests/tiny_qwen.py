"""A Qwen3-VL with random weights, in the files and settings of the real one on the Hub; tiny unless asked otherwise.

Same classes, same control tokens, same way of asking; one token a byte. What it says is garbage, always.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.convert_slow_tokenizer import bytes_to_unicode

CONTROL_TOKENS = [
    f"<|{name}|>"
    for name in ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
]
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif 'text' in part -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

Size = Mapping[str, Mapping[str, Any]]
TINY: Size = {
    "text": {
        "vocab_size": 256 + len(CONTROL_TOKENS),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "mrope_section": [4, 2, 2],
    },
    "vision": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}


def build(
    folder: Path,
    *,
    size: Size = TINY,
    tied: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write the model into `folder` and return it; `tied` as the smaller ones are, whose head is the embeddings."""
    vocabulary = {sign: number for number, sign in enumerate(bytes_to_unicode().values())}
    ids = {token: len(vocabulary) + number for number, token in enumerate(CONTROL_TOKENS)}
    text = dict(size["text"])
    rope = {"rope_type": "default", "rope_theta": 5_000_000, "mrope_interleaved": True}
    rope["mrope_section"] = text.pop("mrope_section")
    config = Qwen3VLConfig(
        text_config=text | {"max_position_embeddings": 4096, "rope_parameters": rope},
        vision_config=dict(size["vision"]),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(), torch.device(device), torch.no_grad():
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration._from_config(config, dtype=dtype)
        for parameter in model.parameters():  # of a size that makes the next token depend on the picture
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.save_pretrained(folder)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary | ids, merges=[], eos_token="<|im_end|>", extra_special_tokens=CONTROL_TOKENS[1:]
    )
    assert tokenizer.convert_tokens_to_ids(CONTROL_TOKENS) == list(ids.values())
    tokenizer.save_pretrained(folder)
    for name, content in {
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
        "generation_config.json": {
            "bos_token_id": ids["<|endoftext|>"],
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "do_sample": True,
            "top_k": 20,
            "top_p": 0.8,
            "temperature": 0.7,
            "repetition_penalty": 1.05,
        },
        "preprocessor_config.json": {
            "size": {"longest_edge": 16777216, "shortest_edge": 65536},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "processor_class": "Qwen3VLProcessor",
            "image_processor_type": "Qwen2VLImageProcessorFast",
        },
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder
