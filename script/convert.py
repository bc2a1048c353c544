"""Writes a LoRA under other names: the Python behind script/convert."""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from script import cli, files

NAMINGS = {
    "diffusers": "diffusers, ComfyUI, Replicate: what the trainer writes",
    "bfl": "Black Forest Labs' own code",
    "kohya": "sd-scripts, Forge, and web sites that share LoRAs",
}


def main(argv: Sequence[str]) -> int:
    """Writes a file beside the given one; returns 0, or 1 after an error whose text is printed."""
    parser = argparse.ArgumentParser(
        prog="script/convert",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Writes a LoRA under other names. The way there and back is exact.",
        epilog="names:\n" + "\n".join(f"  {naming:<10} {users}" for naming, users in NAMINGS.items()),
    )
    parser.add_argument("file", type=Path, help="a safetensors of any of these, or a tar with one in it")
    parser.add_argument("--to", choices=NAMINGS, required=True)
    parser.add_argument("-o", "--output", type=Path, help="where to write; FILE with the names in it, where left out")
    arguments = parser.parse_args(argv)
    path: Path = arguments.file
    output: Path = arguments.output or path.with_name(f"{path.stem}-{arguments.to}.safetensors")
    cli.hush()
    from lora.file import weights  # only now: it loads torch
    from lora.file.names import some

    try:
        if output.suffix != ".safetensors":
            raise ValueError(
                f"-o: {output.name} must end in .safetensors; a trainer's tar holds diffusers' names alone"
            )
        with tempfile.TemporaryDirectory() as folder:
            lora = weights.read(weights.take_out(files.local(str(path)), Path(folder)))
            left_out = dict(lora.left_out)
            if arguments.to == "bfl" and lora.text:
                left_out["the CLIP text encoder, which has no place under these names"] = list(lora.text)
                lora = dataclasses.replace(lora, text={})
            weights.write_whole(Path(folder) / "converted", lora, arguments.to)
            cli.move_into_place({output: Path(folder) / "converted"})
    except (ValueError, OSError) as error:
        print(f"script/convert: {error}", file=sys.stderr)
        return 1
    print(f"{output} ({lora.naming} -> {arguments.to}, {len(lora.pairs)} layers)")
    for part, left in left_out.items():
        print(f"left out, {len(left)} of {part}: {some(left)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
