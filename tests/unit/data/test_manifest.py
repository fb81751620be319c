"""A scan as a whole: what is trained, what is left out and why, and what a second scan reads again."""

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.base import storage
from simpletuner.base.errors import DataError
from simpletuner.config.datasets import ImageSet
from simpletuner.data.manifest import Manifest, count_new, rejection_counts, scan
from simpletuner.data.storages import LEDGER
from simpletuner.runs.layout import RunDirectory

Scanned = Callable[..., Manifest]
Save = Callable[..., Path]


def test_every_odd_file_has_its_reason_and_the_rest_is_trained(folder: Path, save: Save, scanned: Scanned) -> None:
    captioned = {"good.jpg": "a barn", "turned.jpg": "on its side", "cmyk.jpg": "printed", "clear.png": "clear"}
    save("good.jpg", (100, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.jpg", (100, 80), exif=exif)
    Image.new("CMYK", (80, 64)).save(folder / "cmyk.jpg")
    Image.new("RGBA", (80, 64), (0, 0, 0, 0)).save(folder / "clear.png")
    for name, caption in captioned.items():
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    whole = save("half.jpg", (640, 640)).read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.png").touch()
    (folder / "words.png").write_text("not a picture", encoding="utf-8")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    save("silent.png")
    save("latin1.png")
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    save("small.png", (40, 40))
    (folder / "small.txt").write_text("small", encoding="utf-8")
    (folder / "clip.mp4").touch()
    (folder / "orphan.txt").write_text("whose?", encoding="utf-8")

    found = scanned(caption_strategy="textfile", minimum_image_size=64)

    assert [sample.name for sample in found.samples] == ["clear.png", "cmyk.jpg", "good.jpg", "turned.jpg"]
    assert found.samples[3].width == 80
    assert found.samples[3].height == 100
    assert {(r.name, r.reason) for r in found.rejections} == {
        ("half.jpg", "truncated"),
        ("zero.png", "empty file"),
        ("words.png", "not an image"),
        ("clip.mp4", "not an image"),
        ("phone.heic", "HEIC needs a plug-in"),
        ("silent.png", "no caption"),
        ("latin1.png", "caption is not UTF-8"),
        ("small.png", "below minimum_image_size"),
    }
    assert found.summary()["rejected"]["not an image"] == 2
    assert json.loads(json.dumps(found.summary()))["pictures"] == 4
    said = "\n".join(found.notices)
    assert "1 of 4 images have transparency, which is composited on white (clear.png)" in said
    assert "1 caption files have no image (orphan.txt)" in said
    assert str(folder) not in json.dumps(found.summary())


def test_pictures_without_a_caption_are_counted_and_named_with_the_line_to_add(
    folder: Path, save: Save, scanned: Scanned
) -> None:
    for number in range(7):
        save(f"cat-{number}.png", (80, 80 + number))
    remedy = (
        "Write one caption file per image (cat-0.txt for cat-0.png), or one caption for all images: put the line "
        '"instance_prompt": "what they show", into the entry "photos" of the dataset file.'
    )
    with pytest.raises(DataError) as caught:
        scanned(caption_strategy="textfile")
    named = "cat-0.png, cat-1.png, cat-2.png, cat-3.png, cat-4.png, …"
    assert caught.value.problems[1].found == f"photos: 7 images have no caption and are left out ({named}). {remedy}"
    (folder / "cat-0.txt").write_text(" \n")
    for number in range(1, 7):
        (folder / f"cat-{number}.txt").write_text("a cat")
    found = scanned(caption_strategy="textfile")
    assert f"photos: 1 image has no caption and is left out (cat-0.png). {remedy}" in found.notices
    # As the message says.
    mended = scanned(caption_strategy="textfile", instance_prompt="what they show")
    assert len(mended.samples) == 7
    assert not mended.rejections


def test_two_pictures_with_one_stem_share_a_caption_and_nothing_else(
    folder: Path, save: Save, scanned: Scanned
) -> None:
    save("a.png", color="red")
    save("a.webp", color="blue")
    (folder / "a.txt").write_text("one\ntwo", encoding="utf-8")
    found = scanned(caption_strategy="textfile")
    assert [sample.captions for sample in found.samples] == [("one", "two")] * 2
    assert len({sample.content for sample in found.samples}) == 2


def test_a_set_that_ends_empty_shows_the_counts(folder: Path, scanned: Scanned) -> None:
    with pytest.raises(DataError, match="contains no images"):
        scanned()
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (folder / name).touch()
    (folder / "e.pdf").touch()
    with pytest.raises(DataError, match=r"4 empty file \(a.png, b.png, c.png, …\); 1 not an image \(e.pdf\)"):
        scanned()


def test_a_missing_folder_is_an_error(folder: Path, scanned: Scanned) -> None:
    folder.rmdir()
    with pytest.raises(DataError, match="no such folder: expected a folder of images"):
        scanned()


def test_a_second_scan_reads_only_what_changed(save: Save, make_set: Callable[..., ImageSet]) -> None:
    """What is known is reported at once, before anything is read."""
    known: list[int] = []

    def again() -> Manifest:
        told: list[int] = []
        found = scan(make_set(), seed=1, workers=2, report=lambda done, _total: told.append(done))
        known.append(told[0])
        return found

    for name in ("a.png", "b.png", "c.png"):
        save(name)
    save("bad.png").write_bytes(b"bad")
    first = again()
    assert again() == first
    assert known == [0, 4]
    save("b.png", color="red")
    save("d.png")
    assert again().fingerprint != first.fingerprint
    assert known == [0, 4, 3]
    # A file replaced by one of the same size and date is noticed, by the time its status changed.
    path = save("c.png")
    os.utime(path, ns=(0, 0))
    again()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(0, 0))
    assert rejection_counts(again().rejections) == {"not an image": 2}
    assert known == [0, 4, 3, 4, 4]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 0, "files": {"a.png": {}}}'])
