"""The entries of `multidatabackend.json`: datasets of images, and text stores (for cached text contexts)."""

from typing import Annotated, Literal

from annotated_types import Ge, Le, MaxLen, MinLen
from pydantic import BeforeValidator

from simpletuner.config.options.kinds import (
    Count,
    Expects,
    NotNegative,
    PathText,
    Positive,
    Slice,
    Text,
    UnitInterval,
    Whole,
    list_as_tuple,
)


def _with_synonyms(**synonyms: str) -> BeforeValidator:
    """Accept the keys of `synonyms` as other spellings of their values."""
    return BeforeValidator(lambda value: synonyms.get(value, value) if isinstance(value, str) else value)


def _one_as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else list_as_tuple(value)


Windows = dict[str, tuple[int, int | None]]
"""The first and last "step" and "epoch" in which a dataset is trained, counted from 1; a last of None means the end of
the run."""

WHOLE_RUN: Windows = {"step": (1, None), "epoch": (1, None)}
"""Windows of a dataset that is trained during the whole run."""

MAX_REFERENCES = 10
"""Maximum number of reference images of a sample."""


class FolderDataset(Slice):
    """A folder of images, and how they are resized and cropped."""

    id: Text
    """Unique name of the dataset, which must not change and must be valid as a folder's name."""

    type: Literal["local"] = "local"
    """Where the images are stored: `local` is a folder on this machine."""

    instance_data_dir: PathText
    """The folder of images. Its subfolders are searched too. Links are followed, each target once."""

    disabled: bool = False
    """Do not use the dataset."""

    cache_dir_vae: PathText = "cache/vae/{id}"
    """Folder for the dataset's cached latents."""

    resolution: Positive = 1024.0
    """Size to train at, in the unit of `resolution_type`."""

    resolution_type: Literal["pixel", "area", "pixel_area"] = "pixel_area"
    """Unit of `resolution`: `pixel`, the shorter edge in pixels; `area`, areas of 1024² pixels; `pixel_area`, the edge
    in pixels of a square with the same area."""

    crop: bool = False
    """Crop images to the shape that `crop_aspect` selects. Otherwise images keep their shape and lose only a few pixels
    at the edges."""

    crop_aspect: Literal["square", "preserve", "closest", "random"] = "square"
    """Shape of the crop: `square`; the image's own shape (`preserve`); the closest of `crop_aspect_buckets`
    (`closest`); or a random one of them (`random`)."""

    crop_aspect_buckets: (
        Annotated[
            tuple[Positive, ...],
            MinLen(1),
            BeforeValidator(list_as_tuple),
            Expects("a list of ratios such as [1.0, 1.5]"),
        ]
        | None
    ) = None
    """Crop shapes for `closest` and `random`, as width / height."""

    crop_style: Annotated[Literal["center", "corner", "random"], _with_synonyms(centre="center")] = "random"
    """Position of the crop: `center` (also `centre`), `corner` (upper left) or `random`."""

    maximum_image_size: Positive | None = None
    """Downsample larger images to `target_downsample_size` before the crop, but never below the size that the crop
    needs. Same unit as `resolution`."""

    target_downsample_size: Positive | None = None
    """Size to which images above `maximum_image_size` are downsampled. By default that maximum."""

    minimum_image_size: Positive | None = None
    """Leave out smaller images; they are counted and listed. Same unit as `resolution`."""

    minimum_aspect_ratio: Positive | None = None
    """Leave out narrower images, by width / height."""

    maximum_aspect_ratio: Positive | None = None
    """Leave out wider images, by width / height."""

    max_upscale_threshold: NotNegative | None = None
    """Leave out images that would be enlarged by more than this share: 0.25 allows a quarter."""


