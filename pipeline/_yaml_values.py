"""YAML as people write it today: ``2:4`` is text, as in YAML 1.2, and not 124, sixty-base as in YAML 1.1."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

__all__ = ["compose_yaml", "load_yaml"]

_NUMBERS = frozenset({"tag:yaml.org,2002:int", "tag:yaml.org,2002:float"})


def load_yaml(text: str) -> Any:
    """The values of a document.

    Raises:
        yaml.YAMLError: It is none.
        ValueError: A number or date in it is none.
        RecursionError: It is too deep.
    """
    import yaml

    return yaml.load(text, Loader=_loader())


def compose_yaml(text: str) -> yaml.Node | None:
    """The nodes of a document, with their places; None of an empty one.

    Raises:
        yaml.YAMLError: It is none.
        RecursionError: It is too deep.
    """
    import yaml

    tree: yaml.Node | None = yaml.compose(text, Loader=_loader())
    return tree


@functools.cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
            tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
            is_sixty_based = kind is yaml.ScalarNode and tag in _NUMBERS and ":" in value
            return self.DEFAULT_SCALAR_TAG if is_sixty_based else tag

    return Loader
