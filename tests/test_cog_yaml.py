"""cog.yaml and cog.generate.yaml against the rules by which `cog build` refuses one."""

import fnmatch
from pathlib import Path

import pytest
import yaml

from captioner import model as captioner_model
from lora.flux import base
from script import signature

ROOT = Path(__file__).resolve().parent.parent
TOP = {"build", "image", "predict", "run", "train", "concurrency", "environment", "weights"}
BUILD = {
    "gpu": bool,
    "cuda": str,
    "cudnn": str,
    "python_version": str,
    "python_requirements": str,
    "run": list,
    "system_packages": list,
    "sdk_version": str,
}
CUDA_FOR_TORCH = {"2.11.0": {"12.6", "12.8", "12.9", "13.0"}}
"""From Cog 0.23.1's table: the newest torch in it."""
FORBIDDEN_VARIABLES = """
    PATH LD_LIBRARY_PATH LIBRARY_PATH PYTHONPATH PYTHONUNBUFFERED VIRTUAL_ENV R8_* REPLICATE_* CUDA_* NVIDIA_* NV_*
    PGET_* HF_ENDPOINT HF_HUB_ENABLE_HF_TRANSFER KUBERNETES_*
"""


@pytest.fixture(params=["cog.yaml", "cog.generate.yaml"])
def config(request) -> dict:
    return yaml.safe_load((ROOT / request.param).read_text(encoding="utf-8"))


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_every_key_is_known_and_of_its_type(config):
    assert config.keys() <= TOP
    assert config["build"].keys() <= BUILD.keys()
    for key, value in config["build"].items():
        assert isinstance(value, BUILD[key]), f"{key}: {value!r} (a version needs quotes)"


def test_python_and_cuda_fit_the_pinned_torch(config):
    build = config["build"]
    assert build["python_version"] in ("3.10", "3.11", "3.12", "3.13")
    torch = pins(build["python_requirements"])["torch"]
    assert build["cuda"] in CUDA_FOR_TORCH[torch]


def test_the_sdk_is_the_one_that_the_tests_run(config):
    assert config["build"]["sdk_version"] == pins("requirements-dev.txt")["cog"]


def test_predict_and_train_point_at_what_is_there(config):
    for key in {"predict", "train"} & config.keys():
        file, _, name = config[key].partition(":")
        assert file.endswith(".py")
        signature.read(ROOT / file, name)


def test_the_variables_are_ones_that_cog_lets_a_model_set(config):
    names = []
    for entry in config["environment"]:
        name, equals, value = entry.partition("=")
        assert name
        assert equals
        assert value
        assert not any(fnmatch.fnmatchcase(name, pattern) for pattern in FORBIDDEN_VARIABLES.split()), name
        names.append(name)
    assert len(names) == len(set(names))
    assert "FLUX_BASE" in names, "without it the container would train the toy base"
    assert "GOMP_SPINCOUNT=1000" in config["environment"], "as in script/python, or a busy host looks hung"


def test_the_image_takes_what_the_model_runs_on_and_nothing_that_a_user_lays_beside_it():
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if not line.startswith("#")]
    assert patterns[0] == "*", "all is left out that is not named"
    taken = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    assert all((ROOT / name).exists() for name in taken - {".cog"})
    configs = [yaml.safe_load((ROOT / name).read_text(encoding="utf-8")) for name in ("cog.yaml", "cog.generate.yaml")]
    files = {config[key].partition(":")[0] for config in configs for key in {"predict", "train"} & config.keys()}
    files |= {config["build"]["python_requirements"] for config in configs} | {"cog.yaml", "cog.generate.yaml"}
    files |= {file.name for file in ROOT.iterdir() if (file / "__init__.py").is_file()} - {
        "tests",
        "bench",
        "script",
        "server",
    }
    assert files <= taken


def test_the_managed_weights_are_ready_to_be_switched_on():
    """Their comment is YAML, and brings every file of a base to where FLUX_BASE is told to look."""
    for file in ("cog.yaml", "cog.generate.yaml"):
        text = (ROOT / file).read_text(encoding="utf-8")
        active, _, comment = text.partition("# model: ")
        switched = yaml.safe_load(active + "model: " + comment.replace("\n# ", "\n"))
        flux, *more = switched["weights"]
        assert switched["model"].startswith("r8.im/")
        assert flux["source"] == {"uri": f"hf://{base.FLUX_DEV}", "include": list(base.FILES)}
        assert f"FLUX_BASE={flux['target']}" in active
        assert [entry["source"]["uri"] for entry in more] == [f"hf://{captioner_model.MODEL}"] * (file == "cog.yaml")
        assert all(f"CAPTIONER={entry['target']}" in active for entry in more)