class ConditioningSet(FolderDataset):
    """A dataset of reference images or masks, paired with the images of the datasets that name it."""

    dataset_type: Literal["conditioning"]
    """Kind of the entry: `conditioning` is a dataset of reference images or masks."""

    conditioning_type: Literal["reference_strict", "reference_loose", "mask", "segmentation"]
    """What the files are: `reference_strict`, references with the same crop as their image; `reference_loose`,
    references of any shape, with this dataset's own `resolution` and `crop`; `mask`, loss weights from 0 (black) to 1
    (white); `segmentation`, masks in which every gray above 0 counts as 1."""

    @property
    def is_reference(self) -> bool:
        """Whether the dataset holds references rather than masks."""
        return self.conditioning_type in ("reference_strict", "reference_loose")


class CaptionShuffle(Slice):
    """How to shuffle the parts of a caption."""

    enable: bool = False
    """Shuffle captions."""

    count: Count = 1
    """Number of shuffled variants of each caption. One is drawn each time the image is used."""

    seed: Whole | None = None
    """Seed of the variants. By default the run's `seed`."""

    split_on: Annotated[Text, _with_synonyms(comma=",", space=" ", period=".")] = ","
    """Separator of the parts: any text, or one of the words `comma`, `space` and `period`."""

    position_start: Whole = 0
    """Number of parts at the beginning of the caption that are not shuffled."""

    include_original: bool = False
    """Also use the caption as it was written."""


class ImageSet(FolderDataset):
    """A dataset of images for training, or for measuring the held-out loss."""

    dataset_type: Literal["image", "eval"] = "image"
    """Kind of the entry: `image` datasets are trained; `eval` datasets are held out: only their loss is measured."""

    repeats: Whole = 0
    """EXTRA passes: an epoch uses each image repeats+1 times."""

    probability: UnitInterval = 1.0
    """Share of the dataset's samples that an epoch uses, drawn again for each epoch."""

    max_num_samples: Count | None = None
    """Maximum number of images to use."""

    train_batch_size: Count | None = None
    """Images in one forward pass. By default the run's `train_batch_size`."""

    start_step: Whole = 0
    """The first step that trains the dataset, counted from 1."""

    end_step: Count | None = None
    """The last step that trains the dataset."""

    start_epoch: Whole = 0
    """The first epoch that trains the dataset, counted from 1."""

    end_epoch: Count | None = None
    """The last epoch that trains the dataset."""

    conditioning_data: Annotated[
        tuple[Text, ...],
        MaxLen(MAX_REFERENCES + 1),
        BeforeValidator(_one_as_tuple),
        Expects("the id of a conditioning set, or a list of ids"),
    ] = ()
    """The id or ids of this dataset's conditioning sets. References are used in this order."""

    conditioning_required: bool = False
    """Leave out images that lack a partner file in one of the conditioning sets. Otherwise they are trained without
    that file."""

    mask_source: Literal["set", "alpha"] = "set"
    """Where masks come from: a conditioning set (`set`), or each image's own alpha channel (`alpha`)."""

    is_regularisation_data: bool = False
    """Train toward the base model's prediction on these images, to preserve what the base model generates. LoRA only.
    See [preservation.md](preservation.md)."""

    class_prompt: Text | None = None
    """The word that replaces the trigger in this dataset's captions with `preservation` class. By default
    `preservation_class`."""

    loss_weight: NotNegative = 1.0
    """Factor by which this dataset's loss is multiplied."""

    timestep_sampling_offset: Annotated[float, Ge(-10), Le(10)] = 0.0
    """Offset of the normal draw before the sigmoid, σ = sigmoid(scale·(N(0,1) + offset)). Above 0, training sees
    noisier inputs of this dataset."""

    caption_shuffle: (
        Annotated[CaptionShuffle, Expects('an object such as {"enable": true, "count": 3, "split_on": ","}')] | None
    ) = None
    """Shuffle the parts of captions, as
    `{"enable": true, "count": 3, "seed": 42, "split_on": ",", "position_start": 1}`."""

    caption_strategy: Annotated[
        Literal["textfile", "filename", "instanceprompt"], _with_synonyms(instance_prompt="instanceprompt")
    ] = "filename"
    """Where captions come from: `textfile`, a `.txt` file beside each image (else a `.caption`); `filename`, the image
    file's name; `instanceprompt` (also written `instance_prompt`), the dataset's `instance_prompt`."""

    instance_prompt: Text | None = None
    """The caption of every image with `caption_strategy` `instanceprompt`; also the text that `prepend_instance_prompt`
    puts first."""

    prepend_instance_prompt: bool = False
    """Put `instance_prompt` before each caption."""

    only_instance_prompt: bool = False
    """Use only `instance_prompt` as the caption, whatever `caption_strategy` says."""

    disable_multiline_split: bool = False
    """Read a whole `.txt` file as one caption. Otherwise each line is a caption, and one is drawn each time the image
    is used."""

    metadata_backend: Literal["discovery"] = "discovery"
    """How images are found: `discovery` searches the folder."""

    text_embeds: Text | None = None
    """The id of the text store for this dataset's captions. By default the default store."""

    @property
    def windows(self) -> Windows:
        """The steps and epochs in which the dataset is trained."""
        return {
            "step": (max(self.start_step, 1), self.end_step),
            "epoch": (max(self.start_epoch, 1), self.end_epoch),
        }

    def is_active(self, step: int, epoch: int) -> bool:
        """Whether `step` of `epoch` trains the dataset. Both are counted from 1."""
        return all(
            first <= at and (last is None or at <= last)
            for at, (first, last) in zip((step, epoch), self.windows.values(), strict=True)
        )


