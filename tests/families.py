"""One runner for every family: draw a tiny checkpoint, ask transformers, ask us, compare.

`check(model_type, raw)` does all the work for a raw `config.json`. A family joins by its files
`tests/draws/<model_type>.py` (draw and control) and `model/families/<model_type>.py`; torch and transformers are
imported only where the reference is made, so that recorded outputs are checked without them.
"""

from __future__ import annotations

import importlib
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tokenloom.attention.batch import Shape, pack, rectangle, unpack
from tokenloom.attention.caches.recurrent import Stateless
from tokenloom.attention.caches.uncached import Uncached
from tokenloom.model.checkpoint import abstract, load, load_config
from tokenloom.model.config import AttentionConfig, ModelConfig
from tokenloom.model.families import find
from tokenloom.model.state import Capacity, make_state

LENGTH = 24
PROMPTS = (13, 6, 18)
TOLERANCE = 2e-4
PAGE, CHUNK = 4, 10
LENGTH_DEPENDENT = ("dynamic", "longrope")


@dataclass(frozen=True)
class Reference:
    """What transformers says. `tokens` i32[B,LENGTH]: a prompt of PROMPTS[b] tokens, its greedy continuation up
    to LENGTH - (longest prompt - own), then anything; `logits` f32[B,LENGTH,V] at every one of them."""

    tokens: np.ndarray
    logits: np.ndarray

    @property
    def limit(self) -> float:
        """The largest difference that is allowed: TOLERANCE, or that share of the logits' deviation."""
        return TOLERANCE * max(1.0, float(self.logits.std()))


STEPS = LENGTH - max(PROMPTS)


def family_draws(model_type: str):
    """The module `tests/draws/<model_type>.py`: `draw(rng) -> raw`, `control(raw)` changes one fact in place."""
    return importlib.import_module(f"tokenloom.tests.draws.{model_type}")


def drawn(model_type: str, seed: int) -> dict:
    """The raw config number `seed` of a family."""
    return family_draws(model_type).draw(random.Random(f"{model_type}-{seed}"))


# ---------------------------------------------------------------- the reference: transformers in float32


def make_reference(
    raw: dict, folder: Path, seed: int = 0, rows: int = len(PROMPTS), halved: bool = False
) -> Reference:
    """Save a transformers model of random weights for `raw` under `folder` and ask it.

    Every weight is a bfloat16 number held in float32: `halved` stores it in half the bytes, without loss.
    Rows are always run at the full LENGTH (causal: what follows a token cannot change it), so that scalings
    that depend on the length see one length.
    """
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    raw = {**raw}
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    generator = torch.Generator().manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(_weight(name, weight, noise).bfloat16().float())

    @torch.no_grad()
    def ask(tokens: np.ndarray) -> np.ndarray:
        ids = torch.tensor(tokens, dtype=torch.long)
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.numpy()

    vocab = getattr(config, "text_config", config).vocab_size
    tokens = np.random.default_rng(seed).integers(3, vocab, (rows, LENGTH)).astype(np.int32)
    for step in range(STEPS):
        logits = ask(tokens)
        for row, length in enumerate(PROMPTS[:rows]):
            tokens[row, length + step] = logits[row, length + step - 1].argmax()
    reference = Reference(tokens, ask(tokens))
    (model.bfloat16() if halved else model).save_pretrained(folder)
    return reference


def _weight(name: str, weight, noise):
    """A random weight that keeps activations of order one, and biases and norms far from their initial values."""
    if weight.ndim == 1:
        return weight + 0.2 * noise
    if "embed" in name or "wte" in name or "wpe" in name:
        return noise * weight.shape[-1] ** -0.5 if "pos" not in name and "wpe" not in name else 0.3 * noise
    if name.endswith(("lm_head.weight", "embed_out.weight")):
        return noise * 1.2 * weight.shape[-1] ** -0.5
    fan_in = weight[0].numel() if weight.ndim != 3 else weight.shape[-1]
    return noise * 1.2 * fan_in**-0.5


# ---------------------------------------------------------------- our side


