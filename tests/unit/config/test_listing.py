from collections.abc import Callable
from typing import Any

import pytest

from simpletuner.config.datasets import CaptionShuffle

WHERE = "config/multidatabackend.json, cats: "


@pytest.fixture
def problem_of_set(place: Any) -> Callable[..., str]:
    """The only problem of the image set with these keys changed."""

    def only_problem(**changes: object) -> str:
        place.datasets[0] |= changes
        (problem,) = place.problems()
        return problem.removeprefix(WHERE)

    return only_problem


@pytest.fixture
def notices_of_set(place: Any) -> Callable[..., list[str]]:
    def notices(**changes: object) -> list[str]:
        place.datasets[0] |= changes
        return [notice.removeprefix(WHERE) for notice in place.load().notices]

    return notices


def test_an_image_set_has_the_documented_defaults(place: Any) -> None:
    place.datasets[0] = {"id": "cats", "instance_data_dir": "datasets/cats"}
    (image_set,) = place.load().datasets.train_sets
    assert image_set.model_dump() == {
        "id": "cats",
        "type": "local",
        "dataset_type": "image",
        "instance_data_dir": str(place.folder / "datasets/cats"),
        "repeats": 0,
        "probability": 1.0,
        "disabled": False,
        "max_num_samples": None,
        "train_batch_size": None,
        "cache_dir_vae": str(place.folder / "cache/vae/cats"),
        "resolution": 1024.0,
        "resolution_type": "pixel_area",
        "crop": False,
        "crop_aspect": "square",
        "crop_aspect_buckets": None,
        "crop_style": "random",
        "minimum_image_size": None,
        "maximum_image_size": None,
        "target_downsample_size": None,
        "minimum_aspect_ratio": None,
        "maximum_aspect_ratio": None,
        "max_upscale_threshold": None,
        "caption_strategy": "filename",
        "instance_prompt": None,
        "prepend_instance_prompt": False,
        "only_instance_prompt": False,
        "disable_multiline_split": False,
        "conditioning_data": (),
        "conditioning_required": False,
        "mask_source": "set",
        "is_regularisation_data": False,
        "class_prompt": None,
        "loss_weight": 1.0,
        "timestep_sampling_offset": 0.0,
        "caption_shuffle": None,
        "start_step": 0,
        "end_step": None,
        "start_epoch": 0,
        "end_epoch": None,
        "metadata_backend": "discovery",
        "text_embeds": None,
    }


def test_other_spellings_mean_the_same(place: Any) -> None:
    place.datasets[0] |= {
        "crop": True,
        "crop_style": "centre",
        "caption_strategy": "instance_prompt",
        "instance_prompt": "a cat",
    }
    (image_set,) = place.load().datasets.train_sets
    assert (image_set.crop_style, image_set.caption_strategy) == ("center", "instanceprompt")