class TextStore(Slice):
    """A store for text caches."""

    id: Text
    """Unique name of the store, which must not change and must be valid as a folder's name."""

    type: Literal["local"] = "local"
    """Where the cache is stored: `local` is a folder on this machine."""

    dataset_type: Literal["text_embeds"] = "text_embeds"
    """Kind of the entry: `text_embeds` is a store for text caches."""

    default: bool = False
    """Use this store for every dataset that names none. Exactly one store is the default."""

    cache_dir: PathText = "cache/text"
    """Folder of the cached text contexts."""

    write_batch_size: Count | None = None
    """Cache files to write per flush. By default the run's `write_batch_size`."""

    caption_filter_list: (
        Annotated[
            tuple[Text, ...], BeforeValidator(list_as_tuple), Expects("a list of texts, or the path of a text file")
        ]
        | None
    ) = None
    """Texts to remove from the captions of this store: a list, or the path of a file with one text on each line."""


class Datasets(Slice):
    """The enabled datasets, and all text stores."""

    train_sets: tuple[ImageSet, ...]
    """Datasets to train on, in the order of the list."""

    eval_sets: tuple[ImageSet, ...]
    """Held-out datasets, in the order of the list."""

    text_stores: tuple[TextStore, ...]
    """Stores for text caches; exactly one is the default."""

    conditioning_sets: tuple[ConditioningSet, ...] = ()
    """Datasets of references and masks, in the order of the list."""

    def conditions_of(self, image_set: ImageSet) -> tuple[ConditioningSet, ...]:
        """The conditioning sets of `image_set`, in the order of its `conditioning_data`."""
        by_id = {each.id: each for each in self.conditioning_sets}
        return tuple(by_id[name] for name in image_set.conditioning_data)

    def is_masked(self, image_set: ImageSet) -> bool:
        """Whether images of `image_set` may have masks."""
        masks = {each.id for each in self.conditioning_sets if not each.is_reference}
        return image_set.mask_source == "alpha" or not masks.isdisjoint(image_set.conditioning_data)

    def caption_filter_of(self, image_set: ImageSet) -> tuple[str, ...]:
        """Texts to remove from the captions of `image_set`."""
        return self.text_store_of(image_set).caption_filter_list or ()

    def text_store_of(self, image_set: ImageSet) -> TextStore:
        """The text store for the captions of `image_set`."""
        return next(
            store
            for store in self.text_stores
            if (store.default if image_set.text_embeds is None else store.id == image_set.text_embeds)
        )

    @property
    def default_text_store(self) -> TextStore:
        """The store for texts that belong to no dataset: validation prompts and the empty caption."""
        return next(store for store in self.text_stores if store.default)
