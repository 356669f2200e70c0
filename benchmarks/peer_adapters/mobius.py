"""mobius: its graph of a GGUF file with the file's blocks kept, run by ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from peer_adapters.contract import Adapter, Decoder
from peer_adapters.plain_ort import OrtDecoder


class MobiusAdapter(Adapter):
    """``mobius build-gguf``, as its documentation says to keep blocks for CPUs."""

    def convert(self, variant: str, source: Path, target: Path) -> None:
        program = Path(sys.executable).with_name("mobius")
        command = [
            str(program),
            "build-gguf",
            str(source),
            "-o",
            str(target),
            "--keep-quantized",
            "--ep",
            "cpu",
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)

    def open_decoder(self, variant: str, path: Path, threads: int) -> Decoder:
        return OrtDecoder(path, threads)


ADAPTER = MobiusAdapter()
