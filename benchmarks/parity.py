"""Every architecture against PyTorch, with random weights: writes docs/parity.md.

Each row is exported in a process of its own, compared with PyTorch on prefills of several lengths, on
decoding with a cache that PyTorch filled, and on left-padded batches. Sliding windows are 8 tokens and the
longest case 160, so every window is passed. A row that differs by more than float32 rounding fails the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from parity_models import MODEL_GROUPS, MODEL_HEAD, measure_model, model_line, model_notes

ROOT = Path(__file__).resolve().parents[1]
_ABOUT = """
Written by `benchmarks/parity.py`; do not edit. Small models with random weights are exported, optimised
(`cpu-fp32`; `clean` where only ONNX operators are allowed) and compared with PyTorch in float32. Errors are
the largest difference of any output, logits and cache, over that output's largest magnitude, in the worst
case of its kind: prefill of 1 to 160 tokens, decoding on a cache, and batches with padding on the left.
Windows are 8 tokens, so the longer cases pass them. Attention is fused while tracing (yes), or afterwards
by a pass of the preset in so many layers. Of the layers, one of each kind is traced and the
others are copies. CPU seconds and peak memory are of the export alone, in a process that had torch and
transformers imported. The other models are cleaned (`clean`) and compared on several lengths and batches,
each graph of an encoder-decoder on what the graphs before it really gave.
"""
PAGE = ROOT / "docs" / "parity.md"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: The architecture, and what is special about it.
        make: Gives the loaded model; runs in the row's own process.
        attention: See ``onnxsmith.exporters.export``.
        preset: The passes before the comparison.
    """

    name: str
    make: Callable[[], Any]
    attention: str = "auto"
    preset: str = "cpu-fp32"


_SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MULTI_HEAD = {key: value for key, value in _SMALL.items() if key != "num_key_value_heads"}
_GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_FUSED_BY_PASSES = frozenset({"Attention", "MultiHeadAttention"})
_ALTERNATING = ["sliding_attention", "full_attention"] * 2


def decoder(kind: str, base: dict[str, Any] = _SMALL, **options: Any) -> Any:
    """A decoder of ``transformers`` with random weights that make every part matter."""
    import torch
    import transformers

    from onnxsmith.exporters import LoadedModel
    from onnxsmith.source import ModelSource, SourceKind

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**base, **options})
    model = transformers.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.copy_(torch.randn_like(parameter) * (0.5 if parameter.shape[0] == 96 else 0.15))
    source = ModelSource(SourceKind.FACTORY, f"parity:{kind}")
    return LoadedModel(model, source, "text-generation", {}, {})


