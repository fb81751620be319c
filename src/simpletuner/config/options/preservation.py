"""Holding on to what the base model knows."""

import re
from typing import Literal

from simpletuner.config.options.kinds import NotNegative, Slice, Text


class PreservationOptions(Slice):
    """Preservation."""

    preservation: Literal["none", "class", "blank"] = "none"
    """A second loss that holds the predictions of other prompts at the base model's: `class` of each caption with its
    trigger replaced by the class, `blank` of the empty prompt. LoRA only. [preservation.md](preservation.md) explains
    it."""

    preservation_weight: NotNegative = 1.0
    """Weight of that loss; 0 is none."""

    preservation_trigger: Text | None = None
    """The word in captions that `class` replaces. A caption without it takes no part and is counted."""

    preservation_class: Text | None = None
    """What replaces it, such as `dog`; a set's `class_prompt` comes first."""

    @property
    def preserves(self) -> bool:
        """Whether there is such a loss."""
        return self.preservation != "none" and self.preservation_weight > 0


def replaced(caption: str, trigger: str, name: str) -> str | None:
    """`caption` with the word or words `trigger` replaced by `name`, wherever they stand by themselves and in this
    case; None where they do not.
    """
    text, count = re.subn(rf"(?<!\w){re.escape(trigger)}(?!\w)", lambda _: name, caption)
    return text if count else None
