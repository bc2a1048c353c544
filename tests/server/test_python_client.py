"""The calls of Replicate's documentation by its own Python client, unmodified but for address and token."""

import http.server
import io
import json
import tarfile
import threading
import zipfile

import httpx
import pytest
import replicate
from replicate.exceptions import ReplicateError

from tests.server.conftest import QUICK, ROOT, SKETCH, Served, wait, wait_for

ANY_VERSION = 64 * "a"


def test_a_model_is_made_and_found(client: replicate.Client) -> None:
    made = client.models.create(
        owner="you", name="flux-dev-me-lora", visibility="private", hardware="gpu-t4", description="Me"
    )
    assert (made.owner, made.name, made.visibility, made.latest_version) == ("you", "flux-dev-me-lora", "private", None)
    assert client.models.get("you/flux-dev-me-lora").description == "Me"
    assert "flux-dev-me-lora" in [model.name for model in client.models.search("dev-me")]
    assert {"flux-lora-trainer", "flux-lora-generator"} <= {model.name for model in client.models.list()}
    with pytest.raises(ReplicateError, match="exists already"):
        client.models.create(owner="you", name="flux-dev-me-lora", visibility="private", hardware="cpu")
    assert client.accounts.current().username == "you"
    assert client.hardware.list()[0].sku == "cpu"


def test_a_training_publishes_a_version_that_draws_at_once(
    client: replicate.Client, trained: replicate.training.Training, served: Served
) -> None:
    assert trained.model == "local/flux-lora-trainer"
    published = trained.output["version"]
    assert published.startswith("you/trained:")
    assert trained.destination == "you/trained"
    with tarfile.open(fileobj=io.BytesIO(httpx.get(trained.output["weights"]).content)) as tar:
        assert "output/flux_train_replicate/lora.safetensors" in tar.getnames()
    progress = replicate.prediction.Prediction.Progress.parse(trained.logs)
    assert (progress.current, progress.total) == (2, 2)
    model = client.models.get("you/trained")
    assert model.latest_version is not None
    assert f"you/trained:{model.latest_version.id}" == published
    for name in ("you/trained", published):
        pictures = client.run(name, input={**SKETCH, "lora_scale": 0.9, "num_outputs": 2, "aspect_ratio": "2:3"})
        assert [picture.read()[:8] for picture in pictures] == [b"\x89PNG\r\n\x1a\n"] * 2
    base = client.run("local/flux-lora-generator", input=SKETCH)[0].read()
    assert client.run("you/trained", input=SKETCH)[0].read() != base
    assert client.run("you/trained", input={**SKETCH, "lora_scale": 0})[0].read() == base


def test_image_to_image_and_loras_of_other_models_and_trainings(
    client: replicate.Client, trained: replicate.training.Training, tmp_path
) -> None:
    start = tmp_path / "start.png"
    start.write_bytes(client.run("local/flux-lora-generator", input=SKETCH)[0].read())
    with start.open("rb") as image:
        drawn = client.run("you/trained", input={**SKETCH, "image": image, "prompt_strength": 0.5})
    assert drawn[0].read() != start.read_bytes()
    own = client.run("you/trained", input=SKETCH)[0].read()
    for weights in ("you/trained", trained.output["version"], trained.id, trained.output["weights"]):
        named = client.run("local/flux-lora-generator", input={**SKETCH, "lora_weights": weights})
        assert named[0].read() == own, weights
    both = {**SKETCH, "extra_lora": "you/trained", "extra_lora_scale": 0.8}
    assert client.run("you/trained", input=both)[0].read() != own


def test_lists_have_what_was_run(client: replicate.Client, trained: replicate.training.Training) -> None:
    assert trained.id in [training.id for training in client.trainings.list()]
    prediction = client.predictions.create(version="local/flux-lora-generator", input=SKETCH, wait=True)
    assert prediction.status == "succeeded"
    assert client.predictions.list()[0].id == prediction.id
    assert client.predictions.get(prediction.id).metrics["predict_time"] > 0


