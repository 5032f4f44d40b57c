"""Train the demo model that ships in the wheel: Llama-shaped, 2.9M parameters, on CPU, without downloads.

It learns a few skills that can be scored exactly (see ``evaluation.tasks.skills``) and some English and Python from
the installation's own standard library. The forward pass is the project's ``Decoder``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import random
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import demo_data as data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.extend import core
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, muon
from tokenizers import Tokenizer
from tqdm import tqdm

from jaxserve.evaluation.tasks.skills import HELD_OUT_PERCENT, SKILLS, held_out_cases
from jaxserve.layers.attention import dense_causal_attention
from jaxserve.models.config import DecoderConfig, LayerConfig, RopeConfig
from jaxserve.models.decoder import Decoder
from jaxserve.weights.export import save_hf_llama
from sharding.platform import use_cpu_without_gpus

EXAMPLES = """examples:
  train for 40 minutes (Ctrl-C saves a checkpoint), then score and write the model:
    python scripts/train_demo_model.py --out build/demo_model
  go on after an interruption:
    python scripts/train_demo_model.py --out build/demo_model --resume
  score the checkpoint on 300 unseen cases per skill and write the model that ships:
    python scripts/train_demo_model.py --out build/demo_model --eval-only --export jaxserve/demo_model
  a quick check that everything runs:
    python scripts/train_demo_model.py --out build/try --steps 20 --cases 20
