"""What `multidatabackend.json` lists: the picture sets, and the stores for text caches."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, MaxLen, MinLen
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


def _reads(**others: str) -> BeforeValidator:
    """Other words for a value."""
    return BeforeValidator(lambda value: others.get(value, value) if isinstance(value, str) else value)


def _one_as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else list_as_tuple(value)


Windows = dict[str, tuple[int, int | None]]
"""The first and last "step" and "epoch" of a set, counted from 1; None where there is no last."""

WHOLE_RUN: Windows = {"step": (1, None), "epoch": (1, None)}
"""Of a set without a window."""

MOST_REFERENCES = 10
"""Reference images of a sample."""


class PictureSet(Slice):
    """A folder of pictures, and how they are resized and cropped."""

    id: Text
    """A unique, stable name that can be a folder's."""

    type: Literal["local"] = "local"
    """Where the pictures lie: `local` is a folder on this machine."""

    instance_data_dir: PathText
    """The folder of pictures, searched with its subfolders; links are followed once."""

    disabled: bool = False
    """Leave the set out."""

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

    crop_style: Annotated[Literal["center", "corner", "random"], _reads(centre="center")] = "random"
    """Which part is kept: `center` (also `centre`), `corner` (upper left) or `random`."""

    maximum_image_size: Positive | None = None
    """Larger pictures are brought toward `target_downsample_size` before the crop, never below what the crop
    must cover. Same unit as `resolution`."""

    target_downsample_size: Positive | None = None
    """What a picture above `maximum_image_size` is brought to; by default that maximum."""

    minimum_image_size: Positive | None = None
    """Smaller pictures are left out, counted and named. Same unit as `resolution`."""

    minimum_aspect_ratio: Positive | None = None
    """Narrower pictures (width / height) are left out."""

    maximum_aspect_ratio: Positive | None = None
    """Wider pictures (width / height) are left out."""

    max_upscale_threshold: NotNegative | None = None
    """Pictures that would have to grow by more than this share are left out: 0.25 allows a quarter."""


class ConditioningSet(PictureSet):
    """A set of reference images or masks, paired with the images of the sets that name it."""

    dataset_type: Literal["conditioning"]
    """What makes an entry a conditioning set."""

    conditioning_type: Literal["reference_strict", "reference_loose", "mask", "segmentation"]
    """`reference_strict`: references with the crop of their image; `reference_loose`: references of any shape, with the
    set's own `resolution` and `crop`; `mask`: weights of the loss, from 0 (black) to 1 (white); `segmentation`: masks
    in which every gray above 0 counts as 1."""

    @property
    def is_reference(self) -> bool:
        """Whether the set holds references, and not masks."""
        return self.conditioning_type in ("reference_strict", "reference_loose")


class CaptionShuffle(Slice):
    """How the parts of a caption are shuffled."""

    enable: bool = False
    """Shuffle."""

    count: Count = 1
    """Shuffled variants of each caption; one is drawn at each visit."""

    seed: Whole | None = None
    """Seed of the variants; by default the run's."""

    split_on: Annotated[Text, _reads(comma=",", space=" ", period=".")] = ","
    """What separates the parts: a text, or `comma`, `space` or `period`."""

    position_start: Whole = 0
    """Parts at the beginning that stay where they are."""

    include_original: bool = False
    """Also keep the caption as it was written."""