def test_paths_know_the_run_and_the_set(place: Any) -> None:
    place.config["output_dir"] = "runs/one"
    place.datasets[0]["cache_dir_vae"] = "{output_dir}/{model_family}/{id}/{env:DISK}"
    (image_set,) = place.load(environ={"DISK": "big"}).datasets.train_sets
    assert image_set.cache_dir_vae == str(place.folder / "runs/one/flux2/cats/big")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": -1}, "resolution = -1: expected a number above 0."),
        ({"resolution": "1024"}, "resolution = '1024': expected a number above 0. Write it without quotes."),
        ({"repeats": 1.5}, "repeats = 1.5: expected a whole number of at least 0."),
        ({"crop": "yes"}, "crop = 'yes': expected true or false."),
        ({"crop_stile": "center"}, "crop_stile: no such key of an image set. Did you mean crop_style?"),
        ({"cache_dir": "x"}, "cache_dir: no such key of an image set. Did you mean cache_dir_vae?"),
        ({"caption_strategy": "text"}, "caption_strategy = 'text': expected textfile, filename or instanceprompt."),
        ({"dataset_type": "video"}, "dataset_type = 'video': expected image, eval, conditioning or text_embeds."),
        (
            {"minimum_image_size": 900, "maximum_image_size": 800},
            "minimum_image_size = 900: expected at most maximum_image_size, 800.",
        ),
        (
            {"target_downsample_size": 900, "maximum_image_size": 800},
            "target_downsample_size = 900: expected at most maximum_image_size, 800.",
        ),
        (
            {"minimum_aspect_ratio": 2, "maximum_aspect_ratio": 1},
            "minimum_aspect_ratio = 2: expected at most maximum_aspect_ratio, 1.",
        ),
        ({"start_step": 5, "end_step": 4}, "end_step = 4: expected at least start_step, 5."),
        ({"start_epoch": 5, "end_epoch": 4}, "end_epoch = 4: expected at least start_epoch, 5."),
        (
            {"resolution": 1024, "resolution_type": "area"},
            "resolution = 1024 with resolution_type = 'area': expected at most 64, since it counts areas of "
            "1024x1024 pixels. For an edge in pixels set resolution_type to pixel_area.",
        ),
        (
            {"resolution": 1},
            "resolution = 1 with resolution_type = 'pixel_area': expected a whole number of pixels, at least 16. "
            "For areas of 1024x1024 pixels set resolution_type to area.",
        ),
        (
            {"crop": True, "crop_aspect": "closest"},
            "crop_aspect = 'closest' without crop_aspect_buckets: expected a list of ratios (width / height) such as "
            "[0.75, 1.0, 1.33].",
        ),
        (
            {"caption_strategy": "instanceprompt"},
            "caption_strategy = 'instanceprompt' without instance_prompt: expected the caption as instance_prompt.",
        ),
        (
            {"prepend_instance_prompt": True},
            "prepend_instance_prompt = true without instance_prompt: expected the caption as instance_prompt.",
        ),
        ({"crop_aspect_buckets": []}, "crop_aspect_buckets = []: expected a list of ratios such as [1.0, 1.5]."),
        (
            {"cache_dir_vae": "{di}"},
            "cache_dir_vae = '{di}': placeholder {di} is not one of {model_family}, {output_dir}, {id} or {env:NAME}.",
        ),
        (
            {"cache_dir_vae": "$SCRATCH/vae"},
            "cache_dir_vae = '$SCRATCH/vae': $SCRATCH is not replaced here: expected a path such as "
            "'{env:SCRATCH}/vae'.",
        ),
        (
            {"instance_data_dir": "datasets/cats\r"},
            "instance_data_dir = 'datasets/cats\\r': expected text without control characters. "
            "Save the script or file it comes from with Unix line endings.",
        ),
        ({"instance_prompt": "\u200b"}, "instance_prompt = '\\u200b': expected a caption, as text."),
        ({"instance_prompt": "ab" * 40_000}, "instance_prompt has 80000 bytes: expected at most 65536."),
        (
            {"cache_dir_vae": "datasets/cats"},
            "instance_data_dir is also cache_dir_vae of cats: expected a folder for each: "
            "files written there would be read as images.",
        ),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_each_mistake_has_its_answer(
    problem_of_set: Callable[..., str], changes: dict[str, object], message: str
) -> None:
    assert problem_of_set(**changes) == message


