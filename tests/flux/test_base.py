"""Finding a base, and knowing a whole one from one with a hole."""

import dataclasses
import json
import os
import shutil
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lora.flux import base, hardware
from lora.flux.base import Base
from lora.flux.hardware import Gpu, Plan
from tests import hub_server, toy_schnell

GPU = Gpu(name="NVIDIA H100 80GB HBM3", memory=80 * 2**30)


@pytest.fixture
def copy(toy: Base, tmp_path: Path) -> Path:
    shutil.copytree(toy.folder, tmp_path / "base")
    return tmp_path / "base"


def test_without_a_gpu_and_a_name_it_is_the_toy_and_says_so(toy: Base) -> None:
    assert toy.name == "toyflux"
    assert "TOY" in toy.reason


def test_native_size_text_lengths_and_width_come_from_the_files(copy: Path, toy: Base) -> None:
    for file, key, value in (
        ("vae/config.json", "sample_size", 1024),
        ("tokenizer_2/tokenizer_config.json", "model_max_length", 512),
    ):
        config = json.loads((copy / file).read_text())
        (copy / file).write_text(json.dumps({**config, key: value}))
    changed = base.find(str(copy), GPU)
    assert (changed.native, changed.t5_tokens, changed.clip_tokens) == (1024, 512, 77)
    assert changed.resolutions == (512, 768, 1024)
    assert toy.resolutions == (toy.native,)
    assert toy.width == 128


def test_guidance_and_licence_come_from_the_files_and_a_distilled_base_is_warned_of(copy: Path, toy: Base) -> None:
    assert (toy.guided, toy.licence, toy.warning) == (True, {}, None)
    toy_schnell.write(copy)
    config = copy / "tokenizer_2" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 512}))
    (copy / "README.md").write_text("---\nlicense: apache-2.0\nlicense_link: LICENSE.md\ntags: [a]\n---\n")
    found = base.find(str(copy), None)
    assert (found.guided, found.t5_tokens, found.licence) == (False, 256, {"license": "apache-2.0"})
    assert "distilled to draw in 4 steps" in (found.warning or "")
    for damaged in ("---\nlicense: [\n---\n", "---\n- a\n---\n", "---\nlicense: 3\n---\n", "no front"):
        (copy / "README.md").write_text(damaged)
        assert base.find(str(copy), None).licence == {}


def test_parameters_are_counted_from_the_header(toy: Base, cpu: Plan) -> None:
    with toy.transformer(cpu) as transformer:
        assert toy.parameters == sum(p.numel() for p in transformer.parameters())


