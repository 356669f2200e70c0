"""Rebuilds the tokenizer of a GGUF file from its metadata, and proves that it is the file's.

transformers' own conversion is wrong for several files: it adds a beginning-of-sequence token that the
file does not ask for, takes the end token from elsewhere, and turns scored vocabularies into Unigram
models where SentencePiece BPE is meant. Splitting rules follow llama.cpp's ``llama-vocab.cpp``, which
defines what the names in ``tokenizer.ggml.pre`` mean. A name that is not known here is refused, because a
wrong rule gives a tokenizer that works on most text and is wrong on the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from onnxsmith.errors import TokenizerError, UnknownNameError, require
from onnxsmith.gguf_file import GgufFile

__all__ = ["build_tokenizer", "check_tokenizer", "special_token_ids"]

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_PUNCTUATION = r"[\p{P}\$\+<=>\^~\|]+"
_DIGIT = r"\p{N}"
_DIGITS3 = r"\p{N}{1,3}"

# tokenizer.ggml.pre -> regular expressions, applied one after the other.
_SPLITS: Mapping[str, tuple[str, ...]] = {
    # Also where the key is missing: what llama.cpp then does, whatever the model was trained with.
    "default": (_PUNCTUATION, _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "phi-2": (_GPT2,),
    "olmo": (_GPT2,),
    "jais": (_GPT2,),
    "mpt": (_GPT2,),
    "smollm": (_DIGIT, _GPT2),
    "starcoder": (_DIGIT, _GPT2),
    "refact": (_DIGIT, _GPT2),
    "command-r": (_DIGIT, _GPT2),
    "codeshell": (_DIGIT, _GPT2),
    "exaone": (_DIGIT, _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "falcon3": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
    "stablelm2": (_QWEN2,),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-v3": (
        _DIGITS3,
        r"[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}

# For these llama.cpp takes a whole word that is a token as that token, and adds a beginning token unless the
# file says not to.
_LLAMA3_RULES = frozenset({"llama-bpe", "llama3", "llama-v3", "falcon3"})

# Texts that have broken tokenizers before: leading and double spaces, digits, accents, other scripts,
# characters outside the basic plane, line ends, tabs, code, no text.
_PROBES = (
    "Hello, world!  It's 42.\n",
    "The capital of France is",
    " leading space",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f642\n\n\tdef f(x):\n    return x**2 - 3.14159",
    "\u0417\u0434\u0440\u0430\u0432\u0441\u0442\u0432\u0443\u0439\u0442\u0435, "
    "\u0645\u0631\u062d\u0628\u0627, \u0928\u092e\u0938\u094d\u0924\u0947",
    "1234567890 and 1,000,000.00",
    "\r\nWindows line\r\n",
    "",
)  # fmt: skip


def special_token_ids(gguf: GgufFile) -> dict[str, int | None]:
    """The ids of the beginning, end, unknown and padding tokens that the file names.

    Raises:
        TokenizerError: An id that is not in the vocabulary.
    """
    tokens = _tokens(gguf)
    keys = {
        "bos": "bos_token_id",
        "eos": "eos_token_id",
        "unk": "unknown_token_id",
        "pad": "padding_token_id",
    }
    ids: dict[str, int | None] = {}
    for name, key in keys.items():
        value = gguf.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and not (isinstance(value, int) and 0 <= value < len(tokens)):
            raise TokenizerError(
                f"{gguf.path}: tokenizer.ggml.{key}", got=f"{value!r}", expected=f"0 to {len(tokens) - 1}"
            )
        ids[name] = value
    return ids


def build_tokenizer(gguf: GgufFile) -> Any:
    """Builds the file's tokenizer as a ``PreTrainedTokenizerFast`` and checks it.

    Raises:
        TokenizerError: The file lacks what is needed, uses a rule that is not known, or the result does
            not pass ``check_tokenizer``.
    """
    transformers = require("transformers", purpose="building a tokenizer")
    tokenizers = require("tokenizers", purpose="building a tokenizer")
    kind = gguf.metadata.get("tokenizer.ggml.model")
    builders = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}
    if kind not in builders:
        raise UnknownNameError(
            f"{gguf.path}: tokenizer.ggml.model", name=str(kind), known=builders, kind="tokenizer model"
        )
    tokens, types = _tokens(gguf), _types(gguf)
    backend = builders[kind](gguf, tokens, types)
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(text, special=True, normalized=False)
            for text, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )
    backend.add_tokens(
        [
            tokenizers.AddedToken(text, special=False, normalized=False)
            for text, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )
    ids = special_token_ids(gguf)
    _add_template(backend, gguf, tokens, ids)
    length = gguf.metadata.get(f"{gguf.metadata.get('general.architecture')}.context_length")
    named = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    if "pad_token" not in named and "eos_token" in named:
        named["pad_token"] = named["eos_token"]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        chat_template=gguf.metadata.get("tokenizer.chat_template"),
        **({"model_max_length": length} if isinstance(length, int) else {}),
        **named,
    )
    check_tokenizer(tokenizer, gguf)
    return tokenizer


def _add_template(backend: Any, gguf: GgufFile, tokens: list[str], ids: Mapping[str, int | None]) -> None:
    """Puts the beginning and end tokens around a text where the file asks for them."""
    tokenizers = require("tokenizers", purpose="building a tokenizer")
    by_rule = gguf.metadata.get("tokenizer.ggml.pre") in _LLAMA3_RULES
    defaults = {"bos": gguf.metadata.get("tokenizer.ggml.model") == "llama" or by_rule, "eos": False}
    around: dict[str, list[tuple[str, int]]] = {}
    for name, default in defaults.items():
        index = ids[name]
        wanted = gguf.metadata.get(f"tokenizer.ggml.add_{name}_token", default) and index is not None
        around[name] = [(tokens[index], index)] if wanted and index is not None else []
    before, after = ([text for text, _ in around[name]] for name in ("bos", "eos"))
    if not before and not after:
        return
    try:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *before, "$B", *after],
            special_tokens=[*around["bos"], *around["eos"]],
        )
    except ValueError as error:
        raise TokenizerError(
            f"{gguf.path}: tokenizer.ggml.add_bos_token", got=f"a token that has no template: {error}"
        ) from error


def check_tokenizer(tokenizer: Any, gguf: GgufFile) -> None:
    """Proves that a tokenizer is the one that a GGUF file describes.

    Every id has the file's text, every control token encodes to its own id alone, the special tokens are
    the file's, and text survives encode and decode.

    Raises:
        TokenizerError: One of these does not hold.
    """
    where = f"{gguf.path}: tokenizer"
    tokens, types = _tokens(gguf), _types(gguf)
    if len(tokenizer) != len(tokens):
        raise TokenizerError(where, got=f"{len(tokenizer)} tokens", expected=f"the file's {len(tokens)}")
    rebuilt = tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    for index, (got, expected) in enumerate(zip(rebuilt, tokens, strict=True)):
        if got != expected:
            raise TokenizerError(where, got=f"token {index} is {got!r}", expected=f"{expected!r}")
    for name, special in special_token_ids(gguf).items():
        if special is not None and getattr(tokenizer, f"{name}_token_id") != special:
            raise TokenizerError(
                where, got=f"{name} token is {getattr(tokenizer, f'{name}_token_id')}", expected=f"{special}"
            )
    for index, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == _CONTROL:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if ids != [index]:
                raise TokenizerError(
                    where, got=f"control token {text!r} encodes to {ids}", expected=f"[{index}]"
                )
    for probe in _PROBES:
        ids = tokenizer.encode(probe, add_special_tokens=False)
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back != probe:
            raise TokenizerError(
                where,
                got=f"{probe!r} comes back from encode and decode as {back!r}",
                expected="the same text",
                remedy="Convert the model from its original tokenizer files instead",
            )


def _tokens(gguf: GgufFile) -> list[str]:
    tokens = gguf.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
        raise TokenizerError(
            f"{gguf.path}: tokenizer.ggml.tokens", got="no list of texts", expected="the vocabulary"
        )
    if len(set(tokens)) != len(tokens):
        raise TokenizerError(
            f"{gguf.path}: tokenizer.ggml.tokens", got="a text twice", expected="distinct texts"
        )
    return tokens


def _types(gguf: GgufFile) -> list[int]:
    tokens = _tokens(gguf)
    types = gguf.metadata.get("tokenizer.ggml.token_type", [_NORMAL] * len(tokens))
    if not isinstance(types, list) or len(types) != len(tokens):
        raise TokenizerError(
            f"{gguf.path}: tokenizer.ggml.token_type", got="another length", expected=f"{len(tokens)} entries"
        )
    return types


def _byte_level_bpe(gguf: GgufFile, tokens: list[str], types: list[int]) -> Any:
    tokenizers = require("tokenizers", purpose="building a tokenizer")
    merges = gguf.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not merges:
        raise TokenizerError(
            f"{gguf.path}: tokenizer.ggml.merges", got="nothing", expected="the merges of the BPE"
        )
    pairs = [tuple(str(merge).split(" ")) for merge in merges]
    wrong = next((m for m, pair in zip(merges, pairs, strict=True) if len(pair) != 2), None)
    if wrong is not None:
        raise TokenizerError(f"{gguf.path}: tokenizer.ggml.merges", got=f"{wrong!r}", expected="two texts")
    rule = gguf.metadata.get("tokenizer.ggml.pre", "default")
    if rule not in _SPLITS:
        raise TokenizerError(
            f"{gguf.path}: tokenizer.ggml.pre",
            got=f"the splitting rule {rule!r}",
            expected=f"one of {', '.join(sorted(_SPLITS))}",
            remedy="Convert the model from its original Hugging Face directory instead",
        )
    vocabulary = {text: index for index, text in enumerate(tokens)}
    backend = tokenizers.Tokenizer(_bpe(gguf, vocabulary, pairs, ignore_merges=rule in _LLAMA3_RULES))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            *(
                tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
                for pattern in _SPLITS[rule]
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    return backend


def _sentencepiece_bpe(gguf: GgufFile, tokens: list[str], types: list[int]) -> Any:
    tokenizers = require("tokenizers", purpose="building a tokenizer")
    where = f"{gguf.path}: tokenizer.ggml.scores"
    scores = gguf.metadata.get("tokenizer.ggml.scores")
    # NaN has no rank and would make the order of the merges one of chance.
    if (
        not isinstance(scores, list)
        or len(scores) != len(tokens)
        or not all(isinstance(score, float) and math.isfinite(score) for score in scores)
    ):
        raise TokenizerError(where, got="no scores", expected=f"{len(tokens)} finite numbers")
    vocabulary = {text: index for index, text in enumerate(tokens)}
    backend = tokenizers.Tokenizer(
        _bpe(
            gguf,
            vocabulary,
            _merges_from_scores(where, tokens, types, scores),
            byte_fallback=_BYTE in types,
            fuse_unk=True,
            unk_token=next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None),
        )
    )
    prefix = gguf.metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizers = [tokenizers.normalizers.Replace(" ", "\u2581")]
    decoders = [
        tokenizers.decoders.Replace("\u2581", " "),
        tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(),
    ]
    if prefix:
        normalizers.insert(0, tokenizers.normalizers.Prepend("\u2581"))
        decoders.append(tokenizers.decoders.Strip(content=" ", left=1, right=0))
    backend.normalizer = tokenizers.normalizers.Sequence(normalizers)
    backend.decoder = tokenizers.decoders.Sequence(decoders)
    return backend


def _bpe(gguf: GgufFile, vocabulary: dict[str, int], merges: list[Any], **options: Any) -> Any:
    tokenizers = require("tokenizers", purpose="building a tokenizer")
    try:
        return tokenizers.models.BPE(vocabulary, merges, **options)
    except Exception as error:  # the Rust side raises bare Exception for a merge outside the vocabulary
        raise TokenizerError(
            f"{gguf.path}: tokenizer.ggml.merges", got=str(error), expected="merges of the vocabulary"
        ) from error


def _merges_from_scores(
    where: str, tokens: list[str], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """The merges of a SentencePiece BPE: each way to make a piece of two others, best score first.

    SentencePiece merges the adjacent pair whose *result* has the highest score, and of equal ones the first
    in the text, so a pair's rank is the score of the piece that it makes (Kudo and Richardson 2018,
    bpe_model.cc). In which order the ways to make one piece stand does not matter: two of them can only
    compete for the same characters in a state that merging from the left never reaches (also fuzzed against
    sentencepiece). Two different pieces of one score do compete, and no list of ranks can say "the first in
    the text". User-defined pieces are found before anything is merged.

    Raises:
        TokenizerError: Two pieces have the same score.
    """
    normal = {t: s for t, kind, s in zip(tokens, types, scores, strict=True) if kind == _NORMAL}
    ranked: list[tuple[float, str, str]] = []
    made: dict[float, str] = {}
    for piece, score in normal.items():
        ways = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        found = [(-score, left, right) for left, right in ways if left in normal and right in normal]
        if found and made.setdefault(score, piece) != piece:
            raise TokenizerError(
                where,
                got=f"{made[score]!r} and {piece!r} both have the score {score:g}",
                expected="scores that rank the pieces of a BPE",
                remedy="Convert the model from its original tokenizer files instead",
            )
        ranked += found
    return [(left, right) for _, left, right in sorted(ranked)]
