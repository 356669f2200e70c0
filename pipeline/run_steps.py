"""Where the steps of a run find and leave their results: the user's cache, or scratch space of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onnxsmith.errors import ResourceError
from onnxsmith.pipeline.staging import is_full
from onnxsmith.pipeline.step_cache import OpenStep, StepCache
from onnxsmith.pipeline.step_keys import StepKey
from onnxsmith.user_directories import cache_limit, given_home, system_caches

__all__ = ["RunSteps", "cache_directory", "on_one_disk", "user_cache"]

# An entry that takes more of the cache than this would push everything else out.
_LARGEST_SHARE = 0.5


def cache_directory() -> Path:
    """Where results of steps are kept.

    ``$ONNXSMITH_HOME/cache``, else ``onnxsmith`` in the directory where the system keeps a user's caches.
    """
    home = given_home()
    return home / "cache" if home else system_caches() / "onnxsmith"


def user_cache() -> StepCache | None:
    """The user's cache; None where it is switched off with a size of 0, or cannot be written.

    Raises:
        BadInputError: Its limit is no size.
    """
    limit, root = cache_limit(), cache_directory()
    if limit == 0:
        return None
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=root):
            return StepCache(root, max_bytes=limit)
    except OSError:
        # A home that is read only is no reason not to work.
        return None


class RunSteps:
    """The steps of one run.

    Attributes:
        cache: What outlives the run; None where nothing does.
    """

    def __init__(self, cache: StepCache | None, scratch: Path) -> None:
        """Takes both places.

        Args:
            cache: What outlives the run.
            scratch: A directory that goes with the run; it need not exist yet.
        """
        self.cache = cache
        self._scratch = StepCache(scratch)
        self._crowded = False

    def close(self) -> None:
        """Lets go of everything that is open."""
        self._scratch.close()
        if self.cache is not None:
            self.cache.close()

    def keeps(self, expected_bytes: int) -> bool:
        """Whether a result of this size outlives the run: the cache and its disk have room for it."""
        cache = self.cache
        if (
            cache is None
            or self._crowded
            or (cache.max_bytes is not None and expected_bytes > cache.max_bytes * _LARGEST_SHARE)
        ):
            return False
        with contextlib.suppress(OSError):
            cache.root.mkdir(parents=True, exist_ok=True)
            return shutil.disk_usage(cache.root).free > 2 * expected_bytes
        return False

    def open(self, key: StepKey) -> OpenStep | None:
        """A result that an earlier run left."""
        return self.cache.open(key) if self.cache is not None else None

    def has(self, key: StepKey) -> bool:
        """Whether an earlier run left a result; it may turn out to be damaged."""
        return self.cache is not None and self.cache.has(key)

    def result(
        self,
        key: StepKey,
        make: Callable[[Path], Mapping[str, Any]],
        *,
        expected_bytes: int = 0,
        renew: bool = False,
    ) -> OpenStep:
        """The result of a step, found or made; see ``StepCache.result``.

        Where the disk of the cache is full, and the run's own is another one, it is made there.

        Args:
            key: Its address.
            make: Makes it.
            expected_bytes: How large it will be, at most.
            renew: Whether to make it even where it is found.
        """
        if self.cache is not None and (self.cache.has(key) or self.keeps(expected_bytes)):
            try:
                return self.cache.result(key, make, renew=renew)
            except (OSError, ResourceError) as error:
                if not is_full(error) or on_one_disk(self.cache.root, self._scratch.root):
                    raise
                self._crowded = True
        return self._scratch.result(key, make, renew=renew)

    def is_ours(self, step: OpenStep) -> bool:
        """Whether a result goes with this run, so that its files may be moved away."""
        return step.directory.is_relative_to(self._scratch.root)


def on_one_disk(one: Path, other: Path) -> bool:
    """Whether two places, which need not be there yet, are on the same file system."""
    return _device(one) == _device(other)


def _device(place: Path) -> int:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return os.stat(place).st_dev
