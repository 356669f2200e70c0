"""Prompt lookup: speed with and without guesses, where texts repeat themselves and where not.

Texts are those that every Python brings: a module of the standard library to be edited, a chapter of the
help to be copied from and to be summarised, and a story without a text to copy from. Each text is written
with and without guesses in turn, on one open session, as often as there are rounds; the two texts are
compared token by token.

    python benchmarks/speculation.py artifacts/smollm2 --threads 1 2
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxsmith import OrtSession, load_package
from onnxsmith.environment import describe_environment
from onnxsmith.pipeline.generation import chat_prompt
from onnxsmith.pipeline.tokenization import PackageTokenizer
from onnxsmith.runtime import LookupSettings, SamplingSettings
from onnxsmith.runtime.decoding import open_decoder
from onnxsmith.runtime.sampling import Sampler
from onnxsmith.runtime.speculation import speculative_calls


def prompts() -> Mapping[str, str]:
    """What the model is asked, by kind."""
    from pydoc_data.topics import topics

    code = inspect.getsource(textwrap.shorten) + "\n\n" + inspect.getsource(textwrap.fill)
    chapter = topics["context-managers"][:2400]
    return {
        "code edit": f"Rewrite this code with every parameter named `text` renamed to `source`. Answer with "
        f"the whole code only.\n\n```python\n{code}```",
        "copy": f"Copy the first three paragraphs of this text word by word.\n\n{chapter}",
        "summary": f"Summarise this text in three sentences.\n\n{chapter}",
        "story": "Write a story about a smith who forges a bell for a village by the sea.",
    }


def write(session: OrtSession, prompt: list[int], count: int, guesses: int) -> dict[str, Any]:
    """One text: its tokens, the calls that it took, seconds of the clock and of the processor."""
    decoder = open_decoder(session, capacity=len(prompt) + count + 16)
    sampler = Sampler(SamplingSettings(), [prompt])
    tokens: list[int] = []
    calls = 0
    if guesses:
        steps = speculative_calls(decoder, prompt, sampler, LookupSettings(guesses), max_new_tokens=count)
        tokens += next(steps)
        began, used = time.perf_counter(), time.process_time()
        for some in steps:
            tokens += some
            calls += 1
    else:
        import numpy as np

        tokens.append(int(decoder.step(np.array([prompt]), last_only=True)[0, -1].argmax()))
        began, used = time.perf_counter(), time.process_time()
        while len(tokens) < count:
            tokens.append(
                int(sampler.choose(decoder.step(np.array([tokens[-1:]]), last_only=True)[:, -1])[0])
            )
            calls += 1
    return {
        "tokens": tokens, "calls": calls, "seconds": time.perf_counter() - began,
        "cpu_s": time.process_time() - used,
    }  # fmt: skip


def compared(session: OrtSession, prompt: list[int], count: int, guesses: int, rounds: int) -> dict[str, Any]:
    """Both ways in turn."""
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "lookup": []}
    for number in range(rounds + 1):
        for name, most in (("plain", 0), ("lookup", guesses)):
            found = write(session, prompt, count, most)
            if number:
                runs[name].append(found)
    steps = count - 1
    plain, lookup = runs["plain"], runs["lookup"]
    same = [
        next(
            (i for i, pair in enumerate(zip(a["tokens"], b["tokens"], strict=True)) if pair[0] != pair[1]),
            count,
        )
        for a, b in zip(plain, lookup, strict=True)
    ]
    return {
        "prompt_tokens": len(prompt),
        "plain_tokens_per_s": statistics.median(steps / one["seconds"] for one in plain),
        "lookup_tokens_per_s": statistics.median(steps / one["seconds"] for one in lookup),
        "speedup": statistics.median(a["seconds"] / b["seconds"] for a, b in zip(plain, lookup, strict=True)),
        "cpu_ratio": statistics.median(a["cpu_s"] / b["cpu_s"] for a, b in zip(plain, lookup, strict=True)),
        "tokens_per_call": statistics.median(steps / one["calls"] for one in lookup),
        "same_until": min(same),
    }


def main() -> None:
    """Measures each model with each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, nargs="+", default=[2])
    parser.add_argument("--guesses", type=int, default=LookupSettings().tokens)
    parser.add_argument("--new-tokens", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("artifacts/bench/speculation.json"))
    arguments = parser.parse_args()
    results: list[dict[str, Any]] = []
    for model in arguments.models:
        package = load_package(model)
        tokenizer = PackageTokenizer(package)
        for threads in arguments.threads:
            with OrtSession(package, threads=threads, name=str(model)) as session:
                for kind, text in prompts().items():
                    ids = tokenizer.encode(chat_prompt(package, text), special_tokens=False)
                    found = compared(session, ids, arguments.new_tokens, arguments.guesses, arguments.rounds)
                    results.append({"model": str(model), "threads": threads, "kind": kind, **found})
                    print(line(results[-1]), flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    body = {"environment": describe_environment(), "results": results}
    arguments.output.write_text(json.dumps(body, indent=1) + "\n")


def line(found: Mapping[str, Any]) -> str:
    """One result for people."""
    parts: Sequence[str] = (
        f"{found['model']} {found['threads']} threads, {found['kind']} ({found['prompt_tokens']} tokens):",
        f"{found['plain_tokens_per_s']:.1f} -> {found['lookup_tokens_per_s']:.1f} tokens/s,",
        f"{found['speedup']:.2f} times (processor {found['cpu_ratio']:.2f}),",
        f"{found['tokens_per_call']:.2f} tokens for each call, same until token {found['same_until']}",
    )
    return " ".join(parts)


if __name__ == "__main__":
    main()