def test_a_sharded_base_is_whole_when_its_index_says_so(copy: Path, cpu: Plan) -> None:
    whole = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(whole, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    names, index = sorted(weights), {}
    for shard, part in enumerate((names[::2], names[1::2]), 1):
        name = f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, whole.with_name(name), metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    whole.unlink()
    (whole.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    )
    with base.find(str(copy), None).transformer(cpu) as transformer:
        assert torch.equal(transformer.proj_out.bias, weights["proj_out.bias"].float())
    (whole.parent / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors is missing, though the index names it"):
        base.find(str(copy), None)


def test_everything_missing_or_cut_short_is_told_at_once(copy: Path) -> None:
    (copy / "vae" / "config.json").unlink()
    shutil.rmtree(copy / "tokenizer_2")
    weights = copy / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (copy / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"not weights at all")
    with pytest.raises(ValueError, match="FLUX_BASE") as caught:
        base.find(str(copy), None)
    for what in ("vae/config.json", "tokenizer_2/tokenizer_config", "text_encoder/model", "transformer/diffusion"):
        assert what in str(caught.value)


@pytest.mark.parametrize(
    ("file", "left", "fault"),
    [
        ("model_index.json", 20, "model_index.json is cut short or damaged: it is no JSON"),
        ("vae/config.json", 20, "vae/config.json is cut short or damaged: it is no JSON"),
        ("tokenizer_2/tokenizer.json", 999, "tokenizer_2/tokenizer.json is cut short or damaged: it is no JSON"),
        ("tokenizer/tokenizer.json", None, "tokenizer has no tokenizer.json and no vocab.json with merges.txt"),
        ("scheduler/scheduler_config.json", 0, "scheduler/scheduler_config.json is cut short or damaged"),
        ("vae/diffusion_pytorch_model.safetensors", 0, "vae/diffusion_pytorch_model.safetensors is cut short"),
        ("vae/diffusion_pytorch_model.safetensors", 99, "vae/diffusion_pytorch_model.safetensors is cut short"),
        ("text_encoder/model.safetensors", None, "text_encoder has no safetensors weights"),
        ("vae/x.safetensors.index.json", 0, "vae/x.safetensors.index.json is cut short or damaged: it is no JSON"),
    ],
)
def test_a_file_that_is_missing_or_cut_short_is_named_with_what_to_do(
    copy: Path, file: str, left: int | None, fault: str
) -> None:
    if left is None:
        (copy / file).unlink()
    else:
        (copy / file).touch()
        os.truncate(copy / file, left)
    with pytest.raises(ValueError, match="FLUX_BASE") as caught:
        base.find(str(copy), None)
    assert fault in str(caught.value)
    assert "Fetch it again, or set FLUX_BASE to a complete folder" in str(caught.value)


def test_a_model_of_another_kind_is_named_by_what_it_lacks(copy: Path) -> None:
    config = copy / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": None}))
    with pytest.raises(ValueError, match=r"^FLUX_BASE: base is no FLUX base .*: vae/config.json has no number sample_"):
        base.find(str(copy), None)


def test_a_folder_that_is_no_base_and_a_name_that_is_no_id_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no model_index\.json"):
        base.find(str(tmp_path), None)
    with pytest.raises(ValueError, match="neither a folder nor an id"):
        base.find("/no/such/folder", None)


def test_a_hub_that_cannot_be_reached_is_an_error_not_the_toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name, gpu in ((None, GPU), ("black-forest-labs/FLUX.1-dev", None)):
        with pytest.raises(ValueError, match=r"FLUX_BASE: black-forest-labs/FLUX\.1-dev could not be downloaded"):
            base.find(name, gpu)


def test_a_base_too_large_for_a_cpu_is_refused_before_its_weights_are_fetched(
    toy: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A container that finds no GPU would fetch 33 GB and then train for months."""
    config = json.loads((toy.folder / "transformer" / "config.json").read_text())
    config |= {"num_layers": 19, "num_single_layers": 38, "num_attention_heads": 24, "attention_head_dim": 128}
    with hub_server.asked_by_the_library(monkeypatch, tmp_path) as hub:
        hub.private["club/big"] = False
        hub.files["club/big"] = {"transformer/config.json": json.dumps(config).encode()}
        with pytest.raises(
            ValueError, match=r"FLUX_BASE: club/big has 1\d billion weights, and no GPU is visible here"
        ):
            base.find("club/big", None)
        with pytest.raises(ValueError, match=r"no model_index\.json"):
            base.find("club/big", GPU)


def test_a_folder_too_large_to_train_on_a_cpu_still_says_what_its_layers_are(
    toy: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "MOST_ON_A_CPU", 1e6)
    with pytest.raises(ValueError, match="no GPU is visible here"):
        base.find(str(base.TOY), None)
    name, skeleton = base.architecture(str(base.TOY), None)
    assert name == "base"
    assert skeleton.inner_dim == toy.width


def test_a_gated_base_is_fetched_with_the_users_own_token(
    toy: Base, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with hub_server.asked_by_the_library(monkeypatch, tmp_path) as hub:
        hub.private["club/base"] = True
        hub.files["club/base"] = {
            file.relative_to(toy.folder).as_posix(): file.read_bytes() for file in toy.folder.rglob("*.*")
        }
        told = b"---\nlicense: other\nlicense_name: club-licence\nlicense_link: LICENSE.md\n---\n"
        hub.files["club/base"]["README.md"] = told
        with pytest.raises(
            ValueError, match=r"FLUX_BASE: the Hugging Face Hub has no club/base, or the token \(hf_token"
        ):
            base.find("club/base", None)
        found = base.find("club/base", None, hub_server.READ_TOKEN)
    assert (found.name, found.width) == ("club/base", toy.width)
    link = "https://huggingface.co/club/base/blob/main/LICENSE.md"
    assert found.licence == {"license": "other", "license_name": "club-licence", "license_link": link}


def test_a_token_that_the_hub_refuses_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for status in (401, 403):
        with hub_server.asked_by_the_library(monkeypatch, tmp_path) as hub:
            hub.private["club/base"] = True
            hub.faults = [("club/base", status)] * 9
            with pytest.raises(
                ValueError, match=r"^hf_token: the Hugging Face Hub refuses it .* for club/base"
            ) as told:
                base.find("club/base", GPU, "hf_expired")
            assert "hf_expired" not in str(told.value)


def test_a_gpu_that_torch_cannot_use_is_no_reason_to_train_the_toy_unasked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # as a cluster sets it
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(hardware, "NVIDIA", (str(tmp_path / "nvidiactl"),))
    for cuda, told in ((None, "is built for the CPU"), ("13.0", r"too old for CUDA 13\.0")):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(ValueError, match=rf"^FLUX_BASE: there is an NVIDIA GPU here.*{told}.*toyflux/base"):
            base.find(None, None)
    assert base.find(str(base.TOY), None).name == "base"
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert base.find(None, None).name == "toyflux"


def test_what_is_lent_is_given_back(toy: Base, cpu: Plan) -> None:
    with toy.vae(cpu) as vae:
        seen = weakref.ref(vae)
        assert not any(p.requires_grad for p in vae.parameters())
    del vae
    assert seen() is None


def test_a_quantised_base_is_loaded_without_ever_being_whole_and_draws_what_the_base_draws(
    toy: Base, cpu: Plan
) -> None:
    in_float8 = dataclasses.replace(cpu, quantised=True)
    with toy.transformer(cpu) as whole, toy.transformer(in_float8) as transformer:
        held = {name: tensor.nbytes for name, tensor in transformer.state_dict().items()}
        plain = {name: tensor.nbytes for name, tensor in whole.state_dict().items()}
        assert sum(held.values()) < 0.55 * sum(plain.values())  # of float32; a byte for four
        inputs = {
            "hidden_states": torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)),
            "timestep": torch.tensor([0.7]),
            "guidance": torch.tensor([3.5]),
            "pooled_projections": torch.zeros(1, whole.config.pooled_projection_dim),
            "encoder_hidden_states": torch.zeros(1, toy.t5_tokens, whole.config.joint_attention_dim),
            "txt_ids": torch.zeros(toy.t5_tokens, 3),
            "img_ids": torch.zeros(4, 3),
        }
        with torch.no_grad():
            wanted, drawn = whole(**inputs).sample, transformer(**inputs).sample
        assert 0 < (drawn - wanted).norm() / wanted.norm() < 0.25  # each weight is off by 2.6 % of itself on average
        assert transformer.dtype == torch.float32


def _in_memory(file: Path) -> bool:
    """Whether the system has the file's last page in its cache."""
    with file.open("rb") as stream:
        try:
            return bool(os.preadv(stream.fileno(), [bytearray(1)], file.stat().st_size - 1, os.RWF_NOWAIT))
        except BlockingIOError:
            return False
        except OSError as error:
            pytest.skip(f"this disk does not tell what is in memory: {error}")


@pytest.mark.skipif(not hasattr(os, "RWF_NOWAIT"), reason="only Linux tells what is in memory")
def test_the_large_files_are_read_ahead_and_only_as_long_as_it_is_wanted(copy: Path, toy: Base) -> None:
    names = ("text_encoder_2/model.safetensors", "transformer/diffusion_pytorch_model.safetensors")
    own = copy / "captioner.safetensors"
    shutil.copy(copy / names[0], own)
    files = [own, *(copy / name for name in names)]
    flux = dataclasses.replace(toy, folder=copy)

    def forget() -> None:
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    for _ in range(20):  # what has just been written lingers
        forget()
        if not any(map(_in_memory, files)):
            break
        time.sleep(0.2)
    else:
        pytest.skip("this disk's files stay in memory")
    with flux.read_ahead([own]):
        [thread] = [thread for thread in threading.enumerate() if thread.name == "read ahead"]
        thread.join(20)
    assert all(map(_in_memory, files))

    fifo = copy / "transformer" / "never.safetensors"  # a file of which nothing comes, as of a disk that hangs
    files[2].unlink()
    os.mkfifo(fifo)
    with flux.read_ahead():
        pass
    with fifo.open("wb"):
        threads = [thread for thread in threading.enumerate() if thread.name == "read ahead"]
        for thread in threads:
            thread.join(20)
        assert not any(thread.is_alive() for thread in threads)
    files[1].unlink()  # a file that is gone is not its business
    with flux.read_ahead():
        pass
