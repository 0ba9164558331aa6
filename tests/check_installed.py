"""Run by CI in a clean environment, outside the checkout: every module imports, and the demo model writes."""

import importlib
import pkgutil

import tokenloom
from tokenloom import LLM, SamplingParams

count = 0
for module in pkgutil.walk_packages(tokenloom.__path__, "tokenloom."):
    importlib.import_module(module.name)
    count += 1
output = LLM("demo", max_num_seqs=1, max_num_batched_tokens=64, progress=False).generate(
    "import ", SamplingParams(temperature=0.0, max_tokens=8)
)[0]
assert len(output.outputs[0].token_ids) == 8, output
print(f"{count} modules imported from {tokenloom.__file__}; {output.outputs[0].text!r}")
