"""Sound for speech models: WAV files, another sampling rate, and the log-mel spectrogram of Whisper.

Written with numpy alone, so that an artifact is used without PyTorch and transformers.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxsmith.errors import BadInputError

__all__ = ["MelSettings", "log_mel", "pieces_of", "read_wav", "resampled"]

Samples = npt.NDArray[np.float32]

_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
# Of the filter, as in scipy.signal.resample_poly.
_KAISER_BETA, _ZERO_CROSSINGS = 5.0, 10


def read_wav(path: Path) -> tuple[Samples, int]:
    """Samples from -1 to 1, the channels averaged, and how many of them are a second.

    Reads uncompressed files with integers of 8, 16, 24 or 32 bits, or floats.

    Raises:
        BadInputError: It cannot be read, is no such file, or is empty.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInputError(
            str(path), got=f"cannot be read: {error.strerror}", expected="a WAV file"
        ) from error
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise BadInputError(
            str(path),
            got="no WAV file",
            expected="uncompressed sound in a RIFF file",
            remedy="Convert it, for example with `ffmpeg -i INPUT -ac 1 -ar 16000 OUTPUT.wav`",
        )
    layout: tuple[int, int, int, int] | None = None
    place = 12
    while place + 8 <= len(data):
        name, size = data[place : place + 4], struct.unpack_from("<I", data, place + 4)[0]
        body = data[place + 8 : place + 8 + size]
        if name == b"fmt " and len(body) >= 16:
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
            if kind == _EXTENSIBLE and len(body) >= 26:
                kind = struct.unpack_from("<H", body, 24)[0]
            layout = (kind, channels, rate, bits)
        elif name == b"data" and layout is not None:
            return _samples(path, body, *layout), layout[2]
        place += 8 + size + size % 2
    raise BadInputError(str(path), got="a WAV file without sound in it", expected="the parts fmt and data")


