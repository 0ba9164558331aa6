"""Decode and prompts beside llama.cpp: the same weights and shapes, one run, interleaved.

    pip install llama-cpp-python gguf     (builds from source)
    python benchmarks/llamacpp.py [--batch 1 8 16]

Prints ms a decode step and tokens/s of a 400-token prompt. The first greedy tokens are compared, so that both are
known to compute the same model.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as C
import numpy as np
from common import LLAMA_125M, checkpoint, interleaved, read_bandwidth, require_quiet, table
from decode import OUTPUT, prompt_ids
from decode import tokenloom as tokenloom_decode
from safetensors.numpy import load_file
from tokenloom import LLM, SamplingParams

PROMPT_LONG = 400
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


def _interleaved_rope(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a q or k projection from halves (Hugging Face) to pairs (llama.cpp's rope for this family)."""
    size = weight.shape[0] // heads
    return weight.reshape(heads, 2, size // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def gguf_file(kind: str) -> Path:
    """The benchmark's checkpoint as GGUF with matrices in f32, f16 or q8_0, made once a machine."""
    folder, raw = checkpoint(), LLAMA_125M
    path = folder / f"model-{kind}.gguf"
    if path.exists():
        return path
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_rope_dimension_count(raw["head_dim"])
    writer.add_rope_freq_base(raw["rope_theta"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, value in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem in TOP:
            target = TOP[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{NAMES[part]}"
            if part.endswith(("q_proj", "k_proj")):
                heads = raw["num_attention_heads" if "q_proj" in part else "num_key_value_heads"]
                value = _interleaved_rope(value, heads)
        if kind == "q8_0" and value.ndim == 2:
            kept = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{target}.weight", gguf.quants.quantize(value, kept), raw_dtype=kept)
            continue
        wide = value.ndim == 1 or kind == "f32"
        writer.add_tensor(f"{target}.weight", value.astype(np.float32 if wide else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class Llama:
    """A llama.cpp context for `batch` sequences on all cores."""

    def __init__(self, kind: str, batch: int):
        C.llama_log_set(_quiet_log, ctypes.c_void_p(0))
        settings = C.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 640 * batch, 512, 512
        settings.n_seq_max, settings.kv_unified = batch, False
        settings.n_threads = settings.n_threads_batch = os.cpu_count() or 1
        self.model = C.llama_model_load_from_file(
            str(gguf_file(kind)).encode(), C.llama_model_default_params()
        )
        self.context, self.size = C.llama_init_from_model(self.model, settings), batch
        self.batch = C.llama_batch_init(512, 0, 1)

    def feed(self, tokens: list[tuple[int, int, int]], wanted: set[int]) -> np.ndarray:
        """One call on (token, position, sequence) triples; the argmax at the wanted indices."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        for at, (token, position, sequence) in enumerate(tokens):
            batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position, 1
            batch.seq_id[at][0], batch.logits[at] = sequence, at in wanted
        if C.llama_decode(self.context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        vocab = LLAMA_125M["vocab_size"]
        rows = [
            np.ctypeslib.as_array(C.llama_get_logits_ith(self.context, at), (vocab,)) for at in sorted(wanted)
        ]
        return np.array([row.argmax() for row in rows])

    def clear(self) -> None:
        C.llama_memory_clear(C.llama_get_memory(self.context), True)

    def generate(self, prompts: np.ndarray, tokens: int) -> np.ndarray:
        """Greedy tokens [batch, tokens]."""
        self.clear()
        last = []
        for sequence, ids in enumerate(prompts.tolist()):
            triples = [(token, at, sequence) for at, token in enumerate(ids)]
            last.append(int(self.feed(triples, {len(ids) - 1})[0]))
        made = [last]
        for step in range(tokens - 1):
            triples = [(token, prompts.shape[1] + step, row) for row, token in enumerate(made[-1])]
            made.append(self.feed(triples, set(range(len(triples)))).tolist())
        return np.array(made).T


@C.llama_log_callback
def _quiet_log(level, text, data):
    pass


def llama_decode(kind: str, batch: int) -> Callable[[], float]:
    """ms a decode step: the time of OUTPUT tokens less that of one."""
    model, ids = Llama(kind, batch), prompt_ids(batch)

    def run() -> float:
        times = []
        for tokens in (1, OUTPUT):
            start = time.perf_counter()
            model.generate(ids, tokens)
            times.append(time.perf_counter() - start)
        return (times[1] - times[0]) / (OUTPUT - 1) * 1e3

    return run


def check_same_tokens() -> None:
    ids = prompt_ids(1)
    theirs = Llama("f32", 1).generate(ids, 8)[0].tolist()
    with LLM(
        checkpoint(), max_num_seqs=1, max_model_len=512, progress=False, skip_tokenizer_init=True
    ) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
        ours = list(llm.generate(ids[0].tolist(), params)[0].outputs[0].token_ids)
    print("first greedy tokens:", "the same" if ours == theirs else f"ours {ours}, llama.cpp {theirs}")


def tokenloom_prompt(dtype: str, length: int = PROMPT_LONG, **more: Any) -> Callable[[], float]:
    """s for a prompt of so many tokens and its first token; `more` are options of `LLM`."""
    llm = LLM(
        checkpoint(), dtype=dtype, max_num_seqs=1, max_model_len=length + 16, progress=False,
        skip_tokenizer_init=True, max_num_batched_tokens=length, prefix_cache=False, **more,
    )  # fmt: skip
    ids, params = prompt_ids(1, length)[0].tolist(), SamplingParams(temperature=0.0, max_tokens=1)

    def run() -> float:
        start = time.perf_counter()
        llm.generate(ids, params, use_tqdm=False)
        return time.perf_counter() - start

    return run


def llama_prompt(kind: str, length: int = PROMPT_LONG) -> Callable[[], float]:
    model, ids = Llama(kind, 1), prompt_ids(1, length)

    def run() -> float:
        start = time.perf_counter()
        model.generate(ids, 1)
        return time.perf_counter() - start

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 16])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    require_quiet()
    check_same_tokens()
    print(f"read bandwidth {read_bandwidth():.1f} GB/s")
    for batch in arguments.batch:
        times = interleaved(
            {
                "tokenloom float32": tokenloom_decode("float32", batch),
                "tokenloom bfloat16-stored": tokenloom_decode("bfloat16", batch),
                "llama.cpp f32": llama_decode("f32", batch),
                "llama.cpp f16": llama_decode("f16", batch),
            },
            arguments.rounds,
        )
        rows = [(f"batch {batch}", "ms a step", "time / llama.cpp f32")]
        rows += [(name, f"{ms:.2f}", f"{ms / times['llama.cpp f32']:.2f}") for name, ms in times.items()]
        print(table(rows), flush=True)
    times = interleaved(
        {
            "tokenloom float32": tokenloom_prompt("float32"),
            "tokenloom bfloat16-stored": tokenloom_prompt("bfloat16"),
            "llama.cpp f32": llama_prompt("f32"),
            "llama.cpp f16": llama_prompt("f16"),
        },
        arguments.rounds,
    )
    rows = [(f"a prompt of {PROMPT_LONG}", "tokens/s", "time / llama.cpp f32")]
    rows += [
        (name, f"{PROMPT_LONG / s:.0f}", f"{s / times['llama.cpp f32']:.2f}") for name, s in times.items()
    ]
    print(table(rows))
    require_quiet()


if __name__ == "__main__":
    main()