"""
VOCAB_SIZE = 2048
MAX_POSITION = 1024

Params = dict[str, Array]
Batch = tuple[data.Rows, ...]
"""Blocks of rows of different lengths: skills, then text."""


def demo_config() -> DecoderConfig:
    """Wide and shallow: larger products and fewer attention scores than in a deep model of that size."""
    return DecoderConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=512,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        layers=(LayerConfig(),) * 4,
        max_position=MAX_POSITION,
        ropes=(RopeConfig(dim=64, theta=10_000.0),),
        tied_embeddings=True,
        eos_token_ids=(data.SPECIAL_TOKENS.index(data.END), data.SPECIAL_TOKENS.index(data.END_OF_TEXT)),
    )


@dataclass(frozen=True)
class Model:
    """The decoder as functions of a flat dict of float32 parameters."""

    config: DecoderConfig
    graph: Any
    template: nnx.State

    @classmethod
    def create(cls, config: DecoderConfig, seed: int) -> tuple[Model, Params]:
        graph, state = nnx.split(Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(seed)))
        params = {".".join(map(str, path)): p[...] for path, p in nnx.to_flat_state(state)}
        scale = (2 * config.num_layers) ** -0.5  # what is added to the residual stream starts small
        return cls(config, graph, state), {
            name: p * scale if name.endswith((".o", ".down")) else p for name, p in params.items()
        }

    def state(self, params: Params) -> nnx.State:
        flat = nnx.to_flat_state(self.template)
        return nnx.from_flat_state((path, p.replace(params[".".join(map(str, path))])) for path, p in flat)

    def logits(self, params: Params, ids: Array) -> Array:
        """ids [R, T] -> float32 [R, T, V]."""
        decoder = nnx.merge(self.graph, self.state(params))
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32)[None], ids.shape)
        return decoder.unembed(decoder(ids, positions, dense_causal_attention(self.config)))

    def loss(self, params: Params, ids: Array, weights: Array) -> Array:
        """Weighted mean cross-entropy of the next token; ids [R, T+1], weights [R, T]."""
        losses = optax.softmax_cross_entropy_with_integer_labels(self.logits(params, ids[:, :-1]), ids[:, 1:])
        return jnp.sum(losses * weights) / jnp.sum(weights)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _project(x: Array, w: Array, dims: Any) -> Array:
    """dot_general of float32 arrays with bfloat16 factors and float32 sums."""
    x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    return jax.lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)


def _project_forward(x: Array, w: Array, dims: Any) -> tuple[Array, tuple[Array, Array]]:
    return _project(x, w, dims), (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))


def _project_backward(dims: Any, saved: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    """The activations' gradient in bfloat16, the weights' in float32 (in their layout that is faster)."""
    x, w = saved
    wide = x.astype(jnp.float32), w.astype(jnp.float32)
    dot = partial(jax.lax.dot_general, dimension_numbers=dims)
    (dx,) = jax.linear_transpose(lambda x: dot(x, w), x)(grad.astype(jnp.bfloat16))
    (dw,) = jax.linear_transpose(lambda w: dot(wide[0], w), wide[1])(grad)
    return dx.astype(jnp.float32), dw


_project.defvjp(_project_forward, _project_backward)


def with_bfloat16_projections(function: Callable[..., Array]) -> Callable[..., Array]:
    """``function`` with its float32 products without batch axes (the projections) replaced by ``_project``.

    XLA multiplies bfloat16 about twice as fast on CPUs that have the instructions; everything else, attention
    included, stays float32, which is faster there for elementwise work and keeps the model's code as it is.
    """

    def evaluate(jaxpr: core.Jaxpr, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        values: dict[Any, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= zip(jaxpr.invars, inputs, strict=True)
        for equation in jaxpr.eqns:
            primitive, settings = equation.primitive, equation.params
            args = [v.val if isinstance(v, core.Literal) else values[v] for v in equation.invars]
            if primitive.name == "jit":
                inner = settings["jaxpr"]
                results = evaluate(inner.jaxpr, inner.consts, args)
            elif primitive.name == "dot_general" and not settings["dimension_numbers"][1][0]:
                results = [_project(*args, settings["dimension_numbers"])]
            else:
                results = primitive.bind(*args, **primitive.get_bind_params(settings))
                results = results if primitive.multiple_results else [results]
            values |= zip(equation.outvars, results, strict=True)
        return [v.val if isinstance(v, core.Literal) else values[v] for v in jaxpr.outvars]

    def replaced(*args: Any) -> Array:
        traced = jax.make_jaxpr(function)(*args)
        return evaluate(traced.jaxpr, traced.consts, jax.tree.leaves(args))[0]

    return replaced


@dataclass(frozen=True)
class Recipe:
    """How to train. Progress is the share of the budget (minutes or steps) that is used up.

    Minutes are CPU time over the number of cores: other work on the machine makes training longer, not worse.
    """

    seed: int
    minutes: float
    steps: int | None
    peak_rate: float = 4e-3
    final_rate: float = 0.02
    warmup: float = 0.02
    weight_decay: float = 0.05
    skill_share: float = 0.65
    """Weight of the skills' mean loss; the text's has the rest."""
    long_rows_after: float = 0.85
    """From here on rows are longer, so that positions up to MAX_POSITION are trained."""

    def learning_rate(self, progress: float) -> float:
        if progress < self.warmup:
            return self.peak_rate * progress / self.warmup
        cosine = 0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - self.warmup) / (1 - self.warmup)))
        return self.peak_rate * (self.final_rate + (1 - self.final_rate) * cosine)

    def batch(self, packer: data.Packer, step: int, progress: float) -> Batch:
        """Skill rows and text rows of one step; depends on the seed and the step alone."""
        rng = random.Random(f"batch {self.seed} {step}")
        if progress < self.long_rows_after:
            return packer.skill_rows(rng, 24, 128), packer.text_rows(rng, 4, 256)
        return packer.skill_rows(rng, 12, 256), packer.text_rows(rng, 2, MAX_POSITION)

    def optimiser(self) -> optax.GradientTransformation:
        """Muon for the projections, AdamW for embedding and norms; the update is to be scaled by the rate."""
        tx = muon(
            1.0,
            ns_steps=4,
            preconditioning="aol",
            weight_decay=self.weight_decay,
            adam_b2=0.98,
            muon_weight_dimension_numbers=_matrices,  # pyright: ignore[reportArgumentType]
            consistent_rms=0.2,
        )
        return optax.chain(optax.clip_by_global_norm(1.0), tx)


def _matrices(params: Any) -> Any:
    """Which axes of the projections are their matrices' (one per head, one each for gate and up)."""
    axes = {
        "qkv": MuonDimensionNumbers(0, 3),
        "o": MuonDimensionNumbers(2, 3),
        "gate_up": MuonDimensionNumbers(0, 2),
        "down": MuonDimensionNumbers(0, 1),
    }
    return {name: axes.get(name.rsplit(".", 1)[-1]) for name in params}


