"""Measured tiles: the table on disk, which entry serves a case, and `tokenloom tune` up to an engine that uses it."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenloom import LLM, SamplingParams
from tokenloom.attention.blockwise import Blockwise
from tokenloom.attention.ops import AttentionSpec, PagedView
from tokenloom.model.config import llama_config
from tokenloom.pallas_kernels.attention.tiles import Case, TpuTiles, TritonTiles, TwinTiles
from tokenloom.pallas_kernels.attention.tuned import Tuned, load, save, table_path
from tokenloom.pallas_kernels.chips import CPU, GPUS, TPUS
from tokenloom.serve import tune
from tokenloom.serve.build import pool_bytes, use_compilation_cache
from tokenloom.serve.cli import main
from tokenloom.serve.tune import candidates, fields
from tokenloom.serve.workload import Heads
from tokenloom.tests.tiny import CONFIG

ROWS = Case("rows", 1, 2, 4, 64, 16, 32, "float32", "float32")
SIZES = dict(max_num_seqs=2, max_num_batched_tokens=32, max_model_len=128)
PROMPT = replace(ROWS, part="prompt", tokens=128)


def test_tables_are_kept_a_chip_and_a_kernel(tmp_path):
    assert load(tmp_path / "nowhere", CPU, TwinTiles) == Tuned()
    v5e = TPUS["TPU v5e"]
    save(tmp_path, CPU, [(ROWS, TwinTiles(64, 2), {}), (PROMPT, TwinTiles(32, 8), {})])
    save(tmp_path, v5e, [(ROWS, TpuTiles(1, 4), {})])
    save(tmp_path, CPU, [(ROWS, TwinTiles(64, 4), {"ratio": 0.5})])  # in place of the first
    found = load(tmp_path, CPU, TwinTiles)
    assert found.lookup(ROWS) == TwinTiles(64, 4) and found.lookup(PROMPT) == TwinTiles(32, 8)
    assert len(found.entries) == 2 and hash(found) == hash(Tuned(found.entries)) and found != Tuned()
    assert load(tmp_path, v5e, TpuTiles).lookup(ROWS) == TpuTiles(1, 4)
    assert load(tmp_path, CPU, TpuTiles) == Tuned()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cpu-v1.json", "v5e-v1.json"]


def test_a_table_of_another_version_is_ignored(tmp_path):
    path = save(tmp_path, CPU, [(ROWS, TwinTiles(64, 2), {})])
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"version": 0, "entries": "of another form"}))
    assert load(tmp_path, CPU, TwinTiles) == Tuned()
    # Tiles with other fields than today's were measured for another kernel.
    del table["entries"][0]["tiles"]["pages"]
    path.write_text(json.dumps(table))
    assert load(tmp_path, CPU, TwinTiles) == Tuned()


@pytest.mark.parametrize("at, value", [("tiles", 1), ("case", {}), ("kernel", None)])
def test_a_corrupt_table_is_named_with_the_remedy(tmp_path, at, value):
    path = save(tmp_path, CPU, [(ROWS, TwinTiles(64, 2), {})])
    table = json.loads(path.read_text())
    table["entries"][0][at] = value
    for text in (json.dumps(table), path.read_text()[:-20], "[]"):
        path.write_text(text)
        for use in (lambda: load(tmp_path, CPU, TwinTiles), lambda: save(tmp_path, CPU, [])):
            with pytest.raises(ValueError, match=r"cpu-v1\.json is not a readable .* delete it"):
                use()


@pytest.mark.parametrize("field, value", [("pages", "8"), ("pages", -1), ("queries", 1.5)])
def test_tiles_are_whole_numbers(tmp_path, field, value):
    path = save(tmp_path, CPU, [(ROWS, TwinTiles(64, 2), {})])
    table = json.loads(path.read_text())
    table["entries"][0]["tiles"][field] = value
    path.write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"{field}=.*TwinTiles"):
        load(tmp_path, CPU, TwinTiles)


def test_the_nearest_case_serves():
    tuned = Tuned(tuple((replace(PROMPT, tokens=n), TwinTiles(n, n)) for n in (32, 256, 1024)))
    for tokens, expected in ((32, 32), (64, 32), (100, 256), (300, 256), (512, 256), (4096, 1024)):
        assert tuned.lookup(replace(PROMPT, tokens=tokens)) == TwinTiles(expected, expected)
    wider = replace(PROMPT, tokens=256, width=2 * PROMPT.width, kv_heads=4)
    assert tuned.lookup(wider) == TwinTiles(256, 256)
    # Where tiles would mean something else, or would not fit, the heuristic decides.
    for name, value in (
        ("part", "rows"), ("group", 8), ("head_dim", 128), ("page_size", 32), ("kv_dtype", "int8"), ("q_dtype", "x")
    ):  # fmt: skip
        assert tuned.lookup(replace(PROMPT, **{name: value})) is None
    tree = Tuned(((ROWS, TwinTiles(1, 1)),))
    assert tree.lookup(replace(ROWS, width=64)) and tree.lookup(replace(ROWS, tokens=2)) is None


def test_a_table_that_cannot_be_written_says_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert main(["tune", "--quick"]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main(["tune", "--quick", "--heads", "3", "--kv-heads", "2"]) == 2
    assert "heads=3 must be a multiple of kv_heads=2" in capsys.readouterr().err


def test_candidates_fit_the_chip():
    case = Case("prompt", 2048, 8, 4, 128, 128, 64, "bfloat16", "bfloat16")
    for name, chip in TPUS.items():
        first = TpuTiles.choose(case, chip)
        found = [tiles for field in ("queries", "pages") for tiles in candidates(first, field, case, chip)]
        assert first in found
        assert all(tiles.vmem_bytes(case) <= chip.memory for tiles in found), name
    for part, chip in (("rows", GPUS["L4"]), ("prompt", GPUS["H200"])):
        case = replace(case, part=part, tokens=1 if part == "rows" else 2048)
        first = TritonTiles.choose(case, chip)
        for field in fields(TritonTiles, part):
            found = candidates(first, field, case, chip)
            assert found[0] == first and len(found) > 1
            for tiles in found:
                tiles.check(case, chip)
    case = replace(case, part="prompt", tokens=2048)
    roomy = [len(candidates(TpuTiles(8, 1), "pages", case, TPUS[name])) for name in ("TPU v4", "TPU v6e")]
    assert roomy[0] < roomy[1]


def searched(monkeypatch, cost, slowed=1):
    """What is chosen for a decode when a call of the twin with `pages` takes cost(pages) seconds, and every second
    round takes `slowed` times as long."""

    def bursts(calls, rounds):
        return [[call() * (slowed if at % 2 else 1) for at in range(rounds + 1)] for call in calls]

    class Calls:
        def __init__(self, *of):
            pass

        def caller(self, backend, spec):
            cost(pages := backend.tuned.entries[0][1].pages)
            return lambda: cost(pages)

    monkeypatch.setattr(tune, "Inputs", Calls)
    monkeypatch.setattr(tune, "bursts", bursts)
    monkeypatch.setattr(tune, "side_by_side", lambda calls, rounds, slack: [call() for call in calls])
    heads = Heads(4, 2, 16, 16)
    return tune.tune_case(Blockwise(), CPU, heads, tune.works(heads, tune.Sizes(64, 4, 32), False)[0], 2)


def test_the_fastest_candidate_is_chosen(monkeypatch):
    found = searched(monkeypatch, lambda pages: 1 + abs(pages - 4))
    assert found.heuristic == TwinTiles() and found.best == TwinTiles(pages=4)
    assert found.ratio == pytest.approx(1 / 5) and found.seconds == (1,) * 4 and found.noise == 0
    # What is hardly faster is not worth a change.
    assert searched(monkeypatch, lambda pages: 0.98 if pages == 4 else 1).best == TwinTiles()
    # Nor is what noise may have made.
    for slowed, expected in ((1, 4), (3, 8)):
        found = searched(monkeypatch, lambda pages: 0.95 if pages == 4 else 1, slowed)
        assert found.best == TwinTiles(pages=expected) and found.noise == pytest.approx((slowed - 1) / 2)

    def refusing(*refused):
        def cost(pages: int) -> float:
            if pages in refused:
                raise NotImplementedError(f"not {pages}")
            return 1 + abs(pages - 4)

        return cost

    assert searched(monkeypatch, refusing(4)).best == TwinTiles(pages=2)
    refused = searched(monkeypatch, refusing(8))
    assert refused.best is None and refused.reason == "not 8"
    tune.as_table([found, refused])


def test_what_is_measured_fits_what_the_engine_will_hold():
    for sizes in (tune.Sizes(), tune.Sizes(16, 2, 64), tune.Sizes(131072, 64, 8192), tune.Sizes(1, 1, 1)):
        heads = Heads(32, 8, 128, 128)
        for quick in (False, True):
            found = tune.works(heads, sizes, quick)
            assert [works[0].part for works in found] == ["rows"] + ["prompt"] * (len(found) - 1) and found[
                1:
            ]
            for works in found:
                (case,) = {work.case(heads) for work in works}
                assert case.tokens <= max(1, sizes.max_num_batched_tokens)
                for work in works:
                    assert max(work.lengths) <= min(sizes.max_model_len, heads.page_size * work.width)
                    assert len(work.lengths) <= max(sizes.max_num_seqs, sizes.max_num_batched_tokens)
                    assert work.kv_bytes(heads) <= pool_bytes() / 3


def test_the_twin_takes_the_tiles_of_its_case():
    q = jnp.zeros((8, 1, 4, 16))
    view = PagedView(
        jnp.zeros((9, 2, 16, 16)), jnp.zeros((9, 2, 16, 16)), jnp.ones((8, 1), int), jnp.ones(8, int)
    )
    flat, starts, spec = jnp.zeros((64, 4, 16)), jnp.arange(9) * 8, AttentionSpec(1.0)

    def texts(backend: Blockwise) -> list[str]:
        calls = (lambda: backend.rows(q, view, spec)), (lambda: backend.prompt(flat, view, starts, spec))
        return [jax.jit(call).lower().as_text() for call in calls]

    rows, prompt = Case.of("rows", q, view), Case.of("prompt", flat, view)
    tuned = Blockwise(tuned=Tuned(((rows, TwinTiles(1, 2)), (prompt, TwinTiles(16, 1)))))
    assert texts(tuned) == texts(Blockwise(16, 2)) != texts(Blockwise())


def test_an_engine_uses_what_tune_found(tmp_path, monkeypatch, capsys):
    use_compilation_cache()  # before the folder changes: programs are kept where they always are
    config = llama_config(**CONFIG)
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    prompts = [np.random.default_rng(length).integers(3, 4096, length).tolist() for length in (3, 20, 50)]

    def tokens() -> tuple[list, tuple]:
        with LLM.from_config(config, 0, progress=False, **SIZES) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            return [one.outputs[0].token_ids for one in outputs], llm.engine.programs.state[0].backends

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected, before = tokens()
    assert before == (Blockwise(),)
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert main(["tune", "--quick", "--heads=2", "--kv-heads=1", "--head-dim=16", *sizes]) == 0
    assert "cases measured" in capsys.readouterr().out
    folder = tmp_path / "tokenloom" / "tiles"
    measured = load(folder, CPU, TwinTiles)
    assert {case.part for case, _ in measured.entries} == {"rows", "prompt"}
    # Noise may have left the heuristic where it was; these tiles are surely others.
    save(folder, CPU, [(case, TwinTiles(16, 3), {}) for case, _ in measured.entries])
    found, after = tokens()
    view = PagedView(
        jnp.zeros((2, 1, 16, 128)), jnp.zeros((2, 1, 128, 16)), jnp.zeros((4, 1), int), jnp.ones(4)
    )
    case = Case.of("rows", jnp.zeros((4, 1, 2, 16)), view)
    assert after[0].tiles(case) == TwinTiles(16, 3) != before[0].tiles(case)
    assert found == expected
    table_path(folder, CPU).write_text("{")
    with pytest.raises(ValueError, match="tokenloom tune"):
        tokens()