def test_an_index_that_is_no_use_is_made_again(
    save: Save, scanned: Scanned, make_set: Callable[..., ImageSet], text: str
) -> None:
    save("a.png")
    first = scanned()
    (path,) = Path(make_set().cache_dir_vae).glob("scan-*.json")
    whole = path.read_bytes()
    path.write_text(text, encoding="utf-8")
    assert scanned() == first
    assert path.read_bytes() == whole


def test_what_an_older_version_found_is_looked_at_again(
    folder: Path, save: Save, make_set: Callable[..., ImageSet]
) -> None:
    (folder / "b.png").write_bytes(b"no image")
    save("a.png")
    image_set = make_set()
    scan(image_set, seed=1, workers=2)
    (index,) = Path(image_set.cache_dir_vae).glob("scan-*.json")
    assert count_new(image_set) == 0
    index.write_text(index.read_text().replace('"version": 2', '"version": 1'))
    assert count_new(image_set) == 2


def test_a_changed_caption_is_noticed(folder: Path, save: Save, scanned: Scanned) -> None:
    save("a.png")
    (folder / "a.txt").write_text("before", encoding="utf-8")
    first = scanned(caption_strategy="textfile")
    (folder / "a.txt").write_text("after", encoding="utf-8")
    second = scanned(caption_strategy="textfile")
    assert second.samples[0].captions == ("after",)
    assert second.fingerprint != first.fingerprint


def test_the_fingerprint_does_not_know_where_the_files_lie(
    tmp_path: Path, folder: Path, save: Save, scanned: Scanned
) -> None:
    save("a.png")
    first = scanned()
    folder.rename(tmp_path / "moved")
    moved = scanned(instance_data_dir=str(tmp_path / "moved"))
    assert moved.fingerprint == first.fingerprint
    assert scanned(instance_data_dir=str(tmp_path / "moved"), repeats=1).fingerprint != first.fingerprint


