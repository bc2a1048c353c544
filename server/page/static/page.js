// What forms cannot do by themselves: pictures that are dropped, a mask that is painted, numbers beside sliders.
"use strict";

document.addEventListener("input", (event) => {
  if (event.target.type !== "range") return;
  const shown = document.querySelector(`output[for="${event.target.id}"]`);
  if (shown) shown.value = event.target.value;
});

document.addEventListener("submit", (event) => {
  const question = event.target.dataset.confirm;
  if (question && !window.confirm(question)) event.preventDefault();
  else if (event.target.id === "training") document.getElementById("start").disabled = true;
});

// The log stays at its end while it grows, or where somebody has scrolled to, and closed where it was closed.
let atEnd = true;
let place = 0;
let open = true;
const keepLog = () => {
  const log = document.getElementById("log");
  if (!log) return;
  document.getElementById("log-part").open = open;
  log.scrollTop = atEnd ? log.scrollHeight : place;
};
document.addEventListener("htmx:beforeSwap", () => {
  const log = document.getElementById("log");
  if (!log) return;
  open = document.getElementById("log-part").open;
  if (!open) return; // a closed one has no place
  place = log.scrollTop;
  atEnd = log.scrollHeight - place - log.clientHeight < 40;
});
document.addEventListener("htmx:afterSettle", keepLog);
keepLog();

for (const time of document.querySelectorAll("time[datetime]"))
  time.textContent = new Date(time.dateTime).toLocaleString([], { dateStyle: "medium", timeStyle: "short" });

const drop = document.getElementById("drop");
if (drop) {
  const chosen = document.getElementById("files");
  const sending = document.getElementById("sending");
  const refused = document.getElementById("refused");
  const draft = `/drafts/${drop.dataset.draft}`;
  let queue = Promise.resolve();

  const send = async (files) => {
    let number = 0;
    for (const file of files) {
      sending.textContent = `Sending ${++number} of ${files.length}: ${file.name}`;
      const body = new FormData();
      body.append("file", file, file.name);
      let why = "";
      try {
        const answer = await fetch(`${draft}/files`, { method: "POST", body, headers: { "HX-Request": "true" } });
        const there = new URL(window.location); // a reload, or the way back from the run, shows the same pictures
        there.searchParams.set("draft", drop.dataset.draft);
        if (answer.ok) window.history.replaceState(null, "", there);
        else why = new DOMParser().parseFromString(await answer.text(), "text/html").body.textContent.trim();
      } catch {
        why = "the server did not answer; drop it again";
      }
      if (why) {
        const line = document.createElement("li");
        line.textContent = `${file.name}: ${why}`;
        refused.append(line);
      }
    }
    sending.textContent = "Looking at the pictures…";
    const form = document.getElementById("training");
    await htmx.ajax("POST", `${draft}/look`, { target: "#pictures", source: form, values: {} });
    sending.textContent = "";
  };
  const take = (files) => {
    files = Array.from(files);
    if (files.length) queue = queue.then(() => send(files));
  };
  chosen.addEventListener("change", () => {
    take(chosen.files);
    chosen.value = "";
  });
  for (const name of ["dragover", "dragleave", "drop"])
    drop.addEventListener(name, (event) => {
      event.preventDefault();
      drop.classList.toggle("over", name === "dragover");
      if (name === "drop") take(event.dataTransfer.files);
    });
  document.addEventListener("click", (event) => {
    if (event.target.closest("[data-again]")) window.location.assign("/train");
  });
}

const image = document.getElementById("image");
if (image) {
  const canvas = document.getElementById("canvas");
  const shown = canvas.getContext("2d");
  const mask = document.createElement("canvas"); // white where it is to be drawn anew, at the picture's own size
  const painted = mask.getContext("2d");
  const brush = document.getElementById("brush");
  const field = document.getElementById("mask");
  let picture = null;
  let last = null;
  let at = null; // of the brush that the keys move

  const show = () => {
    shown.globalAlpha = 1;
    shown.drawImage(picture, 0, 0, canvas.width, canvas.height);
    shown.globalAlpha = 0.5;
    shown.globalCompositeOperation = "lighter";
    shown.drawImage(mask, 0, 0, canvas.width, canvas.height);
    shown.globalCompositeOperation = "source-over";
    shown.globalAlpha = 1;
    if (at && document.activeElement === canvas) {
      shown.strokeStyle = "#1f4fd1";
      shown.lineWidth = 2;
      shown.beginPath();
      shown.arc((at.x * canvas.width) / mask.width, (at.y * canvas.height) / mask.height, width() / 2, 0, 7);
      shown.stroke();
    }
  };
  const width = () => (brush.value / 100) * canvas.width;
  const keep = () =>
    mask.toBlob((blob) => {
      const files = new DataTransfer();
      files.items.add(new File([blob], "mask.png", { type: "image/png" }));
      field.files = files.files;
    }, "image/png");
  const clear = () => {
    painted.fillStyle = "#000";
    painted.fillRect(0, 0, mask.width, mask.height);
    field.value = "";
    show();
  };
  const stroke = (from, to) => {
    painted.strokeStyle = "#fff";
    painted.lineCap = "round";
    painted.lineWidth = (width() * mask.width) / canvas.width;
    painted.beginPath();
    painted.moveTo(from.x, from.y);
    painted.lineTo(to.x + 0.01, to.y);
    painted.stroke();
    show();
  };
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return {
      x: ((event.clientX - box.left) / box.width) * mask.width,
      y: ((event.clientY - box.top) / box.height) * mask.height,
    };
  };
  image.addEventListener("change", async () => {
    const file = image.files[0];
    document.getElementById("masking").hidden = !file;
    field.value = "";
    if (!file) return;
    picture = await createImageBitmap(file);
    mask.width = picture.width;
    mask.height = picture.height;
    canvas.width = Math.min(640, Math.max(256, picture.width));
    canvas.height = Math.round((canvas.width * picture.height) / picture.width);
    at = { x: mask.width / 2, y: mask.height / 2 };
    clear();
  });
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return;
    const now = place(event);
    stroke(last, now);
    last = now;
  });
  for (const name of ["pointerup", "pointercancel"])
    canvas.addEventListener(name, () => {
      if (last) keep();
      last = null;
    });
  canvas.addEventListener("keydown", (event) => {
    const step = mask.width / 40;
    const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] };
    if (event.key in moves) {
      at.x = Math.min(mask.width, Math.max(0, at.x + moves[event.key][0]));
      at.y = Math.min(mask.height, Math.max(0, at.y + moves[event.key][1]));
    } else if (event.key === " ") {
      stroke(at, at);
      keep();
    } else return;
    event.preventDefault();
    show();
  });
  canvas.addEventListener("focus", show);
  canvas.addEventListener("blur", show);
  document.getElementById("clear").addEventListener("click", clear);
}
