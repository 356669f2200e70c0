"""Sound for speech models: files, sampling rates, spectrograms; and what a tiny Whisper writes down."""

from __future__ import annotations

import json
import re
import struct
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from onnxsmith.errors import BadInputError, FeedError, OnnxsmithError
from onnxsmith.pipeline.cli import app
from onnxsmith.pipeline.sound import MelSettings, log_mel, pieces_of, read_wav, resampled
from onnxsmith.pipeline.transcription import transcribe


def tone(seconds: float, rate: int, hertz: float = 440.0) -> np.ndarray:
    found: np.ndarray = np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    return 0.5 * found.astype(np.float32)


def wav(path: Path, samples: np.ndarray, rate: int, width: int = 2, channels: int = 1) -> Path:
    """Written by Python's own module, each sample once for each channel."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        numbers = np.round(np.repeat(samples, channels).astype(np.float64) * (2 ** (8 * width - 1) - 1))
        if width == 1:
            data = (numbers + 128).astype(np.uint8).tobytes()
        else:
            data = b"".join(int(n).to_bytes(width, "little", signed=True) for n in numbers)
        file.writeframes(data)
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_integers_of_all_widths_are_read(tmp_path: Path, width: int, channels: int) -> None:
    samples = tone(0.05, 8000)
    found, rate = read_wav(wav(tmp_path / "a.wav", samples, 8000, width, channels))
    assert rate == 8000 and found.dtype == np.float32
    np.testing.assert_allclose(found, samples, atol=1.5 / 2 ** (8 * width - 1))


def test_floats_behind_other_parts_are_read(tmp_path: Path) -> None:
    samples = tone(0.01, 16000)
    layout = struct.pack("<HHIIHH", 3, 1, 16000, 64000, 4, 32)
    parts = [(b"LIST", b"odd"), (b"fmt ", layout), (b"data", samples.tobytes())]
    body = b"".join(n + struct.pack("<I", len(b)) + b + b"\0" * (len(b) % 2) for n, b in parts)
    path = tmp_path / "a.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body) + 4) + b"WAVE" + body)
    np.testing.assert_array_equal(read_wav(path)[0], samples)


def test_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    with pytest.raises(BadInputError, match="cannot be read: No such file"):
        read_wav(path)
    path.write_bytes(b"ID3 this is another format")
    with pytest.raises(BadInputError, match=r"no WAV file; expected uncompressed sound.*ffmpeg"):
        read_wav(path)
    path.write_bytes(b"RIFF\0\0\0\0WAVE")
    with pytest.raises(BadInputError, match="a WAV file without sound in it"):
        read_wav(path)
    with pytest.raises(BadInputError, match="a WAV file without samples"):
        read_wav(wav(path, tone(0, 8000), 8000))
    # A-law, as telephones have it.
    data = bytearray(wav(path, tone(0.01, 8000), 8000).read_bytes())
    struct.pack_into("<H", data, 20, 6)
    path.write_bytes(bytes(data))
    with pytest.raises(BadInputError, match="1 channels of format 6 with 16 bits"):
        read_wav(path)


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (16000, 16000), (22050, 16000)])
def test_other_rates_are_what_scipy_makes_of_them(rate: int, wanted: int) -> None:
    signal = pytest.importorskip("scipy.signal")
    samples = np.random.default_rng(0).standard_normal(3001).astype(np.float32)
    expected = signal.resample_poly(samples.astype(np.float64), wanted, rate)
    found = resampled(samples, rate, wanted)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(("bins", "seconds"), [(80, 1.3), (128, 31.0)])
def test_the_spectrogram_is_that_of_transformers(bins: int, seconds: float) -> None:
    transformers = pytest.importorskip("transformers")
    samples = np.random.default_rng(0).standard_normal(int(16000 * seconds)).astype(np.float32) * 0.1
    extractor = transformers.WhisperFeatureExtractor(feature_size=bins)
    expected = extractor(samples, sampling_rate=16000, return_tensors="np").input_features
    settings = MelSettings.of({"num_mel_bins": bins}, {})
    assert settings == MelSettings.of({}, json.loads(extractor.to_json_string()))
    found = log_mel(samples, settings)
    assert found.shape == expected.shape == (1, bins, 3000)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_long_recordings_are_cut_in_pauses() -> None:
    settings = MelSettings(80)
    samples = tone(75, 16000)
    samples[25 * 16000 : 26 * 16000] = 0
    pieces = pieces_of(samples, settings)
    np.testing.assert_array_equal(np.concatenate(pieces), samples)
    assert all(0 < len(piece) <= settings.samples for piece in pieces)
    assert 25 * 16000 < len(pieces[0]) < 26 * 16000
    assert len(pieces_of(samples[: settings.samples], settings)) == 1


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random Whisper that knows two languages, with a tokenizer, and its artifact."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    from onnxsmith import export_model

    root = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(3)
    vocabulary = {f"w{n}": n for n in range(90)}
    special = [
        "<|endoftext|>",
        "<|startoftranscript|>",
        "<|en|>",
        "<|de|>",
        "<|transcribe|>",
        "<|notimestamps|>",
    ]
    vocabulary |= {name: 90 + n for n, name in enumerate(special)}
    config = transformers.WhisperConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.5,
        max_source_positions=30, max_target_positions=24, num_mel_bins=16, pad_token_id=90, bos_token_id=90,
        eos_token_id=90, decoder_start_token_id=91,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    model.generation_config = transformers.GenerationConfig(
        decoder_start_token_id=91, bos_token_id=90, eos_token_id=90, pad_token_id=90, max_length=24,
        # Random as it is, it would say them; a trained one never does.
        suppress_tokens=[1, 2, 91, 92, 93, 94, 95], begin_suppress_tokens=[90], is_multilingual=True,
        lang_to_id={"<|en|>": 92, "<|de|>": 93}, task_to_id={"transcribe": 94}, no_timestamps_token_id=95,
    )  # fmt: skip
    model.save_pretrained(root / "model")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(special)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    fast.save_pretrained(root / "model")
    (root / "model" / "preprocessor_config.json").write_text(
        json.dumps({"feature_size": 16, "n_fft": 400, "hop_length": 160, "sampling_rate": 16000})
    )
    _, comparison = export_model(str(root / "model"), root / "artifact")
    assert comparison is not None and comparison.passed
    return model, root / "artifact"


def heard_by_torch(model: Any, samples: np.ndarray, **options: Any) -> list[int]:
    import torch

    features = torch.from_numpy(log_mel(samples, MelSettings(16, frames=60)))
    with torch.no_grad():
        return [int(n) for n in model.generate(features, num_beams=1, do_sample=False, **options)[0]]


@pytest.mark.parametrize("language", [None, "de"])
def test_what_is_said_is_what_transformers_writes(
    whisper: tuple[Any, Path], tmp_path: Path, language: str | None
) -> None:
    model, artifact = whisper
    samples = tone(0.4, 16000)
    path = wav(tmp_path / "a.wav", samples, 16000, 4)
    text = "".join(transcribe(artifact, path, language=language))
    ids = heard_by_torch(model, read_wav(path)[0], task="transcribe", language=language)
    expected = " ".join(f"w{n}" for n in ids if n < 90)
    assert text == expected and len(text.split()) > 3
    options = ["--language", language] if language else []
    done = CliRunner().invoke(app, ["generate", str(artifact), "--audio", str(path), *options, "--json", "-"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["text"] == text


def test_parts_of_a_recording_are_joined_with_a_space(whisper: tuple[Any, Path], tmp_path: Path) -> None:
    _, artifact = whisper
    path = wav(tmp_path / "a.wav", tone(1.5, 16000), 16000)
    parts = pieces_of(read_wav(path)[0], MelSettings(16, frames=60))
    assert len(parts) > 2
    each = []
    for number, part in enumerate(parts):
        one = wav(tmp_path / f"{number}.wav", part, 16000, 4)
        each.append("".join(transcribe(artifact, one, max_new_tokens=3)))
    assert "".join(transcribe(artifact, path, max_new_tokens=3)).split() == " ".join(each).split()


def test_bad_input_is_refused(whisper: tuple[Any, Path], tiny_artifact_dir: Path, tmp_path: Path) -> None:
    _, artifact = whisper
    path = wav(tmp_path / "a.wav", tone(0.1, 8000), 8000)
    with pytest.raises(OnnxsmithError, match=r"unknown language 'fr'.*de, en"):
        list(transcribe(artifact, path, language="fr"))
    with pytest.raises(FeedError, match="a model of the kind llama; expected Whisper"):
        list(transcribe(tiny_artifact_dir, path))
    run = CliRunner().invoke
    for options, message in (
        (["--audio", str(path), "hello"], "a prompt and --audio"),
        (["hello", "--language", "de"], "--language: no --audio"),
        (["--audio", str(path), "--temperature", "1"], "options of sampling or of chats"),
        (["--audio", str(path), "--max-new-tokens", "0"], "--max-new-tokens: 0"),
        (["--audio", str(tmp_path / "no.wav")], "cannot be read"),
    ):
        done = run(app, ["generate", str(artifact), *options])
        assert done.exit_code == 2 and re.search(message, done.output), done.output
