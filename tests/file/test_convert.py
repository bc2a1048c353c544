"""script/convert on the files of every tool: what comes out is the same LoRA, whole, and diffusers reads it."""

from pathlib import Path

import pytest
import torch

from lora.file import judge, weights
from script import convert
from tests import lora_files
from tests.lora_files import LAYOUTS, Maker

NOT_JOINED = {
    "bias": "biases are written under diffusers' names alone",
    "bias changes": "biases are written under diffusers' names alone",
    "dora": "the magnitudes of a DoRA are written under diffusers' names alone",
    "dora in part": "the magnitudes of a DoRA are written under diffusers' names alone",
    "dora scales": "the magnitudes of a DoRA are written under diffusers' names alone",
    "mixed ranks": "they can only be joined at the same rank",
    "rank pattern": "they can only be joined at the same rank",
}


@pytest.fixture
def maker() -> Maker:
    return Maker(lora_files.SIZES, lora_files.TEXT_SIZES)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tools_file_becomes_one_that_diffusers_reads_whole(layout: str, maker: Maker, tmp_path: Path) -> None:
    file = lora_files.write(layout, maker, tmp_path / "lora.safetensors")
    assert convert.main([str(file), "--to", "diffusers", "-o", str(tmp_path / "out.safetensors")]) == 0
    before, after = weights.read(file), weights.read(tmp_path / "out.safetensors")
    assert after.naming == "diffusers"
    assert (after.biases.keys(), after.magnitudes.keys()) == (before.biases.keys(), before.magnitudes.keys())
    for own, wanted in ((after.pairs, maker.gains), (after.text, maker.text_gains)):
        assert own.keys() == wanted.keys()
        for layer, (a, b) in own.items():
            torch.testing.assert_close(b.float() @ a.float(), wanted[layer], rtol=0.01, atol=1e-3)
    if layout != "dora in part":  # which diffusers cannot draw with
        assert judge._diffusers(after, tmp_path / "out.safetensors") == "yes"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("naming", ["bfl", "kohya"])
def test_every_tools_file_becomes_one_of_the_joined_namings_or_it_is_told_why_not(
    layout: str, naming: str, maker: Maker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = lora_files.write(layout, maker, tmp_path / "lora.safetensors")
    ended = convert.main([str(file), "--to", naming, "-o", str(tmp_path / "out.safetensors")])
    told = capsys.readouterr()
    if layout in NOT_JOINED:
        assert ended == 1
        assert NOT_JOINED[layout] in told.err
        assert not (tmp_path / "out.safetensors").exists()
        return
    assert ended == 0
    after = weights.read(tmp_path / "out.safetensors")
    assert after.naming == naming
    wanted = {layer: gain for layer, gain in maker.gains.items() if gain.any() or layout == "zero b"}
    assert after.pairs.keys() == wanted.keys()
    for layer, (a, b) in after.pairs.items():
        torch.testing.assert_close(b.float() @ a.float(), wanted[layer], rtol=0.01, atol=1e-3)
    assert after.text.keys() == (maker.text_gains.keys() if naming == "kohya" else set())
    assert ("left out, 6 of the CLIP text encoder" in told.out) == (bool(maker.text_gains) and naming == "bfl")