@pytest.mark.parametrize(
    ("changes", "work"),
    [
        ({"type": "aws", "aws_bucket_name": "x"}, "S3 stores"),
        ({"type": "huggingface", "dataset_name": "x"}, "Hub datasets"),
        ({"caption_strategy": "parquet"}, "captions from tables"),
        ({"crop": True, "crop_style": "face"}, "crops that follow a face"),
        ({"vae_cache_ondemand": True}, "caches filled while training"),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_what_is_not_built_says_so(problem_of_set: Callable[..., str], changes: dict[str, object], work: str) -> None:
    assert f"not built yet: {work}" in problem_of_set(**changes)


def test_a_key_to_come_that_is_off_passes(place: Any) -> None:
    place.datasets[0] |= {
        "vae_cache_ondemand": "false",
        "conditioning_data": None,
    }
    assert place.load().notices == ()


def test_a_missing_folder_is_named_with_its_neighbor(place: Any, problem_of_set: Callable[..., str]) -> None:
    assert problem_of_set(instance_data_dir="datasets/cat") == (
        f"instance_data_dir = 'datasets/cat': no such folder. Did you mean {place.folder / 'datasets/cats'}?"
    )
    assert problem_of_set(instance_data_dir="pictures/zebras") == (
        f"instance_data_dir = 'pictures/zebras': no such folder. The path is relative to {place.folder / 'pictures'}."
    )
    place.write("a.png", "")
    assert problem_of_set(instance_data_dir="a.png").endswith("this is a file: expected a folder of images.")


def test_a_disabled_set_needs_no_folder(place: Any) -> None:
    place.datasets.append({"id": "dogs", "instance_data_dir": "nowhere", "disabled": True})
    assert [image_set.id for image_set in place.load().datasets.train_sets] == ["cats"]


def test_required_keys_are_asked_for(place: Any) -> None:
    place.datasets[0] = {}
    assert place.problems() == [
        "config/multidatabackend.json, entry 1: id is missing: expected text.",
        "config/multidatabackend.json, entry 1: instance_data_dir is missing: expected a path.",
    ]


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ({}, "config/multidatabackend.json: {}: expected a list of objects, in [ ]."),
        ([3], "config/multidatabackend.json, entry 1: 3: expected an object, in { }."),
        ([], "config/multidatabackend.json: no images to train on: expected an enabled image set."),
    ],
    ids=["object", "number", "empty"],
)
def test_the_file_is_a_list_of_objects(place: Any, datasets: object, message: str) -> None:
    place.datasets = datasets
    assert place.problems() == [message]


@pytest.mark.parametrize("name", ["a/b", "..", "cats\n", "x" * 201])
def test_an_id_must_do_as_a_folders_name(place: Any, name: str) -> None:
    place.datasets[0]["id"] = name
    assert any(
        "it becomes a folder's name" in problem or "control characters" in problem for problem in place.problems()
    )
    place.datasets[0]["id"], place.datasets[1]["id"] = "चित्र (512)", name
    assert any(
        "it becomes a folder's name" in problem or "control characters" in problem for problem in place.problems()
    )


def test_the_run_does_not_lie_among_its_pictures(place: Any) -> None:
    place.config["output_dir"] = "datasets/cats"
    (problem,) = place.problems()
    assert "is also output_dir: expected a folder for each" in problem


def test_an_id_is_given_once(place: Any) -> None:
    place.datasets.append(dict(place.datasets[0]))
    assert place.problems() == [
        "config/multidatabackend.json: 2 entries have the id 'cats': expected a different id for each."
    ]


def test_without_a_text_store_one_is_made_under_the_run(place: Any) -> None:
    del place.datasets[1]
    datasets = place.load().datasets
    (store,) = datasets.text_stores
    assert store.default
    assert store.cache_dir == str(place.folder / "output/flux2/cache/text")
    assert datasets.text_store_of(datasets.train_sets[0]) == store == datasets.default_text_store


def test_exactly_one_text_store_is_the_default(place: Any) -> None:
    place.datasets[1]["default"] = False
    loaded = place.load()
    assert loaded.datasets.default_text_store.id == "text"
    assert loaded.notices == ("config/multidatabackend.json: text is the only text store, so it is the default.",)
    place.datasets.append(place.datasets[1] | {"id": "more"})
    assert place.problems() == [
        "config/multidatabackend.json: no text store is marked as default: expected default = true for exactly one."
    ]
    place.datasets[1]["default"] = place.datasets[2]["default"] = True
    assert place.problems() == [
        "config/multidatabackend.json: text and more are marked as default: expected default = true for exactly one."
    ]


def test_a_set_may_name_its_text_store(place: Any) -> None:
    place.datasets.append({"id": "more", "dataset_type": "text_embeds", "cache_dir": "elsewhere"})
    place.datasets[0]["text_embeds"] = "more"
    datasets = place.load().datasets
    assert datasets.text_store_of(datasets.train_sets[0]).cache_dir == str(place.folder / "elsewhere")
    place.datasets[0]["text_embeds"] = "moer"
    assert place.problems() == [f"{WHERE}text_embeds = 'moer': expected the id of a text store: text or more."]