@dataclass
class Run:
    """What a checkpoint holds besides arrays."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    """CPU time divided by the number of cores."""
    wall_seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)
    """Running means over about 50 steps."""

    def progress(self, recipe: Recipe) -> float:
        used = self.step / recipe.steps if recipe.steps else self.seconds / (recipe.minutes * 60)
        return min(1.0, used)


def save_checkpoint(path: Path, run: Run, params: Params, state: optax.OptState) -> None:
    arrays: dict[str, Any] = {f"params/{name}": np.asarray(p) for name, p in params.items()}
    arrays |= {f"state/{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    partial_path = path.with_suffix(".partial.npz")
    np.savez(partial_path, **arrays, run=np.asarray(json.dumps(asdict(run))))
    partial_path.rename(path)


def load_checkpoint(path: Path, state: optax.OptState | None) -> tuple[Run, Params, optax.OptState | None]:
    """``state`` gives the optimiser state's structure; None leaves it out."""
    with np.load(path) as stored:
        run = Run(**json.loads(str(stored["run"])))
        params = {n.removeprefix("params/"): jnp.asarray(stored[n]) for n in stored if n.startswith("params/")}
        if state is not None:
            leaves, structure = jax.tree.flatten(state)
            state = jax.tree.unflatten(structure, [jnp.asarray(stored[f"state/{i}"]) for i in range(len(leaves))])
    return run, params, state


