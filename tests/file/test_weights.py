"""LoRA files: what is read, what is written, and what is said of them."""

import dataclasses
import io
import json
import random
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora.file import names, weights
from lora.file.names import Pair
from lora.pictures import limits
from lora.result import tarball
from script import convert, inspect
from tests.file.test_names import a_lora

HEADER = {"modelspec.architecture": "flux-1-dev/lora", "modelspec.trigger_phrase": "TOK", "ss_seed": "7"}


def _file(path: Path, pairs: Mapping[str, Pair], naming: str = "diffusers") -> Path:
    weights.write(path, pairs, HEADER, naming)
    return path


def _tar(path: Path, files: Mapping[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as out:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def _changed(pairs: dict[str, Pair], layer: str, factor: float) -> dict[str, Pair]:
    return {**pairs, layer: (pairs[layer][0], pairs[layer][1] * factor)}


def test_a_file_is_read_as_it_was_written_and_written_again_to_the_same_bytes(tmp_path: Path) -> None:
    pairs = a_lora(4, width=48)
    path = _file(tmp_path / "a.safetensors", pairs)
    read = weights.read(path)
    assert read.naming == "diffusers"
    assert read.pairs.keys() == pairs.keys()
    assert all(torch.equal(read.pairs[layer][i], pairs[layer][i]) for layer in pairs for i in (0, 1))
    assert read.metadata.items() >= HEADER.items()
    weights.write(tmp_path / "b.safetensors", read.pairs, read.metadata)
    assert (tmp_path / "b.safetensors").read_bytes() == path.read_bytes()


def test_the_header_tells_peft_the_rank_the_alpha_and_every_layer(tmp_path: Path) -> None:
    pairs = a_lora(4, width=48)
    config = json.loads(weights.read(_file(tmp_path / "a.safetensors", pairs)).metadata["lora_adapter_metadata"])
    assert config == {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.target_modules": sorted(pairs),
        "transformer.rank_pattern": {},
        "transformer.alpha_pattern": {},
    }


@pytest.mark.parametrize("naming", ["bfl", "kohya"])
def test_converting_there_and_back_gives_the_same_bytes(
    naming: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _file(tmp_path / "lora.safetensors", a_lora(4, width=48))
    assert convert.main([str(path), "--to", naming]) == 0
    there = tmp_path / f"lora-{naming}.safetensors"
    assert str(there) in capsys.readouterr().out
    assert "lora_adapter_metadata" not in weights.read(there).metadata
    assert convert.main([str(there), "--to", "diffusers", "-o", str(tmp_path / "back.safetensors")]) == 0
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()


def test_a_converted_file_is_never_written_as_a_tar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path / "lora.safetensors", a_lora(4, width=48))
    assert convert.main([str(path), "--to", "kohya", "-o", str(tmp_path / "x.tar")]) == 1
    assert "must end in .safetensors" in capsys.readouterr().err
    assert not (tmp_path / "x.tar").exists()


def test_a_trainers_tar_is_inspected_and_found_sound(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _file(tmp_path / "lora.safetensors", a_lora(2))
    tarball.pack({"output/flux_train_replicate/lora.safetensors": path}, tmp_path / "trained_model.tar")
    assert inspect.main([str(tmp_path / "trained_model.tar")]) == 0
    page = capsys.readouterr().out
    for part in (
        "rank:      2",
        "trigger:   TOK",
        "seed:      7",
        "no fault found",
        "cog-flux in fp8: yes",
        "bfloat16",
    ):
        assert part in page, page
    assert f"{2 * sum(a.shape[1] + len(b) for a, b in a_lora(1).values()):,} in 17 layers" in page


def test_a_rank_stabilised_lora_of_peft_is_as_strong_as_peft_makes_it(tmp_path: Path) -> None:
    """alpha / sqrt(rank) instead of alpha / rank (arXiv:2312.03732)."""
    pairs = a_lora(4, width=48)
    said = json.dumps({"transformer.lora_alpha": 4, "transformer.use_rslora": True})
    save_file(names.to_naming("diffusers", pairs), tmp_path / "a.safetensors", {"lora_adapter_metadata": said})
    read = weights.read(tmp_path / "a.safetensors").pairs
    for layer, (_, b) in pairs.items():
        torch.testing.assert_close(read[layer][1].float(), 2 * b.float())


def test_inspecting_what_is_no_lora_says_so_and_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cut.safetensors").write_bytes(_file(tmp_path / "a.safetensors", a_lora(2, width=48)).read_bytes()[:-9])
    save_file({"model.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("no")
    for name in ("cut", "text"):
        assert inspect.main([str(tmp_path / f"{name}.safetensors")]) == 1
        assert f"{name}.safetensors is not a whole safetensors file" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "model.safetensors")]) == 1
    assert (
        "model.safetensors is not a LoRA for FLUX: none of its 1 keys is of a FLUX LoRA: model.weight"
        in capsys.readouterr().err
    )
    torch.save({"a": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    assert inspect.main([str(tmp_path / "pickle.safetensors")]) == 1
    assert "pickle.safetensors is a zip, or a checkpoint of torch's own kind" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "gone.safetensors")]) == 1
    assert "script/inspect: no file /" in capsys.readouterr().err
    assert convert.main([str(tmp_path), "--to", "bfl"]) == 1
    assert "is a folder, and a file is wanted" in capsys.readouterr().err


def test_a_tar_must_hold_one_lora(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.safetensors", a_lora(2, width=48))
    tarball.pack({"a.safetensors": path, "b.safetensors": path}, tmp_path / "two.tar")
    with pytest.raises(ValueError, match=r"holds 2: a\.safetensors, b\.safetensors"):
        weights.take_out(tmp_path / "two.tar", tmp_path)
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    with pytest.raises(ValueError, match="holds 0: none"):
        weights.take_out(tmp_path / "none.tar", tmp_path)


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_is_packed_or_not_and_what_else_is_in_it_is_passed_over(mode: str, tmp_path: Path) -> None:
    path = _file(tmp_path / "a.safetensors", a_lora(2, width=48))
    tar = _tar(tmp_path / "x", {"../a.txt": b"no", "in/a.safetensors": path.read_bytes(), "z": bytes(9**6)}, mode)
    taken = weights.take_out(tar, tmp_path)
    assert taken.read_bytes() == path.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.safetensors", "lora.safetensors", "x"]
    assert weights.take_out(path, tmp_path) == path
    tar.write_bytes(tar.read_bytes()[:-9] if mode == "w:gz" else tar.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"x cannot be unpacked: the tar(\.gz)? is cut short or damaged"):
        weights.take_out(tar, tmp_path)


def test_a_tar_that_unpacks_to_too_much_is_refused_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bombs, small ones: in the file that is looked for, in one that is skipped, as a claim, and by their number."""
    bomb = bytes(12 * 2**20)
    with pytest.raises(ValueError, match=r"x\.tar cannot be unpacked: 'a\.safetensors' unpacks to more than 100 times"):
        weights.take_out(_tar(tmp_path / "x.tar", {"a.safetensors": bomb}, "w:gz"), tmp_path)
    assert (tmp_path / "lora.safetensors").stat().st_size < len(bomb)

    monkeypatch.setattr(limits, "MAX_ENTRIES", 100)
    monkeypatch.setattr(limits, "MAX_BYTES", 2**20)
    with pytest.raises(ValueError, match=r"GiB unpacked, at 'a\.safetensors'"):
        weights.take_out(_tar(tmp_path / "x.tar", {"a.safetensors": random.randbytes(2**20 + 1)}), tmp_path)
    assert (tmp_path / "lora.safetensors").stat().st_size <= 2**20
    with pytest.raises(ValueError, match="GiB unpacked"):
        weights.take_out(_tar(tmp_path / "x.tar", {"skipped": bomb}, "w:gz"), tmp_path)
    with pytest.raises(ValueError, match="more than 100 entries"):
        weights.take_out(_tar(tmp_path / "x.tar", {f"{n}.safetensors": b"" for n in range(101)}), tmp_path)
    long = tarfile.TarInfo("long")
    long.type, long.size = tarfile.GNUTYPE_LONGNAME, 2**40
    (tmp_path / "x.tar").write_bytes(long.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match="a header claims 1,099,511,627,776 bytes"):
        weights.take_out(tmp_path / "x.tar", tmp_path)


@pytest.mark.parametrize("said", ["{", "[1]", '{"transformer.lora_alpha": "much"}', "[" * 100_000])
def test_a_header_that_makes_no_sense_is_a_fault_of_that_file(said: str, tmp_path: Path) -> None:
    tensors = names.to_naming("diffusers", a_lora(2, width=48))
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": said})
    with pytest.raises(ValueError, match=r"x\.safetensors is not a LoRA for FLUX: its lora_adapter_metadata cannot"):
        weights.read(tmp_path / "x.safetensors")


def test_what_does_not_fit_a_base_is_told(tmp_path: Path) -> None:
    pairs = a_lora(2, width=48)
    shapes = {layer: (len(b), a.shape[1]) for layer, (a, b) in pairs.items()}
    lora = weights.read(_file(tmp_path / "a.safetensors", pairs))
    assert weights.misfits(lora, shapes) == []
    del shapes["transformer_blocks.0.attn.to_q"]
    shapes["transformer_blocks.0.attn.to_k"] = (128, 128)
    broken = _changed(pairs, "transformer_blocks.0.ff.net.2", float("inf"))
    absent = dataclasses.replace(
        lora, pairs={"transformer_blocks.9.attn.to_q": pairs["transformer_blocks.0.attn.to_q"]}
    )
    wrong, infinite = weights.misfits(dataclasses.replace(lora, pairs=broken), shapes)
    assert "for 48 inputs and 48 outputs, the base has 128 and 128" in wrong
    assert "transformer_blocks.0.ff.net.2" in infinite
    [none] = weights.misfits(absent, shapes)
    assert none == "none of its 1 layers is in the base, such as transformer_blocks.9.attn.to_q"


def test_help_is_there_without_loading_torch() -> None:
    for command in ("inspect", "convert"):
        code = f"import sys; from script import {command}\ntry: {command}.main(['--help'])\nexcept SystemExit: pass\n"
        done = subprocess.run(
            [sys.executable, "-c", code + "sys.exit('torch' in sys.modules)"],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"usage: script/{command}" in done.stdout