def test_files_are_stored_listed_and_deleted(client: replicate.Client) -> None:
    with (ROOT / "examples" / "subject.zip").open("rb") as content:
        file = client.files.create(content, metadata={"of": "a test"})
    assert (file.name, file.metadata) == ("subject.zip", {"of": "a test"})
    assert file.size == (ROOT / "examples" / "subject.zip").stat().st_size
    assert file.id in [entry.id for entry in client.files.list()]
    download = httpx.get(client.files.get(file.id).urls["download"])
    assert download.content == (ROOT / "examples" / "subject.zip").read_bytes()
    assert client.files.delete(file.id)
    with pytest.raises(ReplicateError, match="does not exist"):
        client.files.get(file.id)
    assert httpx.get(file.urls["download"]).status_code == 404


def test_a_training_is_canceled(client: replicate.Client, http: httpx.Client) -> None:
    with (ROOT / "examples" / "subject.zip").open("rb") as content:
        training = client.trainings.create(
            model="replicate/fast-flux-trainer",
            version=ANY_VERSION,
            input={"input_images": content, **QUICK, "training_steps": 6000},
            destination="you/canceled",
        )
    wait_for(training, "| 1/6000")
    training.cancel()
    assert training.status == "canceled"
    # The worker is free again: another run is done soon.
    assert client.predictions.create(version="local/flux-lora-generator", input=SKETCH, wait=True).status == "succeeded"
    assert client.trainings.get(training.id).status == "canceled"
    assert client.models.get("you/canceled").latest_version is None


def test_a_failure_says_why(client: replicate.Client) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("torn.png", b"\x89PNG\r\n\x1a\nno more")
    training = client.trainings.create(
        version=f"ostris/flux-dev-lora-trainer:{ANY_VERSION}",
        input={"input_images": io.BytesIO(file.getvalue()), **QUICK},
        destination="you/failed",
    )
    assert wait(training) == "failed"
    assert "torn.png" in training.error
    assert "Traceback" not in training.error


def test_a_stream_tells_logs_and_output(client: replicate.Client) -> None:
    events = list(client.stream("local/flux-lora-generator", input=SKETCH))
    assert "".join(event.data for event in events if event.event.value == "logs").startswith("no LoRA")
    (output,) = [event.data for event in events if event.event.value == "output"]
    assert output.read()[:4] == b"\x89PNG"
    assert events[-1].event.value == "done"


def test_webhooks_are_signed_and_come_in_order(client: replicate.Client) -> None:
    received: list[tuple[dict[str, str], str]] = []
    ended = threading.Event()

    class Inbox(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            received.append((dict(self.headers), body))
            self.send_response(200)
            self.end_headers()
            if json.loads(body)["status"] == "succeeded":
                ended.set()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Inbox) as inbox:
        threading.Thread(target=inbox.serve_forever, daemon=True).start()
        prediction = client.predictions.create(
            version="local/flux-lora-generator",
            input=SKETCH,
            webhook=f"http://127.0.0.1:{inbox.server_address[1]}/hook",
            webhook_events_filter=["start", "completed"],
        )
        assert ended.wait(60)
        inbox.shutdown()
    secret = client.webhooks.default.secret()
    for headers, body in received:
        replicate.webhook.Webhooks.validate(headers=headers, body=body, secret=secret, tolerance=60)
        assert json.loads(body)["id"] == prediction.id
    with pytest.raises(ValueError, match="signature is invalid"):
        replicate.webhook.Webhooks.validate(headers=received[0][0], body="{}", secret=secret)


def test_a_trainer_that_answers_with_a_finetune_id_is_served_too(client: replicate.Client) -> None:
    with (ROOT / "examples" / "subject.zip").open("rb") as content:
        finetune = client.run("black-forest-labs/flux-pro-trainer", input={"input_images": content, **QUICK})
    assert isinstance(finetune, str)
    drawn = client.run("local/flux-lora-generator", input={**SKETCH, "lora_weights": finetune})
    assert drawn[0].read()[:4] == b"\x89PNG"