class Stop:
    """Turns the first interrupt into a request; a second one interrupts as usual."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: object) -> None:
        self.requested = True
        signal.signal(number, signal.SIG_DFL)


def train(model: Model, params: Params, packer: data.Packer, recipe: Recipe, args: argparse.Namespace) -> bool:
    """Train until the budget is used up (True) or an interrupt asks to stop; a checkpoint is left anyway."""
    checkpoint = args.out / "checkpoint.npz"
    optimiser = recipe.optimiser()
    state = optimiser.init(params)
    run = Run()
    if args.resume:
        run, params, state = load_checkpoint(checkpoint, state)

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    params, state = jax.device_put((params, state), NamedSharding(mesh, PartitionSpec()))
    by_rows = NamedSharding(mesh, PartitionSpec("data"))
    loss = with_bfloat16_projections(model.loss)

    def total_loss(params: Params, arrays: Sequence[tuple[Array, Array]]) -> tuple[Array, tuple[Array, Array]]:
        skills, text = (loss(params, *rows) for rows in arrays)
        return recipe.skill_share * skills + (1 - recipe.skill_share) * text, (skills, text)

    @partial(jax.jit, donate_argnums=(0, 1))
    def update(
        params: Params, state: optax.OptState, arrays: Sequence[tuple[Array, Array]], rate: Array
    ) -> tuple[Params, optax.OptState, tuple[Array, Array]]:
        grads, losses = jax.grad(total_loss, has_aux=True)(params, arrays)
        updates, state = optimiser.update(grads, state, params)
        return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, losses

    stop = Stop()
    scorer = Scorer(model, packer.tokenizer)
    budget = recipe.steps or round(recipe.minutes * 60)
    bar = tqdm(
        total=budget,
        initial=min(budget, run.step if recipe.steps else int(run.seconds)),
        unit="step" if recipe.steps else "s",
        mininterval=1 if sys.stderr.isatty() else 20,
        maxinterval=10 if sys.stderr.isatty() else 60,
        bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} {unit}, ETA {remaining}{postfix}",
    )
    last_save = last_check = run.seconds
    while not stop.requested and (progress := run.progress(recipe)) < 1:
        began, cpu_began = time.monotonic(), time.process_time()
        batch = recipe.batch(packer, run.step, progress)
        rate = jnp.asarray(recipe.learning_rate(progress), jnp.float32)
        arrays = jax.device_put([(b.ids, b.weights) for b in batch], by_rows)
        params, state, (skills, text) = update(params, state, arrays, rate)
        for name, value in (("skills", skills), ("text", text)):
            run.losses[name] = 0.98 * run.losses.get(name, float(value)) + 0.02 * float(value)
        tokens = sum(b.weights.size for b in batch)
        seconds = time.monotonic() - began
        run.step += 1
        run.tokens += tokens
        run.wall_seconds += seconds
        run.seconds += (time.process_time() - cpu_began) / jax.device_count()
        bar.set_postfix_str(
            f"step {run.step}, loss {run.losses['skills']:.3f} skills {run.losses['text']:.3f} text, "
            f"{tokens / seconds:.0f} tokens/s",
            refresh=False,
        )
        bar.update(min(budget, run.step if recipe.steps else int(run.seconds)) - bar.n)
        if run.seconds - last_save > 120:
            last_save = run.seconds
            save_checkpoint(checkpoint, run, params, state)
        if run.seconds - last_check > args.check_every:
            last_check = run.seconds
            scores = {skill: scorer.exact_match(params, skill, 60, chat=False) for skill in SKILLS}
            line = "  ".join(f"{skill} {score:.0%}" for skill, score in scores.items())
            tqdm.write(f"[{run.seconds / 60:5.1f} min, step {run.step}] {line}", file=sys.stderr)
    bar.close()
    save_checkpoint(checkpoint, run, params, state)
    return not stop.requested


class Scorer:
    """Scores on held-out data."""

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._greedy = jax.jit(lambda params, ids: jnp.argmax(model.logits(params, ids), axis=-1))
        self._loss = jax.jit(model.loss)

    def exact_match(self, params: Params, skill: str, count: int, *, chat: bool, seed: int = 0) -> float:
        """Share of unseen cases that greedy decoding answers exactly, up to the token that ends the answer.

        One forward pass over question and right answer decides it: greedy decoding gives that answer if and
        only if each of its tokens is the most likely one after those before it.
        """
        cases = held_out_cases(skill, count, seed)
        pairs = [data.chat_form(c.wordings[0], c.answer) if chat else data.plain_form(c) for c in cases]
        encoded = self.tokenizer.encode_batch([s.text for pair in pairs for s in pair], add_special_tokens=False)
        ids = np.zeros((count, 96), np.int32)
        answer = np.zeros((count, 96), bool)
        for row, (question, reply) in enumerate(zip(encoded[::2], encoded[1::2], strict=True)):
            n, m = len(question.ids), len(question.ids) + len(reply.ids)
            ids[row, :m], answer[row, n:m] = question.ids + reply.ids, True
        right = 0
        for at in range(0, count, 60):
            chosen = np.asarray(self._greedy(params, jnp.asarray(ids[at : at + 60])))
            matches = (chosen[:, :-1] == ids[at : at + 60, 1:]) | ~answer[at : at + 60, 1:]
            right += int(matches.all(axis=1).sum())
        return right / count

    def text_loss(self, params: Params, packer: data.Packer, rows: int = 48) -> float:
        """Mean loss per token of held-out text, in nats."""
        batch = packer.text_rows(random.Random("held-out text"), rows, 256)
        losses = [
            float(self._loss(params, jnp.asarray(batch.ids[i : i + 8]), jnp.asarray(batch.weights[i : i + 8])))
            for i in range(0, rows, 8)
        ]
        return float(np.mean(losses))

    def complete(self, params: Params, prompt: str, max_tokens: int = 40) -> str:
        """Greedy continuation."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=False).ids
        start = len(ids)
        while len(ids) < min(start + max_tokens, 128) and ids[-1] not in self.model.config.eos_token_ids:
            padded = jnp.asarray([ids + [0] * (128 - len(ids))], jnp.int32)
            ids.append(int(self._greedy(params, padded)[0, len(ids) - 1]))
        return self.tokenizer.decode(ids[start:])


