"""The LoRA's file in the oldest diffusers that the README promises, and in the first that reads its header."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import FluxTransformer2DModel

from lora.file import weights
from lora.flux import adapter
from tests import load_lora

VERSIONS = {
    "0.30.3": ["transformers==4.44.2", "peft==0.12.0", "huggingface_hub==0.24.7", "tokenizers==0.19.1"],
    "0.34.0": ["transformers==4.51.3", "peft==0.15.2", "huggingface_hub==0.30.2", "tokenizers==0.21.1"],
}
"""Each with what was current when it came out; torch and the rest are this environment's."""
ACCELERATE = {"0.30.3": "accelerate==0.34.2", "0.34.0": "accelerate==1.6.0"}


def _python(version: str, folder: Path) -> Path:
    """The Python of an environment with that diffusers; skips where its packages cannot be had."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    wanted = [f"diffusers=={version}", *VERSIONS[version], ACCELERATE[version]]
    done = subprocess.run([str(python), "-m", "pip", "install", "--no-deps", *wanted], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"diffusers {version} cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    where = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    (Path(where.stdout.strip()) / "zz_this_environment.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_an_older_diffusers_predicts_with_the_file_what_ours_does(
    version: str, tiny_flux: FluxTransformer2DModel, tmp_path: Path
) -> None:
    tiny_flux.save_pretrained(tmp_path / "transformer")
    generator = torch.Generator().manual_seed(4)
    for parameter in adapter.attach(tiny_flux, 4, seed=3):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    lora, ours, theirs = (str(tmp_path / name) for name in ("lora.safetensors", "ours.pt", "theirs.pt"))
    weights.write(Path(lora), adapter.trained(tiny_flux), {"modelspec.title": "TOK"})
    load_lora.main(str(tmp_path / "transformer"), lora, ours)
    python = _python(version, tmp_path / "environment")
    subprocess.run([str(python), load_lora.__file__, str(tmp_path / "transformer"), lora, theirs], check=True)

    here, there = torch.load(ours), torch.load(theirs)
    assert (here["version"], there["version"]) == (diffusers.__version__, version)
    torch.testing.assert_close(there["without"], here["without"])
    torch.testing.assert_close(there["with"], here["with"])
    assert (here["with"] - here["without"]).abs().max() > 0.1