def test_max_num_samples_is_a_draw_that_a_new_picture_hardly_disturbs(save: Save, scanned: Scanned) -> None:
    for number in range(20):
        save(f"{number:02}.png", color=f"rgb({number}, 0, 0)")
    first = scanned(max_num_samples=8)
    chosen = {sample.name for sample in first.samples}
    assert len(chosen) == 8
    assert rejection_counts(first.rejections) == {"beyond max_num_samples": 12}
    assert {sample.name for sample in scanned(max_num_samples=8, seed=1).samples} != chosen
    save("new.png", color="white")
    assert len(chosen - {sample.name for sample in scanned(max_num_samples=8).samples}) <= 1
    assert len(scanned(max_num_samples=80).samples) == 21


def test_buckets_hold_every_sample_once(save: Save, scanned: Scanned) -> None:
    for name, size in {"a": (64, 64), "b": (128, 64), "c": (65, 64), "d": (64, 128)}.items():
        save(f"{name}.png", size)
    found = scanned()
    assert found.buckets == {(48, 80): [3], (64, 64): [0, 2], (80, 48): [1]}


def test_what_a_person_should_know_is_said_once(save: Save, scanned: Scanned) -> None:
    save("large.png", (300, 200))
    save("small.png", (32, 32))
    said = scanned(crop=True, maximum_image_size=64, caption_strategy="textfile", instance_prompt="x").notices
    assert said == (
        "photos: 1 of 2 images are enlarged to reach `resolution`, by up to ×2.00 (small.png).",
        "photos: 1 of 2 images are above maximum_image_size, which has no effect: 64² pixels would not cover "
        "their training size (large.png).",
        "photos: 2 of 2 images have no caption of their own and use instance_prompt, 'x' (large.png, small.png).",
    )


