"""From a prompt to text: tokens, chat templates, stop strings, streaming."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxsmith.errors import BadInputError, FeedError, TokenizerError
from onnxsmith.package import ModelPackage, cache_pairs
from onnxsmith.package_io import load_files, load_package
from onnxsmith.pipeline.sequence_generation import is_encoder_decoder, sequence_tokens
from onnxsmith.pipeline.tokenization import PackageTokenizer

if TYPE_CHECKING:
    from onnxsmith.runtime import LookupSettings, SamplingSettings
    from onnxsmith.runtime.graph_file import GraphFile

__all__ = ["Generated", "TextStream", "chat_prompt", "generate_text", "generate_texts"]


class TextStream:
    """Turns tokens into text as soon as it is certain, and ends it at a stop string."""

    def __init__(self, tokenizer: PackageTokenizer, prompt: list[int], stops: Sequence[str] = ()) -> None:
        """Starts after a prompt."""
        self._tokenizer = tokenizer
        self._prompt = prompt
        self._stops = tuple(stops)
        self._shown = 0
        self.ids: list[int] = []
        self.text = ""
        self.ended = False

    def add(self, token: int) -> str:
        """Takes a token and gives the text that became certain.

        That is none while a character is incomplete, or while a stop string may have begun.
        """
        self.ids.append(token)
        text = self._tokenizer.continuation(self._prompt, self.ids)
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.text, self.ended = text[: min(found)], True
            return self._show(len(self.text))
        # A token may end in the middle of a character, which decodes to U+FFFD until the rest is there.
        if text.endswith("\ufffd") or not text.startswith(self.text[: self._shown]):
            return ""
        self.text = text
        return self._show(len(text) - self._begun(text))

    def finish(self) -> str:
        """The rest, when no more tokens come."""
        if self.ended:
            return ""
        text = self._tokenizer.continuation(self._prompt, self.ids)
        if len(text) >= self._shown:
            self.text = text
        return self._show(len(self.text))

    def _show(self, until: int) -> str:
        piece = self.text[self._shown : until]
        self._shown = max(self._shown, until)
        return piece

    def _begun(self, text: str) -> int:
        """How many characters at the end could be the beginning of a stop string."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
        )


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuation of one prompt.

    Attributes:
        prompt: As it was given.
        text: What was generated, without the stop string.
        tokens: How many tokens were generated.
        finish: ``stop`` or ``length``.
    """

    prompt: str
    text: str
    tokens: int
    finish: str


def chat_prompt(package: ModelPackage, message: str, *, system: str | None = None) -> str:
    """A message in the form in which the model was taught to answer.

    The template is a program of the model's author, so it runs in jinja2's sandbox.

    Args:
        package: The model with its tokenizer configuration.
        message: What the user says.
        system: What the model is told beforehand.

    Raises:
        TokenizerError: There is no chat template, or it fails.
    """
    import jinja2
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        config: Any = json.loads(package.files.get("tokenizer_config.json", b"{}"))
    except ValueError as error:
        raise TokenizerError(
            "tokenizer_config.json", got=f"cannot be read: {error}", expected="JSON"
        ) from error
    template = _template(package, config)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": message})
    special = {
        name: value["content"] if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name.endswith("_token") and isinstance(value, str | Mapping)
    }

    def refuse(text: str) -> None:
        raise jinja2.TemplateError(text)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], autoescape=False
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
    try:
        made = environment.from_string(template)
        return str(made.render(messages=messages, add_generation_prompt=True, **special))
    except (jinja2.TemplateError, TypeError, ValueError, RecursionError, OverflowError) as error:
        raise TokenizerError(
            "chat template", got=f"it fails: {error}", expected="a template for these messages"
        ) from error


def _template(package: ModelPackage, config: Mapping[str, Any]) -> str:
    content = package.files.get("chat_template.jinja")
    if content is not None:
        return content.decode("utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several, by name.
        named = {e.get("name"): e.get("template") for e in template if isinstance(e, Mapping)}
        template = named.get("default")
    if not isinstance(template, str):
        raise TokenizerError(
            "chat template",
            got="the model has none",
            expected="chat_template.jinja, or chat_template in tokenizer_config.json",
            remedy="Leave out --chat",
        )
    return template


def generate_text(
    model: Path,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    provider: str = "cpu",
    sampling: SamplingSettings | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    speculation: LookupSettings | None = None,
) -> Iterator[str]:
    """Continues a text, piece by piece.

    Args:
        model: An artifact or ONNX file with a tokenizer.
        prompt: The text to continue; with ``chat``, the message to answer.
        max_new_tokens: Upper bound of tokens.
        provider: Execution provider.
        sampling: How tokens are chosen; greedy where None.
        stop: Strings that end the text; they are not given back.
        chat: Whether the prompt goes through the model's chat template.
        system: With ``chat``, what the model is told beforehand.
        speculation: Whether the model checks guesses of several tokens at once; the text stays the same.

    Yields:
        Text, as soon as it is certain: characters of several tokens come when they are whole.

    Raises:
        OnnxsmithError: The model is no decoder, or has no tokenizer.
    """
    from onnxsmith.runtime import OrtBackend, generate

    package, tokenizer, graph = _open(model, max_new_tokens, stop)
    if is_encoder_decoder(package):
        _refuse_for_sequences(chat, system, speculation)
        answer = TextStream(tokenizer, [], stop)
        for token in sequence_tokens(
            package, tokenizer, prompt, max_new_tokens=max_new_tokens, provider=provider, sampling=sampling
        ):
            piece = answer.add(token)
            if piece:
                yield piece
            if answer.ended:
                return
        yield from filter(None, [answer.finish()])
        return
    ids = _ids(package, tokenizer, prompt, chat=chat, system=system)
    stream = TextStream(tokenizer, ids, stop)
    with OrtBackend(provider).open(graph or package, name=str(model)) as session:
        for token in generate(
            session, ids, max_new_tokens=max_new_tokens, stop=tokenizer.stop_ids, sampling=sampling,
            speculation=speculation,
        ):  # fmt: skip
            piece = stream.add(token)
            if piece:
                yield piece
            if stream.ended:
                return
    rest = stream.finish()
    if rest:
        yield rest


def generate_texts(
    model: Path,
    prompts: Sequence[str],
    *,
    batch: int = 8,
    max_new_tokens: int = 64,
    provider: str = "cpu",
    sampling: SamplingSettings | None = None,
    stop: Sequence[str] = (),
    chat: bool = False,
    system: str | None = None,
    speculation: LookupSettings | None = None,
) -> Iterator[Generated]:
    """Continues many texts, ``batch`` of them at once; see ``generate_text`` for the other arguments.

    Guesses are checked for one text at a time, so with ``speculation`` the batch has to be 1.

    Yields:
        One result for each prompt, in their order, as soon as its batch is done.

    Raises:
        OnnxsmithError: The model is no decoder, or has no tokenizer.
    """
    from onnxsmith.runtime import OrtBackend, generate, generate_batch, room_for

    if batch < 1:
        raise BadInputError("generate: --batch", got=str(batch), expected="at least 1")
    if speculation is not None and batch > 1:
        raise BadInputError(
            "generate: --speculate",
            got=f"{batch} prompts at once",
            expected="one at a time: rows of a batch accept different numbers of guesses",
            remedy="Give --batch 1, or leave out --speculate",
        )
    package, tokenizer, graph = _open(model, max_new_tokens, stop)
    if is_encoder_decoder(package):
        _refuse_for_sequences(chat, system, speculation)
        options: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "provider": provider,
            "sampling": sampling,
        }
        for text in prompts:
            answer = TextStream(tokenizer, [], stop)
            for new in sequence_tokens(package, tokenizer, text, **options):
                answer.add(new)
                if answer.ended:
                    break
            answer.finish()
            over = answer.ended or len(answer.ids) < max_new_tokens or answer.ids[-1] in tokenizer.stop_ids
            yield Generated(text, answer.text, len(answer.ids), "stop" if over else "length")
        return
    with OrtBackend(provider).open(graph or package, name=str(model)) as session:
        for begin in range(0, len(prompts), batch):
            part = prompts[begin : begin + batch]
            rows = [_ids(package, tokenizer, prompt, chat=chat, system=system) for prompt in part]
            streams = [TextStream(tokenizer, ids, stop) for ids in rows]
            ended = [False] * len(rows)
            # They end where the model has no more positions.
            most = room_for(session, rows, max_new_tokens)
            options = {"max_new_tokens": most, "stop": tokenizer.stop_ids, "sampling": sampling}
            steps = (
                generate_batch(session, rows, **options)
                if speculation is None
                else ([token] for token in generate(session, rows[0], speculation=speculation, **options))
            )
            for tokens in steps:
                for number, token in enumerate(tokens):
                    if token is None or streams[number].ended:
                        ended[number] = True
                    else:
                        streams[number].add(token)
                if all(stream.ended for stream in streams):
                    break
            for prompt, stream, done in zip(part, streams, ended, strict=True):
                stream.finish()
                over = done or stream.ended or len(stream.ids) < most
                yield Generated(prompt, stream.text, len(stream.ids), "stop" if over else "length")


def _open(
    model: Path, max_new_tokens: int, stop: Sequence[str]
) -> tuple[ModelPackage, PackageTokenizer, GraphFile | None]:
    """The package, or its files alone where its graph is a known decoder, which is the third then."""
    from onnxsmith.runtime.graph_file import GraphFile

    if max_new_tokens < 1:
        raise BadInputError("generate: --max-new-tokens", got=str(max_new_tokens), expected="at least 1")
    if not all(stop):
        raise BadInputError("generate: --stop", got="an empty string", expected="a text to stop at")
    graph = GraphFile.known(model)
    if graph is not None and cache_pairs(graph.inputs, graph.outputs):
        package = ModelPackage({}, files=load_files(model))
        return package, PackageTokenizer(package), graph
    package = load_package(model)
    cached = any(cache_pairs(c.inputs, c.outputs) for c in package.components.values())
    if not cached and not is_encoder_decoder(package):
        raise FeedError(
            str(model), got="a model without a KV cache", expected="a decoder with past_key_values.*"
        )
    if len(package.components) > 1:
        return package, PackageTokenizer(package), None
    graph = GraphFile.of(package, name=str(model))
    graph.remember(package)
    return package, PackageTokenizer(package), graph


def _refuse_for_sequences(chat: bool, system: str | None, speculation: LookupSettings | None) -> None:
    if speculation is not None:
        raise BadInputError(
            "generate: --speculate", got="an encoder-decoder", expected="a decoder, which continues a text"
        )
    if chat or system is not None:
        raise BadInputError(
            "generate", got="--chat or --system for an encoder-decoder", expected="the text that it reads"
        )


def _ids(
    package: ModelPackage, tokenizer: PackageTokenizer, prompt: str, *, chat: bool, system: str | None
) -> list[int]:
    if not chat:
        if system is not None:
            raise BadInputError(
                "generate: --system", got="a system message without --chat", expected="both or none"
            )
        return tokenizer.encode(prompt)
    # The template writes the special tokens itself.
    return tokenizer.encode(chat_prompt(package, prompt, system=system), special_tokens=False)
