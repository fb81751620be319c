"""Options for prior preservation: a loss that keeps the base model's predictions for other prompts."""

import re
from typing import Literal

from simpletuner.config.options.kinds import NotNegative, Slice, Text


class PreservationOptions(Slice):
    """Preservation."""

    preservation: Literal["none", "class", "blank"] = "none"
    """Add a second loss that keeps the predictions for other prompts close to the base model's. `class` uses each
    caption with its trigger replaced by the class; `blank` uses the empty prompt. LoRA only. See
    [preservation.md](preservation.md)."""

    preservation_weight: NotNegative = 1.0
    """Weight of the preservation loss. 0 turns it off."""

    preservation_trigger: Text | None = None
    """The trigger word in captions, which `class` replaces. Captions without it get no preservation loss and are
    counted."""

    preservation_class: Text | None = None
    """The word that replaces the trigger, such as `dog`. A dataset's `class_prompt` overrides it."""

    @property
    def preserves(self) -> bool:
        """Whether the preservation loss is on."""
        return self.preservation != "none" and self.preservation_weight > 0


def with_trigger_replaced(caption: str, trigger: str, name: str) -> str | None:
    """`caption` with each whole-word, case-sensitive occurrence of `trigger` replaced by `name`; None if there is
    none.
    """
    text, count = re.subn(rf"(?<!\w){re.escape(trigger)}(?!\w)", lambda _: name, caption)
    return text if count else None
