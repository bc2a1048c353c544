"""How fast pictures are prepared, against Pillow's bare decode and resize, and how much memory it takes.

`python -m bench.pictures`: JPEGs of 12 megapixels, drawn here, on all cores. The same files, threads and sizes go by
turns to `views.prepared` and to bare Pillow (open, convert to RGB, resize), so that a busy machine slows both. The
goal is 1.15 times bare Pillow's time. `--full` measures the memory of the first look and the preparing with 2,000
pictures; the goal is 2 GiB. On the disk lie six drawn pictures, the rest are further names of them.
"""

import argparse
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

from PIL import Image, ImageDraw, ImageOps

from lora.pictures import buckets, survey, views
from lora.pictures.views import View

GOAL_RATIO = 1.15
GOAL_GIB = 2.0
DISTINCT = 6  # pictures drawn; more files are further names of them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24, help="pictures of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--megapixels", type=float, default=12)
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--resolutions", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--format", default="JPEG", choices=["JPEG", "PNG", "WEBP", "AVIF", "HEIF"])
    parser.add_argument("--files", type=Path, nargs="+", help="measure these instead of drawn ones")
    parser.add_argument("--full", action="store_true", help="measure the memory with 2,000 pictures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        drawn = args.files or draw(Path(folder), args.megapixels, args.format)
        paths = repeated(drawn, args.count, Path(folder))
        with buckets.opened(paths[0]) as picture:
            width, height = picture.size
        print(f"{args.count} {args.format} of {width} x {height}, to {args.resolutions}, on {args.threads} threads")
        speed(paths, buckets.buckets_for(width, height, args.resolutions), args.resolutions, args.threads, args.turns)
        counts = (args.count, 2_000) if args.full else (args.count, 4 * args.count)
        for count in counts:
            gib = peak_gib(repeated(drawn, count, Path(folder)), args.resolutions, args.threads)
            print(f"peak memory with {count:,} pictures: {gib:.2f} GiB (goal with 2,000: under {GOAL_GIB:g})")


def draw(folder: Path, megapixels: float, form: str) -> list[Path]:
    """Pictures with the soft and hard parts and the grain of a photograph, 4 to 3."""
    buckets.know_heif()
    size = (round((megapixels * 1e6 * 4 / 3) ** 0.5), round((megapixels * 1e6 * 3 / 4) ** 0.5))
    paths = []
    for number in range(DISTINCT):
        soft = Image.effect_noise((size[0] // 64, size[1] // 64), 150).resize(size, Image.Resampling.BICUBIC)
        grain = Image.effect_noise(size, 12)
        channel = Image.blend(soft, grain, 0.3)
        image = Image.merge("RGB", [channel, ImageOps.mirror(channel), ImageOps.flip(channel)])
        for n in range(20):
            x, y = (number * 37 + n * 211) % size[0], (number * 91 + n * 173) % size[1]
            ImageDraw.Draw(image).rectangle((x, y, x + size[0] // 9, y + size[1] // 12), outline="black", width=9)
        paths.append(folder / f"drawn{number}.{form.lower()}")
        image.save(paths[-1], form, quality=90)
    return paths


def repeated(paths: Sequence[Path], count: int, folder: Path) -> list[Path]:
    """`count` files, each a link to one of the given."""
    links = []
    for n in range(count):
        link = folder / f"{count}-{n}{paths[0].suffix}"
        if not link.exists():
            link.symlink_to(paths[n % len(paths)].absolute())
        links.append(link)
    return links


def speed(
    paths: Sequence[Path], sizes: Sequence[tuple[int, int]], resolutions: Sequence[int], threads: int, turns: int
) -> None:
    """Prints images per second of each way; `sizes` are the buckets of the files, which are all of one size."""

    def ours() -> None:
        for _ in views.prepared([View(path) for path in paths], resolutions, threads=threads):
            pass

    def bare() -> None:
        in_pool(lambda path: shrink(Image.open(path).convert("RGB")))

    def bare_draft() -> None:
        def work(path: Path) -> None:
            image = Image.open(path)
            image.draft("RGB", (int(buckets.SPARE * sizes[-1][0]), int(buckets.SPARE * sizes[-1][1])))
            shrink(image.convert("RGB"))

        in_pool(work)

    def look() -> None:
        survey.look_at({path.name: path for path in paths}, threads)

    def shrink(image: Image.Image) -> None:
        for size in sizes:
            image.resize(size, Image.Resampling.LANCZOS)

    def in_pool(work: Callable[[Path], None]) -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, paths))

    ways = {"prepared": ours, "bare Pillow": bare, "bare Pillow with draft": bare_draft, "first look": look}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            if turn:  # the first warms the files
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for name, pairs in times.items():
        wall_ratio, cpu_ratio = (
            statistics.median(own[i] / other[i] for own, other in zip(times["prepared"], pairs, strict=True))
            for i in (0, 1)
        )
        rate = len(paths) / statistics.median(wall for wall, _ in pairs)
        against = "" if name in ("prepared", "first look") else (
            f"; prepared takes {wall_ratio:.2f} times as long (goal {GOAL_RATIO}), {cpu_ratio:.2f} of processor time"
        )  # fmt: skip
        print(f"{name}: {rate:.1f} images/s{against}")


def peak_gib(paths: Sequence[Path], resolutions: Sequence[int], threads: int) -> float:
    """The most memory that a fresh process holds which looks at all of these and then prepares them, as a training."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_prepare_all, list(paths), list(resolutions), threads).result() / 2**20


def _prepare_all(paths: list[Path], resolutions: list[int], threads: int) -> int:
    survey.look_at({path.name: path for path in paths}, threads)
    for _ in views.prepared([View(path) for path in paths], resolutions, threads=threads):
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux


if __name__ == "__main__":
    main()
