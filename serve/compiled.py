"""Compiled programs in a folder: an engine that starts on them compiles nothing.

`manifest.json` says what the programs depend on (`fingerprint`) and lists them, each with its file and sha256; weights
are not among them. JAX serialises an executable with pickle (`jax.experimental.serialize_executable`), so an artefact
is code that runs with the rights of whoever opens it. It is opened only from a folder that the user names, after facts
and hashes agree. Hashes find damage, not malice: who can write a file can write the manifest.

A program's file holds the executable, its arguments' and results' shapes, shardings and layouts, and the ids of its
devices. The trees of arguments and results, which hold classes of this package, are made from the engine at hand.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from tqdm.auto import tqdm

from ..pallas_kernels.chips import Chip
from .fingerprint import Facts, differences, shapes_digest
from .sampling.sampler import Sampled

MANIFEST, FORMAT = "manifest.json", 1
NOTICE = "the files beside this one are code: open them only when you trust who wrote them"
ENTRY = {"key", "file", "bytes", "sha256", "arguments", "result"}
LEAF = jax.tree.structure(0)
RESULTS = (Sampled(0, 0, 0), Sampled(0, 0, 0, 0))  # type: ignore[arg-type]
REMEDY = "write one with `tokenloom compile MODEL -o FOLDER` (or LLM.save_compiled), or start without compiled programs"


CHIP_OPTIONS: dict[str, dict[str, Any]] = {
    # Loops over stacked layers would take bfloat16 weights in tiles of 16 x 128 numbers, but arguments lie in tiles of
    # 8 x 128, so that every step copied all weights first. Neither layout of arguments can be asked for.
    "7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "0"},
}
"""What the compiler is told for every program of a chip."""


@dataclass(frozen=True)
class Job:
    """A program that is not compiled yet: a jitted function and specs of its arguments. `like`: trees that a result may
    have, beside those of the arguments; `options`: what the compiler is told."""

    jitted: Any
    arguments: tuple = ()
    like: tuple = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def compile(self, **more: Any) -> Any:
        """The executable."""
        told = {**self._chip_options(), **self.options, **more}
        return self.jitted.lower(*self.arguments).compile(told or None)

    def _chip_options(self) -> Mapping[str, Any]:
        """What the compiler is told for the devices where the arguments lie."""
        places = (leaf.sharding for leaf in jax.tree.leaves(self.arguments))
        device = next((one for place in places if place is not None for one in place.device_set), None)
        return {} if device is None else CHIP_OPTIONS.get(Chip.of(device).name, {})

    @property
    def in_tree(self) -> Any:
        return jax.tree.structure((self.arguments, {}))

    @property
    def known(self) -> list[Any]:
        """The trees in whose terms a result's is written down."""
        return [jax.tree.structure(one) for one in (*self.arguments, *self.like, *RESULTS)]


def specs(tree: Any) -> Any:
    """Shapes, dtypes and places of a tree's arrays, without the arrays."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), tree)


def describe_tree(tree: Any, known: Sequence[Any]) -> Any:
    """A tree in JSON: "*" an array, a number one of the `known` trees, a list a tuple. ValueError for any other."""
    if tree == LEAF:
        return "*"
    if tree in known:
        return known.index(tree)
    node = tree.node_data()
    if node is None or node[0] is not tuple:
        raise ValueError(f"a program's result has a part that none of its arguments has: {tree}")
    return [describe_tree(child, known) for child in tree.children()]


def build_tree(described: Any, known: Sequence[Any]) -> Any:
    """The inverse of `describe_tree`."""
    if isinstance(described, list):
        return jax.tree_util.treedef_tuple([build_tree(one, known) for one in described])
    return LEAF if described == "*" else known[described]


def _in_threads(function: Callable, items: Mapping[Any, Any], doing: str, progress: bool) -> dict[Any, Any]:
    """{key: function(item)}, in parallel threads, which have the caller's default device."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]

    def run(item: Any) -> Any:
        with jax.default_device(device):
            return function(item)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        futures = {key: pool.submit(run, item) for key, item in items.items()}
        keys: Iterable[Any] = tqdm(futures, doing, unit="program", leave=False, disable=not progress)
        return {key: futures[key].result() for key in keys}