DECODERS = (
    Row("Llama (grouped queries, tied head)", partial(decoder, "Llama", tie_word_embeddings=True)),
    Row("Llama, ONNX operators only", partial(decoder, "Llama"), "standard", "clean"),
    Row(
        "Llama, dynamic NTK rotary",
        partial(
            decoder,
            "Llama",
            max_position_embeddings=12,
            rope_scaling={"rope_type": "dynamic", "factor": 4.0},
        ),
    ),
    Row("Mistral (sliding window)", partial(decoder, "Mistral", sliding_window=8)),
    Row("Qwen2 (biases)", partial(decoder, "Qwen2")),
    Row("Qwen3 (QK norm)", partial(decoder, "Qwen3", head_dim=16)),
    Row("Phi-3 (packed, partial rotary)", partial(decoder, "Phi3", partial_rotary_factor=0.5)),
    Row(
        "Phi-3 (LongRoPE)",
        partial(
            decoder,
            "Phi3",
            original_max_position_embeddings=12,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0, 1.1, 1.2, 1.3],
                "long_factor": [1.5, 2.0, 3.0, 4.0],
            },
        ),
    ),
    Row(
        "Gemma 2 (soft caps, alternating windows)",
        partial(decoder, "Gemma2", head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    ),
    Row(
        "Gemma 2, ONNX operators only",
        partial(decoder, "Gemma2", head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
        "standard",
        "clean",
    ),
    Row(
        "Gemma 3 (two rotary bases, windows)",
        partial(
            decoder,
            "Gemma3Text",
            head_dim=16,
            sliding_window=8,
            query_pre_attn_scalar=16,
            layer_types=_ALTERNATING,
        ),
    ),
    Row("OLMo 2 (norms after)", partial(decoder, "Olmo2")),
    Row("GPT-2 (learned positions)", partial(decoder, "GPT2", _GPT)),
    Row("GPT-NeoX (partial rotary, biases)", partial(decoder, "GPTNeoX", _MULTI_HEAD, rotary_pct=0.5)),
    Row("SmolLM3 (layers without rotary)", partial(decoder, "SmolLM3", no_rope_layers=[1, 1, 0, 1])),
    Row(
        "Cohere 2 (parallel blocks, windows)",
        partial(decoder, "Cohere2", sliding_window=8, layer_types=_ALTERNATING),
    ),
    Row("Granite (scaled logits)", partial(decoder, "Granite", logits_scaling=2.0)),
    Row(
        "Mixtral (experts, window)",
        partial(decoder, "Mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    ),
    Row("Qwen3-MoE (experts, QK norm)", partial(decoder, "Qwen3Moe", head_dim=16, **_EXPERTS)),
    Row(
        "Qwen2-MoE (shared expert)",
        partial(decoder, "Qwen2Moe", shared_expert_intermediate_size=24, **_EXPERTS),
    ),
    Row(
        "gpt-oss (sinks, experts, windows)",
        partial(
            decoder,
            "GptOss",
            num_local_experts=4,
            num_experts_per_tok=2,
            head_dim=16,
            rope_scaling=None,
            sliding_window=8,
            layer_types=_ALTERNATING,
        ),
    ),
    Row("Falcon", partial(decoder, "Falcon", _MULTI_HEAD, alibi=False)),
    Row("Falcon (ALiBi)", partial(decoder, "Falcon", _MULTI_HEAD, alibi=True)),
    Row(
        "BLOOM (ALiBi)",
        partial(decoder, "Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 4, "n_head": 4}),
    ),
    Row("OPT", partial(decoder, "OPT", _MULTI_HEAD, ffn_dim=48, word_embed_proj_dim=32)),
    Row("GPT-J", partial(decoder, "GPTJ", _GPT, rotary_dim=4)),
    Row("StableLM", partial(decoder, "StableLm")),
    Row(
        "DeepSeek-V3 (latent attention, experts)",
        partial(
            decoder,
            "DeepseekV3",
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
        ),
    ),
    Row("GPT-BigCode (one key head)", partial(decoder, "GPTBigCode", _GPT)),
    Row(
        "XGLM (sinusoids)",
        partial(
            decoder,
            "XGLM",
            {
                "vocab_size": 96,
                "d_model": 32,
                "ffn_dim": 48,
                "num_layers": 4,
                "attention_heads": 4,
                "max_position_embeddings": 256,
            },
        ),
    ),
    Row("GLM-4 (norms around, partial rotary)", partial(decoder, "Glm4", head_dim=16)),
    Row("Persimmon (QK norm, packed heads)", partial(decoder, "Persimmon", _MULTI_HEAD)),
    Row("Doge (mask from values)", partial(decoder, "Doge", keep_window_size=256)),
    Row(
        "Mamba (state space)",
        partial(
            decoder, "Mamba", {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        ),
    ),
    Row(
        "RWKV (recurrent)",
        partial(
            decoder,
            "Rwkv",
            {
                "vocab_size": 96,
                "hidden_size": 32,
                "attention_hidden_size": 32,
                "num_hidden_layers": 2,
                "context_length": 256,
            },
        ),
    ),
    Row(
        "Jamba (hybrid)",
        partial(
            decoder,
            "Jamba",
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            use_mamba_kernels=False,
            mamba_d_state=4,
            mamba_dt_rank=4,
        ),
    ),
)
# Title of the section, rows; those that are not decoders are in parity_models.
GROUPS: tuple[tuple[str, tuple[Row, ...]], ...] = (("Decoders", DECODERS),)


def measure(row: Row) -> dict[str, Any]:
    """Exports and compares one model; in a process of its own."""
    from onnxsmith.comparison import tolerance_for
    from onnxsmith.environment import peak_rss_mb
    from onnxsmith.errors import OnnxsmithError
    from onnxsmith.exporters import export, torch_program
    from onnxsmith.graph_passes import PRESETS, make_passes, run_passes
    from onnxsmith.runtime import OrtSession, TorchSession, cases_for, compare_sessions, reference_outputs

    loaded = row.make()
    began, cpu = time.perf_counter(), time.process_time()
    try:
        program = torch_program(loaded)
        exported = export(loaded, program, attention=row.attention)
    except OnnxsmithError as error:
        return {"name": row.name, "refused": str(error)}
    seconds, cpu, peak = time.perf_counter() - began, time.process_time() - cpu, peak_rss_mb()
    package = run_passes(exported, make_passes(PRESETS[row.preset]))
    reference = TorchSession(program, threads=1)
    cases = reference_outputs(reference, list(cases_for(reference, limits=program.limits)))
    try:
        with OrtSession(package, threads=1) as session:
            comparison = compare_sessions(reference, session, cases, tolerance=tolerance_for("float32"))
    except OnnxsmithError as error:
        # An operator without a kernel for an element type, say.
        return {"name": row.name, "refused": str(error)}
    worst: dict[str, float] = {}
    for tensor in comparison.tensors:
        kind = "padded" if "padding" in tensor.case else "decode" if "past=" in tensor.case else "prefill"
        worst[kind] = max(worst.get(kind, 0.0), tensor.max_abs / (tensor.scale or 1.0))
    return {
        "name": row.name,
        "details": exported.steps[0].details,
        "nodes": sum(1 for _ in package.main.model.graph),
        "fused_afterwards": sum(node.op_type in _FUSED_BY_PASSES for node in package.main.model.graph),
        "worst": worst,
        "passed": comparison.passed,
        "reason": comparison.reason,
        "seconds": seconds,
        "cpu": cpu,
        "peak_mb": peak,
    }


def line(result: dict[str, Any]) -> str:
    """One row of the table in Markdown."""
    if "refused" in result:
        return f"| {result['name']} | refused | | | | | | | |"
    details = result["details"]
    fused = "yes" if details.get("attention") == "GroupQueryAttention" else "no"
    if result["fused_afterwards"]:
        fused = f"afterwards, {result['fused_afterwards']}"
    traced = (
        f"{details['layers_traced']} of {details['layers']}" if details.get("tracing") == "layers" else "all"
    )
    errors = [
        f"{result['worst'][k]:.0e}" if k in result["worst"] else "" for k in ("prefill", "decode", "padded")
    ]
    if not result["passed"]:
        errors[0] = f"**{errors[0]}**"
    cells = [
        result["name"],
        traced,
        fused,
        result["nodes"],
        *errors,
        f"{result['cpu']:.1f}",
        f"{result['peak_mb']:.0f}",
    ]
    return "| " + " | ".join(map(str, cells)) + " |"


def section(title: str, results: Sequence[dict[str, Any]]) -> str:
    """The table of a group, with what has to be said below it."""
    if title in dict(MODEL_GROUPS):
        head: Sequence[str] = MODEL_HEAD
        lines, notes = [model_line(result) for result in results], model_notes(results)
    else:
        head = (
            "| architecture | layers traced | fused attention | nodes | prefill | decode | padded | CPU s "
            "| peak MB |",
            "|---|---|---|---|---|---|---|---|---|",
        )
        lines = [line(result) for result in results]
        notes = [
            *(f"- {r['name']}: refused. {r['refused']}" for r in results if "refused" in r),
            *(f"- **{r['name']} differs**: {r['reason']}." for r in results if not r.get("passed", True)),
            *(
                f"- {r['name']}: attention not fused in tracing, because: {r['details']['why_not_fused']}"
                for r in results
                if r.get("details", {}).get("why_not_fused")
            ),
            *(
                f"- {r['name']}: traced as a whole, because: {r['details']['why_whole']}."
                for r in results
                if r.get("details", {}).get("why_whole")
            ),
        ]
    return "\n".join([f"## {title}", "", *head, *lines, *(["", *notes] if notes else [])]) + "\n"


def page(sections: Sequence[str]) -> str:
    """The whole page."""
    from onnxsmith.environment import describe_environment

    named = describe_environment()["versions"]
    found = ", ".join(f"{name} {version}" for name, version in named.items())
    parts = [
        "# Parity with PyTorch",
        "",
        *textwrap.wrap(_ABOUT.strip(), width=118),
        "",
        f"{found}; {platform.machine()}, {os.cpu_count()} processors.",
    ]
    return "\n".join(parts) + "\n\n" + "\n".join(sections)


def written_sections() -> dict[str, str]:
    """The sections of the page as it is, by title."""
    if not PAGE.is_file():
        return {}
    _, *parts = PAGE.read_text(encoding="utf-8").split("\n## ")
    return {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}


def apart(context: Any, row: Any) -> dict[str, Any]:
    """Measures a row in a process of its own."""
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        result = pool.submit(measure if isinstance(row, Row) else measure_model, row).result()
    show = line if isinstance(row, Row) else model_line
    print(show(result), result.get("reason", ""), file=sys.stderr, flush=True)
    return result


def main() -> int:
    """Measures the rows and writes the page; 1 if a row fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--only", default="", help="rows whose name contains this; the page is then not written"
    )
    parser.add_argument("--group", default="", help="one section of the page; the others stay as they are")
    parser.add_argument("--at-once", type=int, default=1, help="how many rows, each on one processor")
    parser.add_argument("--json", type=Path, help="write the full results there")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    context = multiprocessing.get_context("forkserver")
    # Imported once; each row still has its own process.
    context.set_forkserver_preload(["torch", "transformers", "onnxscript", "onnxruntime"])
    groups, sections = [], written_sections()
    for title, rows in (*GROUPS, *MODEL_GROUPS):
        if arguments.group not in ("", title):
            continue
        wanted = [row for row in rows if arguments.only.lower() in row.name.lower()]
        with ThreadPoolExecutor(arguments.at_once) as threads:
            results = list(threads.map(partial(apart, context), wanted))
        groups.append((title, results))
        sections[title] = section(title, results)
    if arguments.json:
        arguments.json.write_text(json.dumps(dict(groups), indent=1, default=str) + "\n", encoding="utf-8")
    if not arguments.only:
        order = [title for title, _ in (*GROUPS, *MODEL_GROUPS)]
        PAGE.write_text(page([sections[title] for title in order if title in sections]), encoding="utf-8")
    measured = [r for _, results in groups for r in results if "refused" not in r]
    return 0 if measured and all(r["passed"] for r in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
