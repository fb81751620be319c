"""What `multidatabackend.json` lists: the picture sets, and the stores for text caches."""

from typing import Annotated, Literal

from annotated_types import MinLen
from pydantic import BeforeValidator

from simpletuner.config.options.kinds import (
    Count,
    NotNegative,
    PathText,
    Positive,
    Says,
    Slice,
    Text,
    UnitInterval,
    Whole,
    list_as_tuple,
)


def _centre(value: object) -> object:
    return "center" if value == "centre" else value


def _instanceprompt(value: object) -> object:
    return "instanceprompt" if value == "instance_prompt" else value


class ImageSet(Slice):
    """A set of pictures."""

    id: Text
    """A unique, stable name that can be a folder's."""

    type: Literal["local"] = "local"
    """Where the pictures lie: `local` is a folder on this machine."""

    dataset_type: Literal["image", "eval"] = "image"
    """`image` sets are trained; `eval` sets are held out, and only their loss is measured."""

    instance_data_dir: PathText
    """The folder of pictures, searched with its subfolders; links are followed once."""

    repeats: Whole = 0
    """EXTRA passes: an epoch sees each picture repeats+1 times."""

    probability: UnitInterval = 1.0
    """Share of the set's visits that an epoch includes, a fresh choice each epoch."""

    disabled: bool = False
    """Leave the set out."""

    max_num_samples: Count | None = None
    """Use at most so many pictures."""

    train_batch_size: Count | None = None
    """Pictures in one forward pass; by default the run's `train_batch_size`."""

    cache_dir_vae: PathText = "cache/vae/{id}"
    """Where the set's latents are kept."""

    resolution: Positive = 1024.0
    """Size to train at, in the unit of `resolution_type`."""

    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area"
    """`pixel`: the shorter edge in pixels; `area`: in units of 1024² pixels; `pixel_area`: an edge in pixels
    that stands for its square."""

    crop: bool = False
    """Crop to the shape of `crop_aspect`. Without it the shape is kept and only a few pixels are lost."""

    crop_aspect: Literal["square", "preserve", "closest", "random"] = "square"
    """Shape of the crop: `square`, the picture's own, the closest of `crop_aspect_buckets`, or a random one
    of them."""

    crop_aspect_buckets: (
        Annotated[
            tuple[Positive, ...],
            MinLen(1),
            BeforeValidator(list_as_tuple),
            Says("a list of ratios such as [1.0, 1.5]"),
        ]
        | None
    ) = None
    """Shapes for `closest` and `random`, as width / height."""

    crop_style: Annotated[Literal["center", "corner", "random"], BeforeValidator(_centre)] = "random"
    """Which part is kept: `center` (also `centre`), `corner` (upper left) or `random`."""

    minimum_image_size: Positive | None = None
    """Smaller pictures are left out, counted and named. Same unit as `resolution`."""

    maximum_image_size: Positive | None = None
    """Larger pictures are brought towards `target_downsample_size` before the crop, never below what the crop
    must cover. Same unit as `resolution`."""

    target_downsample_size: Positive | None = None
    """What a picture above `maximum_image_size` is brought to; by default that maximum."""

    minimum_aspect_ratio: Positive | None = None
    """Narrower pictures (width / height) are left out."""

    maximum_aspect_ratio: Positive | None = None
    """Wider pictures (width / height) are left out."""

    max_upscale_threshold: NotNegative | None = None
    """Pictures that would have to grow by more than this share are left out: 0.25 allows a quarter."""

    caption_strategy: Annotated[Literal["textfile", "filename", "instanceprompt"], BeforeValidator(_instanceprompt)] = (
        "filename"
    )
    """Where captions come from: a `.txt` file beside each picture (else a `.caption`), the picture's own name, or
    `instance_prompt` for all (also written `instance_prompt`)."""

    instance_prompt: Text | None = None
    """The caption of every picture with `instanceprompt`; also what `prepend_instance_prompt` puts first."""

    prepend_instance_prompt: bool = False
    """Put `instance_prompt` before each caption."""

    only_instance_prompt: bool = False
    """Use `instance_prompt` and nothing else, whatever the strategy."""

    disable_multiline_split: bool = False
    """Take a whole `.txt` as one caption. Otherwise each line is a caption, one drawn at each visit."""

    metadata_backend: Literal["discovery"] = "discovery"
    """How pictures are found: `discovery` looks into the folder."""

    text_embeds: Text | None = None
    """The id of the text store for this set's captions; by default the default store."""


class TextStore(Slice):
    """A store for text caches."""

    id: Text
    """A unique, stable name that can be a folder's."""

    type: Literal["local"] = "local"
    """Where the store lies: `local` is a folder on this machine."""

    dataset_type: Literal["text_embeds"] = "text_embeds"
    """What makes an entry a text store."""

    default: bool = False
    """The store of every set that names none. Exactly one store is the default."""

    cache_dir: PathText = "cache/text"
    """The folder."""

    write_batch_size: Count | None = None
    """Cache files written per flush; by default the run's `write_batch_size`."""


class Datasets(Slice):
    """The enabled sets, and all text stores, exactly one of which is the default."""

    train_sets: tuple[ImageSet, ...]
    """Sets that are trained, as listed."""

    eval_sets: tuple[ImageSet, ...]
    """Held-out sets, as listed."""

    text_stores: tuple[TextStore, ...]
    """Stores for text caches; exactly one is the default."""

    def text_store_of(self, image_set: ImageSet) -> TextStore:
        """The store that keeps the captions of `image_set`."""
        return next(
            store
            for store in self.text_stores
            if (store.default if image_set.text_embeds is None else store.id == image_set.text_embeds)
        )

    @property
    def default_text_store(self) -> TextStore:
        """The store for text that belongs to no set: validation prompts and the empty caption."""
        return next(store for store in self.text_stores if store.default)