def start_job(key: Any, function: Callable[[], Any], shardings: Any = None) -> Job:
    """The program, called `key`, that makes the arrays of `function` on their devices (None: the default one)."""

    def run() -> Any:
        return function()

    run.__name__ = str(key)
    placed = {} if shardings is None else {"out_shardings": shardings}
    return Job(jax.jit(run, **placed), (), (jax.eval_shape(function),))


def compile_jobs(jobs: Mapping[Any, Job], progress: bool = False) -> dict[Any, Any]:
    """Key -> executable, compiled in parallel threads."""
    return _in_threads(lambda job: job.compile(), jobs, "compiling", progress)


# -- writing -----------------------------------------------------------------------------------------------


def check_new(folder: str | Path) -> Path:
    """ValueError when there is something at `folder` already."""
    path = Path(folder)
    if path.exists():
        raise ValueError(f"{path} exists already; choose another folder for the compiled programs")
    return path


@contextmanager
def _without_cache() -> Iterator[None]:
    """Inside, JAX's compilation cache gives nothing: on CPU, what was read from it lacks functions when it is
    serialised once more. Programs must be lowered anew, too: JAX keeps executables by what they were lowered to."""
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks once a process whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def write(folder: str | Path, facts: Facts, jobs: Mapping[Any, Job], progress: bool = False) -> Path:
    """Compile an engine's programs and write them, the manifest last; the folder appears when all is there. The jobs
    must be new: none may have been compiled before.

    ValueError when it exists, or where a program cannot be written.
    """
    path = check_new(folder)
    with _without_cache():
        executables = compile_jobs(jobs, progress)
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial_path.mkdir(parents=True)
    listed = [
        _write_program(partial_path, number, key, job, executables[key])
        for number, (key, job) in enumerate(jobs.items())
    ]
    manifest = {"format": FORMAT, "notice": NOTICE, "facts": facts, "programs": listed}
    (partial_path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    partial_path.rename(path)
    return path


def _write_program(folder: Path, number: int, key: Any, job: Job, executable: Any) -> dict[str, Any]:
    """Write one program; its entry in the manifest."""
    payload, in_tree, out_tree = serialize(executable)
    if in_tree != job.in_tree:
        raise ValueError(f"the program {key!r} takes other arguments than it was lowered for")
    name = re.sub(r"[^A-Za-z0-9]+", "_", job.jitted.__name__)
    file = f"{number:03}_{name}.bin"
    (folder / file).write_bytes(payload)
    return {
        "key": repr(key), "file": file, "bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest(),
        "arguments": shapes_digest(job.arguments), "result": describe_tree(out_tree, job.known),
    }  # fmt: skip


# -- opening -----------------------------------------------------------------------------------------------


@dataclass
class Artefact:
    """A folder of programs. `payloads`: what `check` read and hashed, by key, until a program is made of it."""

    folder: Path
    manifest: dict[str, Any]
    payloads: dict[str, bytes] = field(default_factory=dict)

    @staticmethod
    def of(folder: str | Path) -> Artefact:
        """Reads the manifest, nothing else. ValueError where there is none."""
        path = Path(folder)
        try:
            manifest = json.loads((path / MANIFEST).read_text())
            facts, programs = manifest["facts"], manifest["programs"]
            if not {"device", "engine"} <= {
                name for name, section in facts.items() if isinstance(section, dict)
            }:
                raise TypeError("it says nothing of a device or an engine")
            if not all(entry.keys() >= ENTRY for entry in programs):
                raise TypeError(f"a program lacks one of {', '.join(sorted(ENTRY))}")
        except OSError as error:
            raise ValueError(f"compiled={str(path)!r} has no {MANIFEST}; {REMEDY}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path / MANIFEST} is not a manifest ({error}); {REMEDY}") from error
        return Artefact(path, manifest)

    @property
    def programs(self) -> dict[str, dict[str, Any]]:
        """The manifest's entries by key."""
        return {entry["key"]: entry for entry in self.manifest["programs"]}

    def check(self, facts: Facts) -> list[str]:
        """What is wrong with it for an engine with these facts. Reads and hashes the files, and opens none."""
        if self.manifest.get("format") != FORMAT:
            return [f"format: the artefact has {self.manifest.get('format')}, this process reads {FORMAT}"]
        return differences(self.manifest["facts"], facts) or [
            wrong for entry in self.manifest["programs"] if (wrong := self._read(entry))
        ]

    def _read(self, entry: dict[str, Any]) -> str | None:
        name = entry["file"]
        if Path(name).name != name:
            return f"{name}: names a file outside the folder"
        path = self.folder / name
        if not path.is_file():
            return f"{name}: the file is missing"
        payload = path.read_bytes()
        if len(payload) != entry["bytes"]:
            return f"{name}: the file has {len(payload)} bytes, the manifest says {entry['bytes']}"
        if hashlib.sha256(payload).hexdigest() != entry["sha256"]:
            return f"{name}: the file's sha256 is not the manifest's"
        self.payloads[entry["key"]] = payload
        return None

    def lacks(self, jobs: Mapping[Any, Job]) -> list[str]:
        """The jobs that it has no program for, or one that takes other arguments."""
        programs = self.programs
        return [
            f"program {key!r}: " + ("the artefact has none" if known is None else "it takes other arguments")
            for key, job in jobs.items()
            if (known := programs.get(repr(key))) is None
            or known["arguments"] != shapes_digest(job.arguments)
        ]

    def load(self, jobs: Mapping[Any, Job], devices: Sequence[Any], progress: bool) -> dict[Any, Any]:
        """Key -> executable on `devices`. This runs what the files say."""
        programs = self.programs
        load = partial(self._load, programs=programs, devices=devices)
        return _in_threads(load, {key: (repr(key), job) for key, job in jobs.items()}, "loading", progress)

    def _load(
        self, item: tuple[str, Job], programs: dict[str, dict[str, Any]], devices: Sequence[Any]
    ) -> Any:
        key, job = item
        out_tree = build_tree(programs[key]["result"], job.known)
        # Without the devices JAX takes all of the process, and a program for fewer then refuses its arguments.
        return deserialize_and_load(
            self.payloads.pop(key),
            job.in_tree,
            out_tree,
            backend=devices[0].client,
            execution_devices=devices,
        )


class Compiler:
    """Makes an engine's programs: of a folder's where one was named and suits, else by compiling.

    `facts` tells what the programs depend on; it is asked when it matters. What does not suit is named in a warning,
    or with `strict` in a ValueError.
    """

    def __init__(
        self, devices: Sequence[Any] = (), facts: Callable[[], Facts] = dict,
        folder: str | Path | None = None, strict: bool = False,
    ):  # fmt: skip
        self.devices, self.facts, self.strict = tuple(devices), facts, strict
        self.started: dict[Any, Callable[[], Job]] = {}
        self.artefact = None if folder is None else Artefact.of(folder)
        if self.artefact is not None:
            self._need(self.artefact.check(facts()))

    def _need(self, wrong: list[str]) -> None:
        """Leave the artefact where something is wrong with it."""
        if not wrong or self.artefact is None:
            return
        folder, self.artefact = self.artefact.folder, None
        shown = "; ".join(wrong[:6]) + (f"; and {len(wrong) - 6} more" if len(wrong) > 6 else "")
        message = f"the compiled programs in {folder} do not suit this engine: {shown}. Start with the settings that "
        message += "they were written for, or write them anew with `tokenloom compile` (LLM.save_compiled)"
        if self.strict:
            raise ValueError(message)
        warnings.warn(f"{message}; compiling instead", stacklevel=2)

    def start(self, key: Any, function: Callable[[], Any], shardings: Any = None) -> Any:
        """The arrays that `function` makes, by a program of its own."""
        self.started[key] = partial(start_job, key, function, shardings)
        return self.compile({key: self.started[key]()}, False)[key]()

    def compile(self, jobs: Mapping[Any, Job], progress: bool = True) -> dict[Any, Any]:
        """Key -> executable."""
        if self.artefact is not None:
            self._need(self.artefact.lacks(jobs))
        if self.artefact is None:
            return compile_jobs(jobs, progress)
        return self.artefact.load(jobs, self.devices, progress)

    def save(self, folder: str | Path, jobs: Mapping[Any, Job], progress: bool = False) -> Path:
        """`write` an engine's programs, and those that it started with."""
        started = {key: make() for key, make in self.started.items()}
        return write(folder, self.facts(), {**started, **jobs}, progress)