def tested_config(config: ModelConfig) -> ModelConfig:
    """`config` for sequences of LENGTH tokens: scalings that depend on the length are told it."""

    def block(block):
        mixer = block.mixer
        if isinstance(mixer, AttentionConfig) and mixer.rope and mixer.rope.scaling in LENGTH_DEPENDENT:
            mixer = replace(mixer, rope=replace(mixer.rope, length=LENGTH))
        return replace(block, mixer=mixer)

    return replace(config, blocks=tuple(block(b) for b in config.blocks))


def whole_logits(config: ModelConfig, params: dict, tokens: np.ndarray) -> np.ndarray:
    """tokens i32[B,q] as fresh rows without any memory -> logits f32[B,q,V]."""
    graphdef, _ = abstract(config)

    @jax.jit
    def run(params, tokens):
        decoder, batch = nnx.merge(graphdef, params), rectangle(tokens)
        fresh = tuple(
            Uncached() if isinstance(b.mixer, AttentionConfig) else Stateless() for b in config.blocks
        )
        x, _ = decoder.run(decoder.embed(batch.tokens, batch), fresh, batch, range(decoder.num_layers))
        return decoder.head(decoder.normalise(x))

    return np.asarray(run(params, jnp.asarray(tokens))).reshape(*tokens.shape, -1)


