"""From speech to text, with the three graphs of Whisper."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError, FeedError, UnknownNameError
from onnxsmith.package import ModelPackage
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.generation import TextStream
from onnxsmith.pipeline.sequence_generation import configuration, is_encoder_decoder, start_token
from onnxsmith.pipeline.sound import MelSettings, log_mel, pieces_of, read_wav, resampled
from onnxsmith.pipeline.tokenization import PackageTokenizer

if TYPE_CHECKING:
    import numpy.typing as npt

    from onnxsmith.runtime import Seq2SeqDecoder
    from onnxsmith.runtime.session import Array

__all__ = ["transcribe"]


def transcribe(
    model: Path,
    audio: Path,
    *,
    max_new_tokens: int | None = None,
    provider: str = "cpu",
    language: str | None = None,
    stop: Sequence[str] = (),
) -> Iterator[str]:
    """The words of a recording, piece by piece, each word the most likely one.

    Sound that is longer than what the encoder takes at once (30 s) is cut at pauses.

    Args:
        model: An artifact of Whisper or a model of its kind.
        audio: A WAV file of any sampling rate.
        max_new_tokens: Upper bound of tokens for each part of the recording; the model's own where None.
        provider: Execution provider.
        language: Such as ``en``, for models that know several; they find it out where None.
        stop: Strings that end the text.

    Yields:
        Text, as soon as it is certain.

    Raises:
        OnnxsmithError: The model is no such model, or the file cannot be read.
    """
    import numpy as np

    from onnxsmith.runtime import OrtBackend, Seq2SeqDecoder, generate_sequences, open_components

    if max_new_tokens is not None and max_new_tokens < 1:
        raise BadInputError("generate: --max-new-tokens", got=str(max_new_tokens), expected="at least 1")
    package = load_package(model)
    settings = _settings(package, model)
    told = configuration(package)
    tokenizer = PackageTokenizer(package)
    languages = {name.strip("<|>"): number for name, number in (told.get("lang_to_id") or {}).items()}
    if language is not None:
        _check_language(language, languages)
    samples, rate = read_wav(audio)
    pieces = pieces_of(resampled(samples, rate, settings.rate), settings)
    parts = {name: package.only(name) for name in package.components}
    with open_components(OrtBackend(provider), parts, name="generate") as sessions:
        decoder = Seq2SeqDecoder(sessions)
        for number, piece in enumerate(pieces):
            feeds = {"input_features": log_mel(piece, settings)}
            start = np.array([_beginning(told, decoder, feeds, language, languages)], np.int64)
            allowed = int(told.get("max_target_positions") or 448) - start.shape[1]
            stream = TextStream(tokenizer, [], stop)
            joined = _Joined(" " if number else "")
            for tokens in generate_sequences(
                decoder,
                feeds,
                start,
                max_new_tokens=min(max_new_tokens or allowed, allowed),
                stop=tokenizer.stop_ids,
                choose=lambda step, logits: _allowed(told, step, logits),
            ):
                yield from joined.add(stream.add(int(tokens[0])))
                if stream.ended:
                    return
            yield from joined.add(stream.finish())


class _Joined:
    """Puts one space between parts of a recording, and none before the first."""

    def __init__(self, before: str) -> None:
        self._before = before
        self._begun = False

    def add(self, text: str) -> Iterator[str]:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
            text = f"{self._before}{text}" if text else ""
        if text:
            yield text


def _settings(package: ModelPackage, model: Path) -> MelSettings:
    names: list[str] = []
    if is_encoder_decoder(package):
        names = [spec.name for spec in package.components["encoder_model"].inputs]
    config = _json(package, "config.json")
    if names != ["input_features"] or config.get("model_type") != "whisper":
        kind = config.get("model_type") or package.task or "of no known kind"
        raise FeedError(
            str(model),
            got=f"a model {kind}" if " " in kind else f"a model of the kind {kind}",
            expected="Whisper, whose view of sound is known",
            remedy="Leave out --audio",
        )
    return MelSettings.of(config, _json(package, "preprocessor_config.json"))


def _json(package: ModelPackage, name: str) -> dict[str, Any]:
    try:
        found = json.loads(package.files.get(name, b"{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _check_language(language: str, languages: Mapping[str, int]) -> None:
    if not languages:
        raise BadInputError(
            "generate: --language", got=language, expected="none: the model knows one language only"
        )
    if language not in languages:
        raise UnknownNameError("generate: --language", name=language, known=languages, kind="language")


def _beginning(
    told: Mapping[str, Any],
    decoder: Seq2SeqDecoder,
    feeds: Mapping[str, Array],
    language: str | None,
    languages: Mapping[str, int],
) -> list[int]:
    """The tokens that the decoder begins with: start, language, task, and that no times are wanted."""
    import numpy as np

    start = start_token(told)
    tokens = [start]
    if languages:
        if language is None:
            decoder.encode(feeds)
            logits = decoder.step(np.array([[start]], np.int64))[0, -1]
            language = max(languages, key=lambda name: float(logits[languages[name]]))
        tokens.append(languages[language])
        task = (told.get("task_to_id") or {}).get("transcribe")
        if isinstance(task, int):
            tokens.append(task)
    times = told.get("no_timestamps_token_id")
    return [*tokens, times] if isinstance(times, int) else tokens


def _allowed(told: Mapping[str, Any], step: int, logits: Array) -> npt.NDArray[Any]:
    """Logits without tokens that stand for no text."""
    import numpy as np

    hidden = list(told.get("suppress_tokens") or ())
    if step == 0:
        hidden += told.get("begin_suppress_tokens") or ()
    changed = np.array(logits)
    if hidden:
        changed[:, hidden] = -np.inf
    times = told.get("no_timestamps_token_id")
    if isinstance(times, int):
        # What follows are times.
        changed[:, times:] = -np.inf
    return changed