def rounded(params: Params) -> Params:
    """The parameters as they are stored: through bfloat16."""
    return {name: p.astype(jnp.bfloat16).astype(jnp.float32) for name, p in params.items()}


def evaluate(scorer: Scorer, params: Params, corpus: data.Corpus, cases: int) -> dict[str, Any]:
    """Exact match per skill and form, loss on held-out text, and some completions."""
    params = rounded(params)
    match: dict[str, dict[str, float]] = {}
    for skill in tqdm(SKILLS, desc="scoring", file=sys.stderr):
        match[skill] = {
            "plain": scorer.exact_match(params, skill, cases, chat=False, seed=1),
            "chat": scorer.exact_match(params, skill, cases, chat=True, seed=1),
        }
    chats = ("Hello!", "What is 17 + 25?", "sort 42 7 19?", "What is textwrap.fill?")
    prompts = [
        *("".join(s.text for s in data.chat_form(c, "")[:1]) for c in chats),
        "Return the",
        "def __init__(",
    ]
    return {
        "exact_match": match,
        "cases": cases,
        "text_loss": scorer.text_loss(params, data.Packer.create(scorer.tokenizer, corpus)),
        "completions": {prompt: scorer.complete(params, prompt) for prompt in prompts},
    }


def write_model(
    directory: Path, model: Model, params: Params, tokenizer: Tokenizer, run: Run, scores: Mapping[str, Any]
) -> None:
    """Everything that the directory of a Hugging Face model holds, and the model card."""
    config = model.config
    save_hf_llama(model.state(params), config, directory)
    data.save_tokenizer(tokenizer, directory, config.max_position)
    generation = {"eos_token_id": list(config.eos_token_ids), "pad_token_id": 0, "do_sample": False}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    size = sum(p.stat().st_size for p in directory.iterdir() if p.suffix in (".safetensors", ".json"))
    (directory / "README.md").write_text(model_card(model, params, run, scores, size))