def test_held_out_sets_stand_apart(place: Any) -> None:
    place.datasets.append({"id": "held", "dataset_type": "eval", "instance_data_dir": "datasets/cats"})
    loaded = place.load("--eval_dataset_id=held")
    assert [held.id for held in loaded.datasets.eval_sets] == ["held"]
    assert "held has the same images as cats" in loaded.notices[0]
    assert place.problems("--eval_dataset_id=hold") == [
        "--eval_dataset_id = 'hold': expected an enabled eval set: held."
    ]


@pytest.mark.parametrize(
    ("changes", "notice"),
    [
        ({"crop_style": "center"}, "crop_style has no effect: crop is false."),
        ({"target_downsample_size": 512}, "target_downsample_size has no effect: maximum_image_size is not set."),
        (
            {"caption_strategy": "filename", "disable_multiline_split": True},
            "disable_multiline_split has no effect: captions do not come from .txt files.",
        ),
        (
            {"crop": True, "crop_aspect_buckets": [1.0]},
            "crop_aspect_buckets has no effect: crop_aspect is neither closest nor random.",
        ),
        ({"resolution": 1000}, "resolution = 1000 is not divisible by 16: sides are rounded to 992."),
    ],
    ids=lambda value: repr(value) if isinstance(value, dict) else "",
)
def test_keys_without_effect_are_named(
    notices_of_set: Callable[..., list[str]], changes: dict[str, object], notice: str
) -> None:
    assert notices_of_set(**changes) == [notice]


def test_windows_shuffles_and_offsets_are_read(place: Any) -> None:
    place.datasets[0] |= {
        "start_step": 0,
        "end_step": 10,
        "timestep_sampling_offset": -0.5,
        "caption_shuffle": {"enable": True, "count": 3, "split_on": "comma", "position_start": 1},
    }
    loaded = place.load()
    (own,) = loaded.datasets.train_sets
    assert own.windows == {"step": (1, 10), "epoch": (1, None)}
    assert own.caption_shuffle == CaptionShuffle(enable=True, count=3, position_start=1)
    assert loaded.notices == ()


def test_a_fault_of_a_shuffle_is_named_by_its_key(problem_of_set: Callable[..., str]) -> None:
    assert problem_of_set(caption_shuffle={"enable": True, "count": 0}) == (
        "caption_shuffle: count = 0: expected a whole number of at least 1."
    )
    assert problem_of_set(caption_shuffle={"cout": 3}) == (
        "caption_shuffle: cout: no such key of caption_shuffle. Did you mean count?"
    )
    assert problem_of_set(caption_shuffle=3) == (
        'caption_shuffle = 3: expected an object such as {"enable": true, "count": 3, "split_on": ","}.'
    )


def test_an_offset_that_no_density_uses_is_said(place: Any) -> None:
    place.datasets[0]["timestep_sampling_offset"] = 1.0
    assert place.load().notices == ()
    place.config["flow_use_uniform_schedule"] = True
    assert place.load().notices == ("cats: timestep_sampling_offset has no effect: another distribution is used.",)


def test_texts_to_filter_come_from_a_list_or_a_file(place: Any) -> None:
    for value in (["a photo of", "low quality"], "filters.txt", "filters.json"):
        place.write("filters.txt", "a photo of \n\n low quality\n")
        place.write("filters.json", ["a photo of", "low quality"])
        place.datasets[1]["caption_filter_list"] = value
        datasets = place.load().datasets
        assert datasets.caption_filter_of(datasets.train_sets[0]) == ("a photo of", "low quality")
    place.datasets[1]["caption_filter_list"] = None
    assert place.load().datasets.caption_filter_of(datasets.train_sets[0]) == ()


def test_filters_of_simpletuner_that_mean_something_else_here(place: Any) -> None:
    place.datasets[1]["caption_filter_list"] = ["this .* has a"]
    (notice,) = place.load().notices
    assert "'this .* has a' are removed literally: these are texts, not regular expressions." in notice
    place.datasets[1]["caption_filter_list"] = ["s/this/that/"]
    (problem,) = place.problems()
    assert "caption_filter_list: 's/this/that/': expected texts to remove." in problem
    place.datasets[1]["caption_filter_list"] = "nowhere.txt"
    (problem,) = place.problems()
    assert problem.endswith("caption_filter_list = 'nowhere.txt': no such file.")