class ImageSet(PictureSet):
    """A set of images to train on, or to measure the loss on."""

    dataset_type: Literal["image", "eval"] = "image"
    """`image` sets are trained; `eval` sets are held out, and only their loss is measured."""

    repeats: Whole = 0
    """EXTRA passes: an epoch sees each picture repeats+1 times."""

    probability: UnitInterval = 1.0
    """Share of the set's visits that an epoch includes, a fresh choice each epoch."""

    max_num_samples: Count | None = None
    """Use at most so many pictures."""

    train_batch_size: Count | None = None
    """Pictures in one forward pass; by default the run's `train_batch_size`."""

    start_step: Whole = 0
    """The first step that trains the set, counted from 1."""

    end_step: Count | None = None
    """The last step that trains the set."""

    start_epoch: Whole = 0
    """The first epoch that trains the set, counted from 1."""

    end_epoch: Count | None = None
    """The last epoch that trains the set."""

    conditioning_data: Annotated[
        tuple[Text, ...],
        MaxLen(MOST_REFERENCES + 1),
        BeforeValidator(_one_as_tuple),
        Says("the id of a conditioning set, or a list of ids"),
    ] = ()
    """The id or ids of the set's conditioning sets; references come in this order."""

    conditioning_required: bool = False
    """Leave out images that lack a partner in one of the conditioning sets; otherwise they are trained without it."""

    mask_source: Literal["set", "alpha"] = "set"
    """Where masks come from: a conditioning set, or each image's own alpha channel."""

    is_regularisation_data: bool = False
    """Train toward the base model's own prediction on these images, so that it stays. LoRA only.
    [preservation.md](preservation.md) explains it."""

    class_prompt: Text | None = None
    """What replaces the trigger in this set's captions for `preservation` class; by default `preservation_class`."""

    loss_weight: NotNegative = 1.0
    """Factor of the set's losses."""

    timestep_sampling_offset: Annotated[float, Ge(-10), Le(10)] = 0.0
    """Added to the normal draw before the sigmoid, σ = sigmoid(scale·(N(0,1) + offset)): above 0 the set is trained on
    noisier inputs."""

    caption_shuffle: (
        Annotated[CaptionShuffle, Says('an object such as {"enable": true, "count": 3, "split_on": ","}')] | None
    ) = None
    """Shuffle the parts of captions, as
    `{"enable": true, "count": 3, "seed": 42, "split_on": ",", "position_start": 1}`."""

    caption_strategy: Annotated[
        Literal["textfile", "filename", "instanceprompt"], _reads(instance_prompt="instanceprompt")
    ] = "filename"
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

    @property
    def windows(self) -> Windows:
        """When the set is trained."""
        return {
            "step": (max(self.start_step, 1), self.end_step),
            "epoch": (max(self.start_epoch, 1), self.end_epoch),
        }

    def is_active(self, step: int, epoch: int) -> bool:
        """Whether `step`, in `epoch`, trains the set. Both are counted from 1."""
        return all(
            first <= at and (last is None or at <= last)
            for at, (first, last) in zip((step, epoch), self.windows.values(), strict=True)
        )


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

    caption_filter_list: (
        Annotated[tuple[Text, ...], BeforeValidator(list_as_tuple), Says("a list of texts, or the path of a text file")]
        | None
    ) = None
    """Texts that are taken out of the captions that this store keeps: a list, or the path of a file with one on each
    line."""


class Datasets(Slice):
    """The enabled sets, and all text stores, exactly one of which is the default."""

    train_sets: tuple[ImageSet, ...]
    """Sets that are trained, as listed."""

    eval_sets: tuple[ImageSet, ...]
    """Held-out sets, as listed."""

    text_stores: tuple[TextStore, ...]
    """Stores for text caches; exactly one is the default."""

    conditioning_sets: tuple[ConditioningSet, ...] = ()
    """Sets of references and masks, as listed."""

    def conditions_of(self, image_set: ImageSet) -> tuple[ConditioningSet, ...]:
        """The conditioning sets of `image_set`, in the order of its `conditioning_data`."""
        by_id = {each.id: each for each in self.conditioning_sets}
        return tuple(by_id[name] for name in image_set.conditioning_data)

    def is_masked(self, image_set: ImageSet) -> bool:
        """Whether images of `image_set` may have masks."""
        masks = {each.id for each in self.conditioning_sets if not each.is_reference}
        return image_set.mask_source == "alpha" or not masks.isdisjoint(image_set.conditioning_data)

    def caption_filter_of(self, image_set: ImageSet) -> tuple[str, ...]:
        """Texts that are taken out of the captions of `image_set`."""
        return self.text_store_of(image_set).caption_filter_list or ()

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
