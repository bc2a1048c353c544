"""A job that trains nothing: an earlier LoRA packed as it is."""

from pathlib import Path

from lora.desk import Desk
from lora.file import judge, weights
from lora.flux import base
from lora.result import hub, record, tarball
from lora.result.tarball import WEIGHTS_MEMBER
from lora.training import resume
from lora.training.watch import WARNING


def repack(desk: Desk, output: Path) -> Path:
    """The tar of an earlier LoRA as it is (`training_steps` 0), under diffusers' names and with its own header."""
    request, token, log = desk.request, desk.secrets.hf_token, desk.log
    name, skeleton = base.architecture(desk.flux_base, desk.gpu, token)
    log(f"base: {name}; a LoRA is packed by the names and sizes of its layers alone")
    with desk.stage("fetching the earlier LoRA"):
        earlier, file_hash = resume.fetch(request, token, desk.work / "earlier")
        packed = resume.fitting(earlier, skeleton, log)
    decided = {"base": name, "guidance_embeds": skeleton.config.guidance_embeds, "resume_from_sha256": file_hash}
    members = {WEIGHTS_MEMBER: desk.work / "lora.safetensors", "request.json": desk.work / "request.json"}
    weights.write_whole(members[WEIGHTS_MEMBER], packed)
    for said in judge.remarks(weights.read(members[WEIGHTS_MEMBER])):
        log(f"{WARNING}{said}")
    published = None
    if request.hf_repo_id:
        published = hub.publish(request, token or "", decided, members[WEIGHTS_MEMBER], [], 0, log)
    written = record.request_json(request, decided, record.data_hash([]), published)
    members["request.json"].write_text(written, encoding="utf-8")
    tar = tarball.finish(members, output)
    hub.tell(published, log, desk.metric)
    return tar