def model_card(model: Model, params: Params, run: Run, scores: Mapping[str, Any], size: int) -> str:
    config = model.config
    count, cores = sum(p.size for p in params.values()), jax.device_count()
    examples = {skill: held_out_cases(skill, 1, seed=2)[0] for skill in SKILLS}
    rows = "\n".join(
        f"| {name} | `{examples[name].wordings[0]}` | `{examples[name].answer}` | {s['plain']:.1%} | {s['chat']:.1%} |"
        for name, s in scores["exact_match"].items()
    )
    completions = "\n".join(f"- {json.dumps(p)} → {json.dumps(c)}" for p, c in scores["completions"].items())
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return f"""# jaxserve demo model

A tiny Llama-shaped language model, trained from scratch so that the engine can be tried and tested without a
download. {count:,} parameters, {size / 1e6:.1f} MB with its tokenizer, bfloat16.

## Intended use

Demonstrations and tests of the engine. It is not a useful language model: it knows a few mechanical skills
and the look of Python and of its documentation, and what it says about anything else is made up.

## Model

`LlamaForCausalLM`: {config.num_layers} layers, hidden size {config.hidden_size}, {config.num_heads} query heads and
{config.num_kv_heads} KV heads of {config.head_dim}, feed-forward {config.intermediate_size}, tied embeddings,
vocabulary {config.vocab_size} (byte-level BPE, one token per digit), context {config.max_position} tokens.

Prompts are `Q: 17 + 25?` and on the next line `A:` (the answer ends with a newline), or the chat template
(`{data.USER}...{data.END}{data.ASSISTANT}`; the answer ends with `{data.END}`).

## Data

- Skills: questions made by a generator, with their exact answers. {HELD_OUT_PERCENT} % of all possible
  cases, chosen by a hash of what is asked, are never trained on in any wording.
- English and Python: the {data.library_name()} (sources, docstrings, `pydoc_data`, text files), under
  the PSF license; mail and web addresses replaced. {HELD_OUT_PERCENT} % of the files are held out.

## Training

{run.step:,} steps, {run.tokens / 1e6:.1f} M tokens, {run.seconds / 60:.0f} minutes of all {cores} CPU cores
({platform.machine()}; {run.wall_seconds / 60:.0f} minutes by the clock, next to other work), Muon and AdamW with
warm-up and cosine decay, by `scripts/train_demo_model.py`. Final training loss per token:
{run.losses.get("skills", math.nan):.3f} on skills (answers; questions count little),
{run.losses.get("text", math.nan):.2f} on text. Held-out text: {scores["text_loss"]:.2f} nats per token.

## Exact match

{scores["cases"]} unseen cases per skill and form, greedy, {today}, jax {jax.__version__}, weights as stored:

| skill | example | answer | plain | chat |
|---|---|---|---|---|
{rows}

## Greedy completions

{completions}

## Limits

Numbers beyond three digits, lists beyond six items, other wordings than the trained ones and anything that
asks for knowledge fail. Most of the training was on sequences of up to 256 tokens. English only.
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo_model"), help="checkpoint and tokenizer (%(default)s)"
    )
    parser.add_argument("--export", type=Path, help="where the model is written (default: OUT/model)")
    parser.add_argument("--minutes", type=float, default=40.0, help="budget: CPU time of all cores (%(default)s)")
    parser.add_argument("--steps", type=int, help="a budget in steps instead of minutes")
    parser.add_argument("--resume", action="store_true", help="go on from OUT's checkpoint, time used included")
    parser.add_argument("--eval-only", action="store_true", help="score and write OUT's checkpoint, no training")
    parser.add_argument("--cases", type=int, default=300, help="unseen cases per skill and form (%(default)s)")
    parser.add_argument("--check-every", type=float, default=240.0, help="seconds between spot checks (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokenizer and batches (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    cores = len(os.sched_getaffinity(0))
    # A device per core, each with its share of the rows: cores wait for each other once per step and not in
    # every operation, so that one core that is busy elsewhere does not hold up the others.
    use_cpu_without_gpus()
    jax.config.update("jax_num_cpu_devices", cores)
    args.out.mkdir(parents=True, exist_ok=True)
    model, params = Model.create(demo_config(), args.seed)
    stored_tokenizer = args.out / "tokenizer.json"
    if args.eval_only:
        tokenizer = Tokenizer.from_file(str(stored_tokenizer))
    else:
        print("reading the standard library, making the tokenizer", file=sys.stderr)
        corpus = data.read_corpus(held_out=False)
        if args.resume:
            tokenizer = Tokenizer.from_file(str(stored_tokenizer))
        else:
            tokenizer = data.train_tokenizer(corpus, VOCAB_SIZE, args.seed)
            tokenizer.save(str(stored_tokenizer))
        packer = data.Packer.create(tokenizer, corpus)
        recipe = Recipe(seed=args.seed, minutes=args.minutes, steps=args.steps)
        if not train(model, params, packer, recipe, args):
            sys.exit("stopped, checkpoint saved; go on with --resume")
    run, params, _ = load_checkpoint(args.out / "checkpoint.npz", None)
    scores = evaluate(Scorer(model, tokenizer), params, data.read_corpus(held_out=True), args.cases)
    directory = args.export or args.out / "model"
    write_model(directory, model, params, tokenizer, run, scores)
    for skill, score in scores["exact_match"].items():
        print(f"{skill:8} plain {score['plain']:6.1%}  chat {score['chat']:6.1%}")
    print(f"held-out text {scores['text_loss']:.3f} nats per token; model written to {directory}")


if __name__ == "__main__":
    main()
