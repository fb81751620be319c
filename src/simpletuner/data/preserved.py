"""The prompts whose predictions `preservation` holds at the base model's."""

from collections.abc import Iterable
from dataclasses import dataclass

from simpletuner.base.errors import DataError
from simpletuner.config.datasets import ImageSet
from simpletuner.config.options.preservation import PreservationOptions, replaced
from simpletuner.data.manifest import Manifest

BLANK = ""
"""The empty prompt, which a caption that is dropped is replaced by as well."""


@dataclass(frozen=True)
class PreservedPrompts:
    """From a caption to the prompt that is preserved beside it."""

    options: PreservationOptions

    def of(self, image_set: ImageSet, caption: str) -> str | None:
        """The prompt; None where the sample takes no part: in a regularization set, whose target is the base model's
        prediction already, with a caption that is dropped, or with `class` without the trigger.
        """
        options = self.options
        if not options.preserves or image_set.is_regularisation_data or caption == BLANK:
            return None
        if options.preservation == "blank":
            return BLANK
        name = image_set.class_prompt or options.preservation_class
        assert options.preservation_trigger is not None  # config.rules asks for both
        assert name is not None
        return replaced(caption, options.preservation_trigger, name)

    def all_of(self, manifest: Manifest) -> list[str]:
        """Every prompt that may be preserved beside the samples of a set."""
        captions = [caption for sample in manifest.samples for caption in sample.captions]
        return [prompt for caption in captions if (prompt := self.of(manifest.image_set, caption)) is not None]

    def notice(self, manifests: Iterable[Manifest]) -> str | None:
        """How many captions of the training sets take no part for want of the trigger; None where all take part.

        Raises:
            DataError: none takes part.
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
        without = [caption for caption, takes_part in captions if not takes_part]
        if not without:
            return None
        trigger = self.options.preservation_trigger
        shown = "; ".join(caption[:60] for caption in without[:3]) + ("; …" if len(without) > 3 else "")
        if len(without) == len(captions):
            raise DataError.of(
                f"preservation_trigger = {trigger!r} is in none of {len(captions)} captions: {shown}",
                "a word or words of the captions, in the same case",
                "Give --preservation_trigger another value, or --preservation=blank.",
            )
        return (
            f"preservation class: {len(without)} of {len(captions)} captions do not contain {trigger!r} and take no "
            f"part: {shown}"
        )