def _samples(path: Path, body: bytes, kind: int, channels: int, rate: int, bits: int) -> Samples:
    whole = {8: "u1", 16: "<i2", 32: "<i4"}
    if not channels or not rate or (kind, bits) not in {
        (_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64),
    }:  # fmt: skip
        raise BadInputError(
            str(path),
            got=f"{channels} channels of format {kind} with {bits} bits",
            expected="integers of 8, 16, 24 or 32 bits, or floats",
            remedy="Convert it, for example with `ffmpeg -i INPUT -ac 1 -ar 16000 OUTPUT.wav`",
        )
    frame = channels * bits // 8
    body = body[: len(body) // frame * frame]
    if not body:
        raise BadInputError(str(path), got="a WAV file without samples", expected="some sound")
    if kind == _FLOAT:
        values = np.frombuffer(body, "<f4" if bits == 32 else "<f8").astype(np.float32)
    elif bits == 24:
        # Into the upper three bytes of four.
        padded = np.zeros((len(body) // 3, 4), np.uint8)
        padded[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
        values = padded.view("<i4").reshape(-1).astype(np.float32) / np.float32(2**31)
    else:
        numbers = np.frombuffer(body, whole[bits]).astype(np.float64)
        values = ((numbers - 128) / 128 if bits == 8 else numbers / 2 ** (bits - 1)).astype(np.float32)
    mixed: Samples = values.reshape(-1, channels).mean(1, dtype=np.float32)
    return mixed


def resampled(samples: Samples, rate: int, wanted: int) -> Samples:
    """The same sound with another number of samples in a second.

    A windowed sinc that cuts off what the lower of the two rates cannot carry, evaluated for each output
    sample where it is needed (polyphase filtering).
    """
    divisor = math.gcd(rate, wanted)
    up, down = wanted // divisor, rate // divisor
    if up == down or not len(samples):
        return samples
    widest = max(up, down)
    half = _ZERO_CROSSINGS * widest
    steps = np.arange(-half, half + 1)
    taps = np.sinc(steps / widest) * np.kaiser(2 * half + 1, _KAISER_BETA)
    taps *= up / taps.sum()
    count = -(-len(samples) * up // down)
    result = np.empty(count, np.float32)
    longest = -(-(2 * half + 1) // up)
    padded = np.concatenate([np.zeros(longest), samples, np.zeros(longest + half // up + 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, longest)
    for phase in range(min(up, count)):
        place = np.arange(phase, count, up) * down + half
        part = taps[int(place[0]) % up :: up]
        kernel = np.zeros(longest)
        # The newest sample is multiplied with the first tap.
        kernel[longest - len(part) :] = part[::-1]
        result[phase::up] = windows[place // up + 1] @ kernel
    return result


@dataclasses.dataclass(frozen=True)
class MelSettings:
    """How Whisper looks at sound.

    Attributes:
        bins: Rows of the spectrogram.
        rate: Samples of a second.
        window: Samples of a Fourier transform.
        hop: Samples between two of them.
        frames: Columns of the spectrogram, which the encoder takes at once.
    """

    bins: int
    rate: int = 16000
    window: int = 400
    hop: int = 160
    frames: int = 3000

    @staticmethod
    def of(config: Mapping[str, Any], told: Mapping[str, Any]) -> MelSettings:
        """From ``config.json`` and ``preprocessor_config.json``; the latter may be missing."""
        usual = MelSettings(int(config.get("num_mel_bins", 80)))
        return MelSettings(
            int(told.get("feature_size", usual.bins)),
            int(told.get("sampling_rate", usual.rate)),
            int(told.get("n_fft", usual.window)),
            int(told.get("hop_length", usual.hop)),
            # Each position of the encoder stands for two frames.
            int(config.get("max_source_positions", 1500)) * 2,
        )

    @property
    def samples(self) -> int:
        """How much sound that is."""
        return self.frames * self.hop


def log_mel(samples: Samples, settings: MelSettings) -> Samples:
    """The spectrogram that Whisper was trained on, (1, bins, frames); sound is padded with silence.

    https://github.com/openai/whisper/blob/main/whisper/audio.py
    """
    size, hop = settings.window, settings.hop
    padded = np.zeros(settings.samples)
    padded[: len(samples)] = samples[: settings.samples]
    padded = np.pad(padded, size // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(size) / size)
    # The last frame is left out, as in the original.
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][: settings.frames]
    power = np.abs(np.fft.rfft(frames * window, axis=1)) ** 2
    mel = np.log10(np.maximum(power @ _mel_filters(settings), 1e-10)).T
    mel = np.maximum(mel, mel.max() - 8.0)
    found: Samples = ((mel + 4.0) / 4.0).astype(np.float32)[None]
    return found


def _mel_filters(settings: MelSettings) -> npt.NDArray[np.float64]:
    """Triangles of equal area on Slaney's mel scale, (frequencies, bins)."""
    frequencies = np.fft.rfftfreq(settings.window, 1 / settings.rate)
    corners = _hertz(np.linspace(0.0, float(_mel(np.array(settings.rate / 2))), settings.bins + 2))
    low, middle, high = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies[:, None] - low) / (middle - low)
    falling = (high - frequencies[:, None]) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * (2.0 / (high - low))


# Below 1000 Hz the scale is linear, above it logarithmic.
_LINEAR, _BREAK, _STEP = 200 / 3, 1000.0, math.log(6.4) / 27


def _mel(hertz: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    upper = _BREAK / _LINEAR + np.log(np.maximum(hertz, _BREAK) / _BREAK) / _STEP
    return np.where(hertz < _BREAK, hertz / _LINEAR, upper)


def _hertz(mel: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    first = _BREAK / _LINEAR
    return np.where(mel < first, mel * _LINEAR, _BREAK * np.exp(_STEP * (np.maximum(mel, first) - first)))


def pieces_of(samples: Samples, settings: MelSettings) -> list[Samples]:
    """Sound in pieces that the encoder takes, each cut where it is quietest in its last third."""
    found = []
    hop = settings.rate // 50
    while len(samples) > settings.samples:
        begin = settings.samples * 2 // 3
        late = samples[begin : settings.samples]
        late = late[: len(late) // hop * hop].reshape(-1, hop)
        # A pause is longer than a hop: the loudest of three in a row counts.
        loudness = np.square(late).mean(1)
        around = np.maximum(loudness, np.maximum(np.roll(loudness, 1), np.roll(loudness, -1)))
        cut = begin + int(around.argmin()) * hop + hop // 2
        found.append(samples[:cut])
        samples = samples[cut:]
    return [*found, samples]
