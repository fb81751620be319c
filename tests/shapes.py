"""Which functions have their shapes checked while tests run, and how.

jaxtyping's hook decorates every function, also those inside functions, each time they are made. Checking those that
name no shape took more than half of the processor time of a run in a test.

Of the others jaxtyping binds the arguments and checks them twice, before the call and again with what it returns. Here
beartype checks each value once, between the same bounds: what the parameters bind of a size holds for what is returned.
That takes a third of the time. Sizes computed of arguments (`"{n}+1"`) would need the binding; they are an error.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, ForwardRef, Literal, get_args, get_origin

import jaxtyping

_jaxtyped = jaxtyping.jaxtyped


def jaxtyped_with_shapes(*, typechecker: Any) -> Callable[[Any], Any]:
    """`jaxtyping.jaxtyped`, for functions and dataclasses whose annotations have shapes; others stay as they are."""

    def decorate(made: Any) -> Any:
        parts = made.__mro__ if isinstance(made, type) else (made,)
        annotations = [each for part in parts for each in inspect.get_annotations(part).values()]
        if not any(map(has_shape, annotations)):
            return made
        if isinstance(made, type) or any(map(_names_type, annotations)):
            return _jaxtyped(typechecker=typechecker)(made)
        return _checked_once(typechecker(made))

    return decorate


def _checked_once(checked: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(checked)
    def with_own_sizes(*arguments: Any, **keywords: Any) -> Any:
        with _jaxtyped("context"):
            return checked(*arguments, **keywords)

    return with_own_sizes


def has_shape(annotation: Any) -> bool:
    """Whether a value can have a wrong shape for `annotation`. What a function takes cannot be seen from outside."""
    if isinstance(annotation, str):  # not resolved yet
        return True
    if isinstance(annotation, type) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    return get_origin(annotation) not in (Callable, Literal) and any(map(has_shape, get_args(annotation)))


def _names_type(annotation: Any) -> bool:
    """Whether `annotation` has the name of a type in place of the type, which jaxtyping may leave unresolved."""
    if isinstance(annotation, str | ForwardRef):
        return True
    return get_origin(annotation) is not Literal and any(map(_names_type, get_args(annotation)))
