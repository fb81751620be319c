"""Preservation prompts: the prompts whose predictions `preservation` keeps close to the base model's."""

from collections.abc import Iterable
from dataclasses import dataclass

from simpletuner.base.errors import DataError
from simpletuner.config.datasets import ImageSet
from simpletuner.config.options.preservation import PreservationOptions, with_trigger_replaced
from simpletuner.data.manifest import Manifest

BLANK = ""
"""The empty prompt, which also replaces a dropped caption."""


@dataclass(frozen=True)
class PreservedPrompts:
    """Maps a caption to its preservation prompt."""

    options: PreservationOptions

    def of(self, image_set: ImageSet, caption: str) -> str | None:
        """The preservation prompt for a caption. None if preservation is off, in a regularization dataset (whose target
        is already the base model's prediction), for a dropped caption, or with `class` if the trigger is missing.
        """
        options = self.options
        if not options.preserves or image_set.is_regularisation_data or caption == BLANK:
            return None
        if options.preservation == "blank":
            return BLANK
        name = image_set.class_prompt or options.preservation_class
        assert options.preservation_trigger is not None  # config.rules requires both
        assert name is not None
        return with_trigger_replaced(caption, options.preservation_trigger, name)

    def all_of(self, manifest: Manifest) -> list[str]:
        """All preservation prompts of a dataset's samples."""
        captions = [caption for sample in manifest.samples for caption in sample.captions]
        return [prompt for caption in captions if (prompt := self.of(manifest.image_set, caption)) is not None]

    def notice(self, manifests: Iterable[Manifest]) -> str | None:
        """Notice that some captions of the training datasets lack the trigger and take no part; None if all have it.

        Raises:
            DataError: no caption takes part.
        """
        if not self.options.preserves:
            return None
        captions = [
            (caption, self.of(manifest.image_set, caption) is not None)
            for manifest in manifests
            if not manifest.image_set.is_regularisation_data
            for sample in manifest.samples
            for caption in sample.captions
        ]
        excluded = [caption for caption, takes_part in captions if not takes_part]
        if not excluded:
            return None
        trigger = self.options.preservation_trigger
        examples = "; ".join(caption[:60] for caption in excluded[:3]) + ("; …" if len(excluded) > 3 else "")
        if len(excluded) == len(captions):
            raise DataError.of(
                f"preservation_trigger = {trigger!r} is in none of {len(captions)} captions: {examples}",
                "a word or words of the captions, in the same case",
                "Give --preservation_trigger another value, or --preservation=blank.",
            )
        return (
            f"preservation class: {len(excluded)} of {len(captions)} captions do not contain {trigger!r} and take no "
            f"part: {examples}"
        )
