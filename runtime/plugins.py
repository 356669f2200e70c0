"""Plugin providers: libraries that ONNX Runtime loads while it runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from onnxsmith.errors import ProviderUnavailableError, require

__all__ = ["library_path", "plugin_devices"]


def library_path(library: str) -> str:
    """The absolute path of a plugin's library.

    Args:
        library: A path, or ``module:function`` of the package that brings the library.

    Raises:
        ProviderUnavailableError: There is no such package or file.
    """
    module, separator, function = library.partition(":")
    if separator and module.replace(".", "").replace("_", "").isalnum() and len(module) > 1:
        try:
            path = str(getattr(importlib.import_module(module), function)())
        except (ImportError, AttributeError, OSError) as error:
            raise ProviderUnavailableError(
                f"plugin {library}",
                got=f"its library is not found: {error}",
                expected="the package of the plugin",
            ) from error
    else:
        path = library
    if not Path(path).is_file():
        raise ProviderUnavailableError(f"plugin {library}", got=f"no file {path}", expected="a library")
    return str(Path(path).resolve())


def plugin_devices(name: str, library: str) -> list[Any]:
    """Loads a plugin, once in a process, and gives the devices that it offers.

    Args:
        name: What to register it as.
        library: See ``library_path``.

    Raises:
        ProviderUnavailableError: ONNX Runtime is too old for plugins, refuses this one, or the plugin
            offers no device of this machine.
    """
    ort = require("onnxruntime", purpose="plugin providers")
    path = library_path(library)
    where = f"plugin {name}"
    if not hasattr(ort, "register_execution_provider_library"):
        raise ProviderUnavailableError(
            where, got=f"onnxruntime {ort.__version__} has no plugin providers", expected="1.23 or later"
        )

    def offered() -> list[Any]:
        return [d for d in ort.get_ep_devices() if d.ep_metadata.get("library_path") == path]

    if not offered():
        try:
            ort.register_execution_provider_library(name, path)
        except Exception as error:
            if "already registered" not in str(error):
                raise ProviderUnavailableError(
                    where,
                    got=f"ONNX Runtime {ort.__version__} refuses it: {' '.join(str(error).split())[:300]}",
                    expected="a provider that was built for this version",
                ) from error
    devices = offered()
    if not devices:
        raise ProviderUnavailableError(
            where,
            got="it offers no device of this machine",
            expected="at least one",
            remedy="Its own documentation says what hardware and drivers it needs",
        )
    # One session takes the devices of one provider.
    first = devices[0].ep_name
    return [device for device in devices if device.ep_name == first]
