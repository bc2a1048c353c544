"""A little REST service in front of the models: POST /image/{model_name} draws and streams the picture back.

    pip install fastapi uvicorn replicate
    export REPLICATE_BASE_URL=http://127.0.0.1:5050 REPLICATE_API_TOKEN=r8_… MODELS=shoes=you/my-shoes,cat=you/my-cat
    uvicorn image_service:app --app-dir examples
    curl -X POST localhost:8000/image/cat -H 'Content-Type: application/json' -d '{"prompt": "a TOK"}' -o cat.png

It works with Replicate itself too. The server behind it keeps prompt, seed and pictures, checks its guardrails and
counts what each token used; a header `X-Campaign` here becomes a tag there.
"""

import os
from collections.abc import Iterator
from typing import Annotated

import replicate
from fastapi import FastAPI, Header, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from replicate.exceptions import ModelError, ReplicateError

app = FastAPI(title="Pictures")
MODELS = dict(pair.split("=", 1) for pair in os.environ.get("MODELS", "").split(",") if "=" in pair)
"""Short names, and the models that they mean."""
KINDS = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


class ImageRequest(BaseModel):
    """The generator's inputs. What is null is left out, so the model's own default counts."""

    prompt: str
    image: str | None = None
    mask: str | None = None
    aspect_ratio: str | None = None
    height: int | None = None
    width: int | None = None
    prompt_strength: float | None = None
    model: str | None = None
    num_outputs: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    output_format: str = "png"
    output_quality: int | None = None
    disable_safety_checker: bool | None = None
    go_fast: bool | None = None
    megapixels: str | None = None
    lora_scale: float | None = None
    extra_lora: str | None = None
    extra_lora_scale: float | None = None


@app.post("/image/{model_name}")
def image(
    model_name: str, request: ImageRequest, x_campaign: Annotated[str | None, Header()] = None
) -> StreamingResponse:
    """The first picture of the answer, with its media type."""
    if model_name not in MODELS:
        raise HTTPException(404, f"there is no model {model_name[:60]!r}; there are {', '.join(sorted(MODELS))}")
    client = replicate.Client(headers={"Tags": x_campaign} if x_campaign else {})
    try:
        output = client.run(MODELS[model_name], input=request.model_dump(exclude_none=True))
    except ModelError as error:  # the model was at it, and failed
        raise HTTPException(502, error.prediction.error) from error
    except ReplicateError as error:  # the request was refused: an input, a rule, the token
        raise HTTPException(error.status or 502, error.detail or error.title) from error
    first = next(iter(output), None) if isinstance(output, (list, Iterator)) else output
    if first is None:
        raise HTTPException(502, "the model returned no picture")
    return StreamingResponse(iter(first), media_type=KINDS.get(request.output_format, "application/octet-stream"))
