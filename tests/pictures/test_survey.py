from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from lora.pictures import archive, photos, survey

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.zip"))


def drawing(seed: int, size: tuple[int, int] = (600, 500)) -> Image.Image:
    """Sharp shapes on a plain ground, others for each seed."""
    image = Image.new("RGB", size, ("navy", "white", "olive", "pink")[seed % 4])
    draw = ImageDraw.Draw(image)
    for n in range(12):
        x, y = (seed * 97 + n * 131) % (size[0] - 100), (seed * 53 + n * 89) % (size[1] - 90)
        draw.rectangle((x, y, x + 40 + n * 5, y + 80), ("red", "black", "gold", "teal")[(n + seed) % 4])
    return image


def looks(folder: Path, pictures: dict[str, Image.Image]) -> list[survey.Look]:
    for name, image in pictures.items():
        image.save(folder / name)
    return survey.look_at({name: folder / name for name in pictures})


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """What is said of pictures put beside four good ones, of which nothing is said."""
    good = looks(tmp_path_factory.mktemp("good"), {f"good{seed}.png": drawing(seed) for seed in range(4)})
    assert survey.report(good, [256]) == []
    return lambda folder, pictures: survey.report([*good, *looks(folder, pictures)], [256])


def test_of_each_picture_the_upright_size_is_known(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(1).save(tmp_path / "a.jpg", exif=exif)
    [look] = survey.look_at({"in/a.jpg": tmp_path / "a.jpg"})
    assert (look.name, look.width, look.height) == ("in/a.jpg", 500, 600)


def test_all_damaged_pictures_are_named_by_their_names_in_the_archive(tmp_path):
    drawing(1).save(tmp_path / "good.jpg")
    data = (tmp_path / "good.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.png").write_bytes(b"hello")
    pictures = {f"in/{name}": tmp_path / name for name in ("cut.jpg", "good.jpg", "text.png")}
    with pytest.raises(ValueError, match="input_images") as error:
        survey.look_at(pictures)
    assert "'in/cut.jpg'" in str(error.value)
    assert "'in/text.png'" in str(error.value)
    assert "good.jpg" not in str(error.value)


def test_fewer_than_four_pictures_are_warned_of(tmp_path):
    three = looks(tmp_path, {f"{seed}.png": drawing(seed) for seed in range(3)})
    assert survey.report(three, [256]) == ["only 3 pictures: 10 to 20 that differ teach more"]


@pytest.mark.parametrize("change", ["same", "compressed", "smaller", "brighter"])
def test_a_picture_sent_twice_is_found_however_it_was_saved(change, reported, tmp_path):
    copy = drawing(1)
    if change == "smaller":
        copy = copy.resize((420, 350))
    elif change == "brighter":
        copy = ImageEnhance.Brightness(copy).enhance(1.08)
    drawing(1).save(tmp_path / "copy.jpg", quality=40)
    copy = Image.open(tmp_path / "copy.jpg") if change == "compressed" else copy
    [line] = reported(tmp_path, {"again.png": copy})
    assert line.startswith("'good1.png', 'again.png' look alike")


def test_pictures_alike_in_shape_but_not_in_colour_differ(reported, tmp_path):
    red, green, blue = drawing(1).split()
    assert reported(tmp_path, {"recoloured.png": Image.merge("RGB", (blue, red, green))}) == []


def test_small_tiny_and_long_pictures_are_told_apart(reported, tmp_path):
    pictures = {
        "small.png": drawing(5, (300, 200)),
        "tiny.png": drawing(6, (140, 100)),
        "long.png": drawing(7, (4000, 300)),
    }
    lines = reported(tmp_path, pictures)
    assert len(lines) == 3
    assert lines[0] == (
        "smaller than the smallest size that is trained, and enlarged; send larger ones if you can:"
        " 'small.png' (300 x 200)"
    )
    assert "more than 2" in lines[1]
    assert "'tiny.png' (140 x 100, 2.2 times)" in lines[1]
    assert "'long.png' (4000 x 300, 30% kept)" in lines[2]


@pytest.mark.parametrize(("radius", "blurred"), [(0, False), (1, False), (4, True), (12, True)])
def test_a_blurred_picture_is_told_from_a_soft_one(radius, blurred, reported, tmp_path):
    lines = reported(tmp_path, {"a.png": drawing(9).filter(ImageFilter.GaussianBlur(radius))})
    assert lines == (
        ["blurred, which is learned too; leave out those that are meant to be sharp: 'a.png'"] if blurred else []
    )


def test_a_plain_or_tiny_picture_is_not_called_blurred(tmp_path):
    plain, dot = Image.linear_gradient("L").resize((600, 600)), Image.new("RGB", (2, 2))
    dot.putpixel((1, 1), (255, 0, 0))
    assert [look.steepness for look in looks(tmp_path, {"plain.png": plain, "dot.png": dot})] == [None, None]


def sky() -> Image.Image:
    return Image.linear_gradient("L").resize((1024, 1024)).point(lambda level: 80 + level // 2).convert("RGB")


def ring(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (1024, 1024), "white")
    ImageDraw.Draw(image).ellipse((512 - width, 512 - height, 512 + width, 512 + height), outline="goldenrod", width=12)
    return image


def thing(x: int, y: int, size: int, ground: Image.Image, colour: str = "black") -> Image.Image:
    image = ground.copy()
    ImageDraw.Draw(image).ellipse((x, y, x + size, y + size), colour)
    return image


PLACES = [(100, 150), (700, 200), (400, 480), (820, 800), (140, 760), (540, 110), (300, 300), (640, 640)]
SHAPES = [(80, 80), (50, 80), (80, 40), (40, 80), (80, 25), (65, 65)]
SUN = Image.radial_gradient("L").resize((1024, 1024)).point(lambda level: 90 + level // 2).convert("RGB")
WALL = Image.effect_noise((32, 32), 150).resize((1024, 1024)).convert("RGB")
SMALL = {
    "a thing in the sky": [thing(x, y, 60, sky()) for x, y in PLACES],
    "a speck in the evening": [thing(x, y, 12, sky().rotate(270)) for x, y in PLACES],
    "a speck in the sun": [thing(x, y, 12, SUN, "red") for x, y in PLACES],
    "a tiny thing on white": [thing(x, y, 12, Image.new("RGB", (1024, 1024), "white")) for x, y in PLACES],
    "a thing before a wall": [thing(x, y, 40, WALL) for x, y in PLACES],
    "rings": [ring(width, height) for width, height in SHAPES],
    "colours": [thing(480, 480, 60, sky(), colour) for colour in ("red", "blue", "green", "white")],
}


@pytest.mark.parametrize("kind", SMALL)
def test_small_things_in_other_places_shapes_and_colours_do_not_look_alike(kind, tmp_path):
    pictures = {f"{number}.jpg": image for number, image in enumerate(SMALL[kind])}
    lines = survey.report(looks(tmp_path, pictures), [512])
    assert [line for line in lines if "look alike" in line] == []
    assert survey.copies(looks(tmp_path, pictures)) == frozenset()


@pytest.mark.parametrize("kind", SMALL)
def test_a_copy_of_such_a_picture_is_found_all_the_same(kind, tmp_path):
    image = SMALL[kind][0]
    image.save(tmp_path / "copy.jpg", quality=90)
    again = Image.open(tmp_path / "copy.jpg")
    found = looks(tmp_path, {"a.png": image, "b.png": SMALL[kind][1], "again.png": again})
    assert survey.copies(found) == {"a.png", "again.png"}


@pytest.mark.parametrize("at", range(300, 324, 2))
def test_hard_edges_are_not_called_blurred_wherever_they_are(at, reported, tmp_path):
    image = Image.new("RGB", (1024, 1024), "white")
    ImageDraw.Draw(image).rectangle((at, 100, at + 200, 920), (20, 20, 60))
    assert reported(tmp_path, {"bars.png": image}) == []
    assert reported(tmp_path, {"turned.png": image.rotate(90)}) == []


BLANK = {
    "transparent.png": Image.new("RGBA", (300, 200), (200, 0, 0, 0)),
    "palette.gif": Image.new("P", (300, 200)),
    "one colour.jpg": Image.new("RGB", (300, 200), (121, 139, 87)),
    "nearly one.png": Image.effect_noise((300, 200), 90).point(lambda level: 120 + level // 40),
    "white on nothing.png": thing(100, 50, 80, Image.new("RGBA", (300, 200), (0, 0, 0, 0)), "white"),
}


def test_all_blank_pictures_are_refused_by_name_and_nearly_blank_ones_are_not(tmp_path):
    dot = Image.new("RGB", (300, 200), "white")
    dot.putpixel((150, 100), (200, 200, 200))
    with pytest.raises(ValueError, match="input_images: these pictures cannot be used") as error:
        looks(tmp_path, {**BLANK, "dot.png": dot, "a good one.png": drawing(1)})
    assert all(f"'{name}' is blank: it shows one colour only" in str(error.value) for name in BLANK)
    assert "dot.png" not in str(error.value)
    assert "good one" not in str(error.value)


@pytest.mark.parametrize("form", ["gif", "webp", "png"])
def test_an_animated_picture_says_which_of_its_frames_is_used(form, reported, tmp_path):
    frames = [Image.new("RGBA", (600, 500), (0, 0, 0, 0)), drawing(9).convert("RGBA"), drawing(8).convert("RGBA")]
    frames[0].save(tmp_path / f"a.{form}", save_all=True, append_images=frames[1:], duration=99, lossless=True)
    [look] = survey.look_at({"a": tmp_path / f"a.{form}"})
    assert survey.report([look] * 4, [256])[0] == (
        "animated, and only the first frame that is not blank is used: " + ", ".join(["'a' (frame 2 of 3)"] * 4)
    )
    for frame in frames[1:]:
        frame.paste((200, 0, 0, 255), (0, 0, 600, 500))
    frames[0].save(tmp_path / f"b.{form}", save_all=True, append_images=[frames[1]], duration=99, lossless=True)
    with pytest.raises(ValueError, match="'b' is blank: all of its 2 frames show one colour only"):
        survey.look_at({"b": tmp_path / f"b.{form}"})


def test_a_single_picture_is_counted_in_the_singular(tmp_path):
    assert survey.report(looks(tmp_path, {"a.png": drawing(1)}), [256]) == [
        "only 1 picture: 10 to 20 that differ teach more"
    ]


@pytest.mark.parametrize("name", ["dog6.zip", "backpack-nested.zip", "monster-toy.tar.gz", "red-cartoon-style.zip"])
def test_nothing_is_said_of_real_photographs_until_they_are_blurred_or_doubled(name, photographs, tmp_path):
    found, _ = photos.pair(tmp_path, archive.unpack(photographs / name, tmp_path))
    seen = survey.look_at({photo.name: photo.path for photo in found})
    assert survey.report(seen, [512, 768, 1024]) == []
    copy = Image.open(found[0].path).resize((512, 512))
    worse = looks(tmp_path, {"copy.jpg": copy, "soft.jpg": copy.filter(ImageFilter.GaussianBlur(5))})
    alike, blurred = survey.report([*seen, *worse], [512])
    assert alike.startswith(f"{found[0].name!r}, 'copy.jpg'")
    assert blurred.startswith("blurred, ")
    assert blurred.endswith("sharp: 'soft.jpg'")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_of_the_examples_no_more_is_said_than_that_some_are_alike(path, tmp_path):
    found, warnings = photos.pair(tmp_path, archive.unpack(path, tmp_path))
    lines = survey.report(survey.look_at({photo.name: photo.path for photo in found}), [64])
    assert warnings == []
    assert [line for line in lines if "look alike" not in line] == []
