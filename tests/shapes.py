"""Which functions have their shapes checked while tests run.

jaxtyping's hook decorates every function, also those inside functions, each time they are made. Checking those that
name no shape took more than half of the processor time of a run in a test.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args, get_origin

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


def jaxtyped_with_shapes(*, typechecker: Any) -> Callable[[Any], Any]:
    """`jaxtyping.jaxtyped`, for functions and dataclasses whose annotations have shapes; others stay as they are."""

    def decorate(made: Any) -> Any:
        parts = made.__mro__ if isinstance(made, type) else (made,)
        annotations = (each for part in parts for each in inspect.get_annotations(part).values())
        return _jaxtyped(typechecker=typechecker)(made) if any(map(has_shape, annotations)) else made

    return decorate


def has_shape(annotation: Any) -> bool:
    """Whether a value can have a wrong shape for `annotation`. What a function takes cannot be seen from outside."""
    if isinstance(annotation, str):  # not resolved yet
        return True
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return get_origin(annotation) is not Callable and any(map(has_shape, get_args(annotation)))