class Served:
    """B sequences served as an engine does: prompts in chunks that several rows share, then decode steps.

    One program, mixed(B, 1, R, C), does both: decode rows idle in prompt steps, prompt rows idle in decode steps.
    """

    def __init__(self, config: ModelConfig, params: dict, rows: int):
        self.rows, self.params = rows, params
        self.width = -(-LENGTH // PAGE)
        self.shape = Shape(rows, 1, rows, CHUNK)
        self.state = make_state(config, Capacity(1 + rows * self.width, PAGE, rows))
        # Pages in a shuffled order: a page's number says nothing about its place.
        pages = np.random.default_rng(0).permutation(np.arange(1, 1 + rows * self.width))
        self.pages = pages.reshape(rows, self.width)
        self.done = [0] * rows
        graphdef, _ = abstract(config)

        @partial(jax.jit, donate_argnums=1)
        def step(params, state, packed, last):
            decoder = nnx.merge(graphdef, params)
            batch = unpack(self.shape, self.width, PAGE, packed, last)
            x = decoder.embed(batch.tokens, batch)
            x, state = decoder.run(x, state, batch, range(decoder.num_layers))
            return decoder.head(decoder.normalise(x)), state

        self._step = step

    def _run(self, decodes: dict[int, int], prompts: dict[int, np.ndarray]) -> np.ndarray:
        """One step: `decodes` gives rows their next token, `prompts` rows a chunk; logits f32[T,V]."""
        n, last = self.rows, np.zeros(self.rows + 1, np.int32)
        lengths, seats = np.zeros(2 * n, np.int32), np.full(2 * n, n, np.int32)
        table = np.zeros((2 * n, self.width), np.int32)
        starts, prompt = np.zeros(n + 1, np.int32), np.zeros(CHUNK, np.int32)
        for row, token in decodes.items():
            self.done[row] += 1
            lengths[row], seats[row], table[row], last[row] = self.done[row], row, self.pages[row], token
        at = 0
        for slot, (row, chunk) in enumerate(prompts.items()):
            self.done[row] += len(chunk)
            lengths[n + slot], seats[n + slot], table[n + slot] = self.done[row], row, self.pages[row]
            prompt[at : at + len(chunk)] = chunk
            at += len(chunk)
            starts[slot + 1 :] = at
        packed = pack(
            self.shape, self.width, lengths=lengths, seats=seats, samples=np.zeros_like(seats), page_table=table,
            query_starts=starts, prompt_tokens=prompt,
        )  # fmt: skip
        logits, self.state = self._step(self.params, self.state, jnp.asarray(packed), jnp.asarray(last))
        return np.asarray(logits)

    def prefill(self, prompts: list[np.ndarray]) -> list[np.ndarray]:
        """All prompts, CHUNK tokens a step shared in order; logits f32[len,V] of each."""
        parts: list[list[np.ndarray]] = [[] for _ in prompts]
        while any(self.done[row] < len(prompt) for row, prompt in enumerate(prompts)):
            room, chunks = CHUNK, {}
            for row, prompt in enumerate(prompts):
                # No row takes all the room, so that chunks of several rows meet in a step.
                take = min(len(prompt) - self.done[row], room, CHUNK - 3)
                if take:
                    chunks[row] = prompt[self.done[row] : self.done[row] + take]
                    room -= take
            logits = self._run({}, chunks)[self.rows :]
            for row, chunk in chunks.items():
                parts[row].append(logits[: len(chunk)])
                logits = logits[len(chunk) :]
        return [np.concatenate(part) for part in parts]

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """One token a row -> logits f32[B,V]."""
        return self._run(dict(enumerate(tokens)), {})[: self.rows]


# ---------------------------------------------------------------- comparing


def save_reference(reference: Reference, folder: Path) -> None:
    np.savez_compressed(folder / "expected.npz", tokens=reference.tokens, logits=reference.logits)


def recorded_reference(folder: Path) -> Reference:
    with np.load(folder / "expected.npz") as stored:
        return Reference(stored["tokens"], stored["logits"])


def difference(folder: Path, reference: Reference, raw: dict | None = None) -> float:
    """The largest difference of whole-sequence logits, in units of the limit (above 1: they disagree).

    `raw` stands in for the folder's config.json; the weights stay.
    """
    config = load_config(folder)[1] if raw is None else find(raw["model_type"]).config(raw)
    config = tested_config(config)
    got = whole_logits(config, load(folder, config), reference.tokens)
    return float(np.abs(got - reference.logits).max() / reference.limit)


def compare(folder: Path, reference: Reference, whole: bool = True) -> None:
    """Hold a saved checkpoint to the reference: chunked prefill, decode, greedy tokens, and `whole` sequences."""
    config = tested_config(load_config(folder)[1])
    params = load(folder, config)
    tokens, logits, limit = reference.tokens, reference.logits, reference.limit
    assert logits.std() >= 0.6, f"logits deviate by {logits.std():.2f}: too flat to tell models apart"
    if whole:
        worst = np.abs(whole_logits(config, params, tokens) - logits).max()
        assert worst <= limit, f"whole sequences differ by {worst:.1e}, allowed {limit:.1e}"
    served = Served(config, params, len(tokens))
    prompts = [row[:length] for row, length in zip(tokens, PROMPTS)]
    for row, got in enumerate(served.prefill(prompts)):
        worst = np.abs(got - logits[row, : len(got)]).max()
        assert worst <= limit, f"prefill of row {row} differs by {worst:.1e}, allowed {limit:.1e}"
    for step in range(STEPS):
        at = np.asarray(PROMPTS[: len(tokens)]) + step
        each = np.arange(len(tokens))
        got = served.decode(tokens[each, at])
        wanted = logits[each, at]
        worst = np.abs(got - wanted).max()
        assert worst <= limit, f"decode step {step} differs by {worst:.1e}, allowed {limit:.1e}"
        _same_greedy(got, wanted)


def _same_greedy(got: np.ndarray, wanted: np.ndarray) -> None:
    """The same best token a row, except where the two candidates are a near-tie."""
    for ours, theirs in zip(got, wanted):
        gap = theirs.max() - theirs[ours.argmax()]
        assert gap <= TOLERANCE, (
            f"greedy tokens differ: {ours.argmax()} lies {gap:.1e} below {theirs.argmax()}"
        )


def check(
    model_type: str, raw: dict, *, seed: int = 0, control: Callable[[dict], None] | None = None
) -> None:
    """Everything for one raw config of a family, live against transformers.

    `raw` may be written in the older generation of keys: it must mean the same as what transformers saves.
    With `control`, the config with one changed fact must disagree.
    """
    raw = {"model_type": model_type, **raw}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        reference = make_reference(raw, folder, seed)
        saved, config = load_config(folder)
        meant = find(model_type).config(raw)
        same = replace(meant, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids)
        assert same == config, f"{raw} and what transformers saves of it, {saved}, are read differently"
        compare(folder, reference)
        if control is not None:
            changed = json.loads(json.dumps(saved))
            control(changed)
            assert changed != saved, "the control changes nothing"
            assert difference(folder, reference, changed) > 2, "a changed fact went unnoticed"


def check_drawn(model_type: str, seed: int) -> None:
    """`check` on the drawn config number `seed`; number 0 also runs the family's control."""
    control = family_draws(model_type).control if seed == 0 else None
    check(model_type, drawn(model_type, seed), seed=seed, control=control)
