"""The commands that run models to judge them or to use them."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from onnxsmith.errors import BadInputError
from onnxsmith.pipeline.arguments import Json, Model, Providers, RequireProvider, tolerance_of
from onnxsmith.pipeline.ending import FAILED, INTERRUPTED, guarded

__all__ = ["JUDGING_COMMANDS"]


@guarded
def compare(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="A PyTorch source or an ONNX model.")],
    candidates: Annotated[
        list[Path], typer.Argument(metavar="CANDIDATE...", help="Artifacts or .onnx files.")
    ],
    provider: Providers = None,
    require_provider: RequireProvider = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Inputs to use, one array for each.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Number of made-up cases; all kinds by default.")
    ] = None,
    atol: Annotated[float | None, typer.Option(metavar="X", help="Absolute tolerance.")] = None,
    rtol: Annotated[
        float | None,
        typer.Option(
            metavar="X", help="Tolerance relative to the largest magnitude of the reference tensor."
        ),
    ] = None,
    min_cosine: Annotated[float | None, typer.Option(metavar="X", help="Least cosine similarity.")] = None,
    max_kl: Annotated[
        float | None, typer.Option(metavar="X", help="Highest KL divergence of logits, in nats.")
    ] = None,
    min_top1: Annotated[
        float | None, typer.Option(metavar="X", help="Least share of equal most likely tokens.")
    ] = None,
    tolerance: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="Bounds of float32, float16, int8, int4; the candidate's own by default.",
        ),
    ] = None,
    task: Annotated[str | None, typer.Option(metavar="T", help="Task of a PyTorch reference.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the made-up inputs.")] = 0,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html", help="Trace every tensor, and write a page with the error by depth."
        ),
    ] = None,
    json_target: Json = None,
) -> int:
    """Compare models with a reference on the same inputs; exit status 1 if any differs."""
    from onnxsmith.comparison import Comparison
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.operations import compare_models
    from onnxsmith.pipeline.tables import show_comparisons

    results: list[Comparison] = []
    interrupted = False
    try:
        compare_models(
            reference,
            candidates,
            providers=provider or ["cpu"],
            requirements=require_provider or (),
            inputs=inputs,
            samples=samples,
            tolerance=tolerance_of(atol, rtol, min_cosine=min_cosine, max_kl=max_kl, min_top1=min_top1),
            precision=tolerance,
            task=task,
            seed=seed,
            on_result=results.append,
            progress=progress_for(),
        )
    except KeyboardInterrupt:
        if not results:
            raise
        interrupted = True
    passed = bool(results) and all(result.passed for result in results) and not interrupted
    if json_target:
        comparisons = [r.to_json() for r in results]
        body = {"passed": passed, "interrupted": interrupted, "comparisons": comparisons}
        emit_json(json_target, "compare", body)
    if json_target != "-":
        show_comparisons(results)
    if not interrupted and any(not tensor.passed for result in results for tensor in result.tensors):
        message("onnxsmith: `onnxsmith bisect REFERENCE CANDIDATE` finds the node that makes the difference")
    if report is not None and not interrupted:
        from onnxsmith.pipeline.bisecting import bisect_models
        from onnxsmith.pipeline.depth_page import write_depth_page

        traced = [
            bisect_models(
                reference, candidate, provider=one, samples=samples, inputs=inputs, task=task, seed=seed,
                progress=progress_for(),
            )
            for candidate in candidates
            for one in provider or ["cpu"]
        ]  # fmt: skip
        write_depth_page(report, traced)
    if interrupted:
        message("onnxsmith: interrupted; what was compared until then is above")
        return INTERRUPTED
    return 0 if passed else FAILED


@guarded
def bisect(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="A PyTorch source or an ONNX model.")],
    candidate: Annotated[Path, typer.Argument(metavar="CANDIDATE", help="An artifact or an .onnx file.")],
    component: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which graph, where the candidate has several.")
    ] = None,
    provider: Annotated[str, typer.Option(metavar="P", help="Execution provider of the candidate.")] = "cpu",
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Number of made-up cases. [default: 4]")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Inputs to use, one array for each.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Write the smallest model and inputs that show the fault."
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Write a page with the error by depth.")
    ] = None,
    atol: Annotated[float | None, typer.Option(metavar="X", help="Absolute tolerance.")] = None,
    rtol: Annotated[float | None, typer.Option(metavar="X", help="Tolerance relative to the tensor.")] = None,
    task: Annotated[str | None, typer.Option(metavar="T", help="Task of a PyTorch reference.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the made-up inputs.")] = 0,
    json_target: Json = None,
) -> int:
    """Find the first tensors that diverge and the node to blame; exit status 1 if there is one."""
    from onnxsmith.pipeline.bisecting import bisect_models
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.judgement_tables import show_divergence

    result = bisect_models(
        reference,
        candidate,
        component=component,
        provider=provider,
        samples=samples,
        inputs=inputs,
        output=output,
        tolerance=tolerance_of(atol, rtol),
        task=task,
        seed=seed,
        progress=progress_for(),
        on_interrupt=lambda: message("onnxsmith: interrupted; what was compared until then is put in order"),
    )
    if output is not None and result.reproduction is not None:
        # It was made beside its place and moved there.
        result = dataclasses.replace(
            result, reproduction=dataclasses.replace(result.reproduction, directory=output)
        )
    if report is not None:
        from onnxsmith.pipeline.depth_page import write_depth_page

        write_depth_page(report, [result])
    if json_target:
        emit_json(json_target, "bisect", result.to_json())
    if json_target != "-":
        show_divergence(result)
    if result.interrupted:
        return INTERRUPTED
    return 0 if result.passed else FAILED


@guarded
def evaluate(
    model: Model,
    task: Annotated[str, typer.Option(metavar="T", help="What the model does, such as text-classification.")],
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE|DIR|DATASET", help="Labelled rows: a file, a directory, or hf:NAME of a data set."
        ),
    ],
    metric: Annotated[
        list[str] | None, typer.Option(metavar="M", help="May be repeated; the task's usual ones by default.")
    ] = None,
    provider: Providers = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="A PyTorch source or ONNX model to test the differences to."),
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(metavar="ROLE=NAME", help="Which column is what; may be repeated.")
    ] = None,
    split: Annotated[str, typer.Option(metavar="S", help="Of a data set or a directory.")] = "test",
    limit: Annotated[int | None, typer.Option(metavar="N", help="Rows to use; all by default.")] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Rows at once.")] = 16,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Tokens of a row, at most.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens to generate for a target.")] = 64,
    train_share: Annotated[
        float, typer.Option(metavar="X", help="Rows that the probe on features is trained on.")
    ] = 0.75,
    resamples: Annotated[int, typer.Option(metavar="N", help="Of the intervals and tests.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of resampling and of the split.")] = 0,
    json_target: Json = None,
) -> int:
    """Measure models on labelled data, with intervals and a test of the difference to a reference."""
    from onnxsmith.pipeline.console import emit_json, message, progress_for
    from onnxsmith.pipeline.evaluation import evaluate_model
    from onnxsmith.pipeline.judgement_tables import show_evaluations
    from onnxsmith.pipeline.task_runs import RunSettings

    interrupts: list[bool] = []
    results = evaluate_model(
        model,
        task=task,
        data=data,
        metrics=metric or (),
        providers=provider or ["cpu"],
        reference=reference,
        columns=_columns(column or ()),
        split=split,
        limit=limit,
        resamples=resamples,
        settings=RunSettings(
            batch=batch,
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            train_share=train_share,
            seed=seed,
        ),
        progress=progress_for(),
        on_interrupt=lambda: interrupts.append(True),
    )
    if json_target:
        body = {"interrupted": bool(interrupts), "results": [result.to_json() for result in results]}
        emit_json(json_target, "evaluate", body)
    if json_target != "-":
        show_evaluations(results)
    if interrupts:
        seen = f"{results[-1].rows} rows of the last run" if results[-1].interrupted else "whole runs"
        message(f"onnxsmith: interrupted; what was measured until then is above ({seen})")
        return INTERRUPTED
    return 0


def _columns(texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        role, equals, name = text.partition("=")
        if not equals or not name:
            raise BadInputError(f"--column {text}", got="no name of a column", expected="ROLE=NAME")
        found[role] = name
    return found


@guarded
def generate(
    model: Model,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; or give --prompts.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Many prompts: a text file with one a line, or .jsonl with text."),
    ] = None,
    audio: Annotated[
        Path | None, typer.Option(metavar="FILE.wav", help="Write down what is said there (Whisper).")
    ] = None,
    language: Annotated[
        str | None, typer.Option(metavar="L", help="With --audio: such as en; found out by default.")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Prompts of --prompts at once.")] = 8,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Upper bound of tokens; 64 by default, of speech what the model allows."
        ),
    ] = None,
    provider: Annotated[str, typer.Option(metavar="P", help="Execution provider.")] = "cpu",
    temperature: Annotated[
        float, typer.Option(metavar="X", help="0 takes the most likely token; above, tokens are drawn.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", help="Draw from the N most likely tokens.")
    ] = None,
    top_p: Annotated[
        float, typer.Option(metavar="X", help="Draw from the fewest tokens of this probability together.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(metavar="X", help="Above 1, tokens that were there become less likely.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the draws.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Ends the text; may be repeated.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt through the chat template.")] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="With --chat: what the model is told beforehand.")
    ] = None,
    speculate: Annotated[
        str,
        typer.Option(
            metavar="lookup[:N]",
            help="Guess up to N tokens (7) from the text so far and check them in one call: the same text, "
            "faster where it repeats itself.",
        ),
    ] = "off",
    json_target: Json = None,
) -> int:
    """Continue a text with a language model, streamed; by default always the most likely token."""
    from onnxsmith.pipeline.console import emit_json
    from onnxsmith.pipeline.generation import generate_text, generate_texts
    from onnxsmith.runtime import LookupSettings, SamplingSettings

    given = [
        name
        for name, value in (("a prompt", prompt), ("--prompts", prompts), ("--audio", audio))
        if value is not None
    ]
    if len(given) != 1:
        got = " and ".join(given) or "neither a prompt nor --prompts nor --audio"
        raise BadInputError("generate", got=got, expected="one of them")
    if language is not None and audio is None:
        raise BadInputError("generate: --language", got="no --audio", expected="both or none")
    sampling = SamplingSettings(
        temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty, seed=seed
    )
    settings: dict[str, Any] = {
        "max_new_tokens": 64 if max_new_tokens is None else max_new_tokens, "provider": provider,
        "sampling": sampling, "stop": stop or (), "chat": chat, "system": system,
        "speculation": LookupSettings.parse(speculate),
    }  # fmt: skip
    if audio is not None:
        return _transcribe(
            model, audio, json_target, {"language": language, "stop": stop or (), "provider": provider},
            plain=(sampling, chat, system, speculate) == (SamplingSettings(seed=seed), False, None, "off"),
            max_new_tokens=max_new_tokens,
        )  # fmt: skip
    if prompts is not None:
        results: list[dict[str, Any]] = []
        with _until_interrupted() as ended:
            for one in generate_texts(model, _prompts(prompts), batch=batch, **settings):
                results.append(dataclasses.asdict(one))
                if json_target != "-":
                    sys.stdout.write(f"{one.prompt}{'' if not chat else chr(10)}{one.text}\n\n")
                    sys.stdout.flush()
        if json_target:
            emit_json(json_target, "generate", {"results": results, "interrupted": bool(ended)})
        return _status(ended, f"{len(results)} texts were finished")
    assert prompt is not None
    text = generate_text(model, prompt, **settings)
    return _show_pieces(text, json_target, {"prompt": prompt}, before="" if chat else prompt)


def _show_pieces(
    pieces: Iterator[str], json_target: str | None, facts: dict[str, str], *, before: str = ""
) -> int:
    """Writes a text piece by piece, with what comes before its first one, or the whole of it as JSON.

    Ctrl-C ends the text where it is.
    """
    from onnxsmith.pipeline.console import emit_json

    shown: list[str] = []
    ended: list[bool] = []
    try:
        with _until_interrupted() as ended:
            for piece in pieces:
                shown.append(piece)
                if json_target != "-":
                    sys.stdout.write(piece if len(shown) > 1 else f"{before}{piece}")
                    sys.stdout.flush()
    finally:
        # Whatever ends the text, what is said of it begins on a line of its own.
        if json_target != "-" and shown:
            sys.stdout.write("\n")
            sys.stdout.flush()
    if json_target:
        emit_json(json_target, "generate", facts | {"text": "".join(shown), "interrupted": bool(ended)})
    return _status(ended, "the text ends here" if shown else "no text was there yet")


@contextlib.contextmanager
def _until_interrupted() -> Iterator[list[bool]]:
    """Lets Ctrl-C end a stretch of work and not the command; what is yielded is filled then."""
    ended: list[bool] = []
    try:
        yield ended
    except KeyboardInterrupt:
        ended.append(True)


def _status(ended: list[bool], what: str) -> int:
    from onnxsmith.pipeline.console import message

    if not ended:
        return 0
    message(f"onnxsmith: interrupted; {what}")
    return INTERRUPTED


def _transcribe(
    model: Path,
    audio: Path,
    json_target: str | None,
    settings: dict[str, Any],
    *,
    plain: bool,
    max_new_tokens: int | None,
) -> int:
    from onnxsmith.pipeline.transcription import transcribe

    if not plain:
        raise BadInputError(
            "generate: --audio",
            got="options of sampling or of chats",
            expected="neither: speech is decoded greedily",
        )
    pieces = transcribe(model, audio, max_new_tokens=max_new_tokens, **settings)
    return _show_pieces(pieces, json_target, {"audio": str(audio)})


def _prompts(path: Path) -> Sequence[str]:
    from onnxsmith.pipeline.texts import load_texts

    return load_texts(path)


JUDGING_COMMANDS: Sequence[Callable[..., None]] = (compare, bisect, evaluate, generate)