def test_progress_counts_to_the_end(save: Save, make_set: Callable[..., ImageSet]) -> None:
    for name in ("a.png", "b.png", "c.png"):
        save(name)
    told: list[tuple[int, int]] = []
    scan(make_set(), seed=1, workers=2, report=lambda done, total: told.append((done, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_a_picture_that_cannot_be_read_is_rejected(
    save: Save, scanned: Scanned, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("a.png")
    locked = save("locked.png")
    really = os.open

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:  # root reads everything, so the refusal is made here
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return really(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "open", open_)
        assert rejection_counts(scanned().rejections) == {"unreadable": 1}
    assert scanned().rejections == (), "tried again at the next scan"


def test_a_caption_beside_a_txt_is_told_and_not_read(folder: Path, save: Save, scanned: Scanned) -> None:
    for name, texts in {"a": (".txt", ".caption"), "b": (".caption",)}.items():
        save(f"{name}.png", color="teal" if name == "a" else "navy")
        for suffix in texts:
            (folder / f"{name}{suffix}").write_text(f"{name} from {suffix}")
    manifest = scanned(caption_strategy="textfile")
    assert [sample.captions for sample in manifest.samples] == [("a from .txt",), ("b from .caption",)]
    assert manifest.rejections == ()
    assert manifest.notices == ("photos: 1 .caption files are not read, since .txt files replace them (a.caption).",)


def test_what_is_no_regular_file_is_left_out_by_name(folder: Path, save: Save, scanned: Scanned) -> None:
    """A reader of the pipe would wait for ever, one of the device would never end, and the sparse file is 5 GB."""
    save("a.png")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "a.txt")
    (folder / "zero.png").symlink_to("/dev/zero")
    os.mknod(folder / "socket.png", stat.S_IFSOCK | 0o600)
    with (folder / "sparse.png").open("wb") as file:
        file.truncate(5_000_000_000)
    manifest = scanned(caption_strategy="filename")
    assert [sample.name for sample in manifest.samples] == ["a.png"]
    assert [(each.name, each.reason, each.detail) for each in manifest.rejections] == [
        ("a.txt", "not a regular file", "a named pipe"),
        ("pipe.png", "not a regular file", "a named pipe"),
        ("socket.png", "not a regular file", "a socket"),
        ("sparse.png", "too large", "5.0 GB; the limit is 1.4 GB; shrink it"),
        ("zero.png", "not a regular file", "a device"),
    ]


def test_runs_and_caches_of_ours_are_passed_over_by_name(folder: Path, save: Save, scanned: Scanned) -> None:
    save("a.png")
    run = RunDirectory(folder / "out")
    run.create()
    run.events.touch()
    save("out/validation/step-000001/x.png")
    cache = folder / "vae"
    assert scanned(cache_dir_vae=str(cache)).samples
    text = folder / "text"
    for name in (LEDGER, f"ab/{'ab' * 32}.safetensors"):
        (text / name).parent.mkdir(parents=True, exist_ok=True)
        (text / name).touch()
    manifest = scanned(cache_dir_vae=str(cache))
    assert [sample.name for sample in manifest.samples] == ["a.png"]
    assert {(each.name, each.reason) for each in manifest.rejections} == {
        ("out", "a run directory"),
        ("text", "a cache of latents or text"),
        ("vae", "a cache of latents or text"),
    }
    for ours in (run.root, cache, text):
        with pytest.raises(DataError, match="of this program: expected a folder of images") as caught:
            scanned(instance_data_dir=str(ours))
        assert caught.value.exit_code == 3
    assert scanned(instance_data_dir=str(run.validations)).samples, "a folder that is named is meant"


def test_a_record_makes_the_same_manifest_without_a_file(folder: Path, save: Save, scanned: Scanned) -> None:
    save("wide.png", (128, 64))
    save("deep/tall.png", (64, 128))
    save("small.png", (20, 20))
    Image.new("RGBA", (80, 64), (0, 0, 0, 0)).save(folder / "clear.png")
    found = scanned(minimum_image_size=64, crop_style="random")
    assert len(found.samples) == 3
    assert found.rejections
    assert found.notices
    text = json.dumps(found.record())
    shutil.rmtree(folder)
    other = Manifest.of_record(found.image_set, json.loads(text))
    assert other == found
    assert (other.fingerprint, other.buckets, other.summary()) == (found.fingerprint, found.buckets, found.summary())


def test_shuffled_captions_are_counted(scanned: Scanned, save: Callable[..., Path]) -> None:
    for name in ("a", "b"):
        save(f"{name}.png").with_suffix(".txt").write_text("red, big\n")
    keys = {"caption_strategy": "textfile", "caption_shuffle": {"enable": True, "count": 20}}
    found = scanned(**keys)
    assert found.notices[-1] == (
        "photos: with caption_shuffle, 2 images have 2 different captions, each of which is encoded and cached."
    )
    assert {len(sample.captions) for sample in found.samples} == {20}
    assert scanned(**keys).fingerprint == found.fingerprint != scanned(seed=1, **keys).fingerprint


def test_filtered_captions_leave_a_reason(make_set: Callable[..., ImageSet], save: Callable[..., Path]) -> None:
    for name in ("a cat, blurry", "blurry"):
        save(f"{name}.png")
    found = scan(make_set(), seed=1, workers=1, caption_filter=["blurry"])
    assert [sample.captions for sample in found.samples] == [("a cat",)]
    assert [each.reason for each in found.rejections] == ["nothing left by caption_filter_list"]


def test_an_offset_of_the_noise_levels_changes_the_fingerprint_and_a_window_does_not(
    scanned: Scanned, save: Callable[..., Path]
) -> None:
    save("a.png")
    plain = scanned().fingerprint
    assert scanned(timestep_sampling_offset=0.0, end_step=5).fingerprint == plain
    assert scanned(timestep_sampling_offset=0.5).fingerprint != plain
