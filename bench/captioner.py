"""How long captions take, and how much memory: the production code on a Qwen3-VL-8B with random weights.

`python -m bench.captioner`: on a GPU at the real size (17.5 GB are written and read), without one on a tiny model,
which shows that it runs and no more. Every answer runs to the full number of tokens; a caption of 50 words has some 70.
Goals on one Hopper GPU: 20 pictures in 6 s after loading, at most 30 GB.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from captioner import caption, questions, text
from captioner import model as captioner_model
from lora.pictures import buckets
from tests import tiny_qwen

# config.json of Qwen/Qwen3-VL-8B-Instruct
SIZE_8B: tiny_qwen.Size = {
    "text": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mrope_section": [24, 20, 20],
    },
    "vision": {
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": 4096,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": [8, 16, 24],
    },
}
BYTES_A_TOKEN = 4.5
"""Of English in the real vocabulary; the random model's has one token a byte, so its question is cut by as much."""
ALONE = 4
"""Pictures asked about one by one, for comparison."""

Result = TypeVar("Result")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=caption.BATCH_SIZE, help="pictures")
    parser.add_argument("--tokens", type=int, default=80, help="of an answer")
    parser.add_argument("--folder", type=Path, help="where to keep the random model, to use it again")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        figures = measure(args.folder or Path(scratch) / "model", Path(scratch), args.count, args.tokens)
    for name, figure in figures.items():
        print(f"{name:<40} {figure if isinstance(figure, str) else f'{figure:.2f}'}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def measure(model: Path, scratch: Path, count: int, tokens: int) -> dict[str, float | str]:
    """The figures by name, in seconds and GB (10⁹ bytes)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if not (model / "preprocessor_config.json").is_file():  # the file that is written last
        tiny_qwen.build(model, size=SIZE_8B if device == "cuda" else tiny_qwen.TINY, device=device, dtype=dtype)
    figures: dict[str, float | str] = {
        "machine": torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny model",
        "torch": str(torch.__version__),
        "pictures": float(count),
        "tokens of an answer": float(tokens),
    }
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    started = time.perf_counter()
    with captioner_model.load(str(model), device, dtype) as captioner:
        figures["load, s"] = time.perf_counter() - started
        figures["peak in loading, GB"] = _peak()
        captioner.model.generation_config.eos_token_id = None  # so that no answer ends early

        paths = _draw(scratch, count)
        rules = text.Rules(
            trigger_word="TOK", lora_type="subject", prefix="", suffix="", class_noun="dog",
            t5=text.Room(text.estimate_tokens, 512), clip=text.Room(text.estimate_tokens, 77),
        )  # fmt: skip
        question = questions.question(rules)
        question = question[: round(len(question) / BYTES_A_TOKEN)]

        def read() -> list[Image.Image]:
            with ThreadPoolExecutor() as pool:
                return list(
                    pool.map(
                        lambda path: captioner_model.fit_to_model(
                            buckets.read_picture(path, captioner_model.MAX_PIXELS)
                        ),
                        paths,
                    )
                )

        reading, pictures = _timed(read)
        first, _ = _timed(lambda: captioner.answer(pictures, question, tokens=tokens))
        figures["all pictures, from files, first call, s"] = reading + first
        preparing, _ = _timed(lambda: captioner.inputs(pictures, question))
        one, _ = _timed(lambda: captioner.answer(pictures, question, tokens=1))
        all_of_it, _ = _timed(lambda: captioner.answer(pictures, question, tokens=tokens))
        figures["peak in all, GB"] = _peak()
        figures["of this: reading and scaling, s"] = reading
        figures["preprocessing, s"] = preparing
        figures["prefill and the first token, s"] = one - preparing
        figures["decoding, s"] = all_of_it - one
        figures["pictures/s together"] = count / (reading + all_of_it)
        alone = pictures[:ALONE]
        seconds, _ = _timed(lambda: [captioner.answer([picture], question, tokens=tokens) for picture in alone])
        figures["pictures/s one by one"] = len(alone) / (reading * len(alone) / count + seconds)
    return figures


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    started = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _peak() -> float:
    """GB: of the GPU since the measuring began, without one of the process since its start."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _draw(folder: Path, count: int) -> list[Path]:
    """JPEGs of six megapixels, soft with some grain, upright and lying by turns."""
    paths = []
    for number in range(count):
        soft = Image.effect_noise((60, 40), 150).resize((3000, 2000), Image.Resampling.BICUBIC)
        picture = Image.blend(soft, Image.effect_noise((3000, 2000), 12), 0.3).convert("RGB")
        paths.append(folder / f"{number}.jpg")
        (picture.rotate(90, expand=True) if number % 2 else picture).save(paths[-1], quality=90)
    return paths


if __name__ == "__main__":
    main()
